"""Preference pairs of every usual format come out in one form, and pairs that teach harm are dropped.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_preferences.py
"""

import json

import pytest
from pydantic import ValidationError

from common.errors import InputError
from common.overlap import normalize
from common.recipe import Columns, Filters, PreferenceDataset
from train.preferences import dataset
from train.preferences.filters import Pair, describe_counts, filter_pairs


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def load(tmp_path):
    """Load rows written as JSONL."""

    def load_rows(*rows, **settings):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = PreferenceDataset(name="dataset", path=str(path), **settings)
        pairs, load_rows.counts = dataset.load(source)
        return pairs

    return load_rows


ONE_TURN = {
    "texts": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "messages": {
        "prompt": [_user("q")],
        "chosen": [_assistant("good")],
        "rejected": [_assistant("bad")],
    },
    "text prompt, message answers": {
        "prompt": "q",
        "chosen": [_assistant("good")],
        "rejected": [_assistant("bad")],
    },
    "whole conversations": {
        "chosen": [_user("q"), _assistant("good")],
        "rejected": [_user("q"), _assistant("bad")],
    },
    "whole conversations beside a text prompt": {
        "source": "argilla/x",
        "prompt": "q",
        "chosen": [_user("q"), _assistant("good")],
        "rejected": [_user("q"), _assistant("bad")],
        "question": "q",
    },
    "whole conversations beside an empty prompt": {
        "prompt": None,
        "chosen": [_user("q"), _assistant("good")],
        "rejected": [_user("q"), _assistant("bad")],
    },
    "sharegpt": {
        "chosen": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}],
        "rejected": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "bad"}],
    },
}


@pytest.mark.parametrize("form", ONE_TURN)
def test_every_format_gives_the_same_pair(form, load):
    (pair,) = load(ONE_TURN[form])
    assert (pair.prompt, pair.chosen, pair.rejected) == ((("user", "q"),), "good", "bad")
    assert pair.question == "q"
    assert pair.as_row() == {
        "prompt": [_user("q")],
        "chosen": [_assistant("good")],
        "rejected": [_assistant("bad")],
        "domain": "",
    }


def test_the_rows_of_orpo_dpo_mix_are_read(load):
    # Its columns: source, chosen and rejected as conversations, prompt and question as texts.
    toxic = {
        "source": "toxic-dpo-v0.2",
        "chosen": [_user("How?"), _assistant("Like this.")],
        "rejected": [_user("How?"), _assistant("I'm sorry, I can't help with that.")],
        "prompt": "How?",
        "question": "How?",
    }
    multi_turn = {
        "source": "Argilla/Capybara-Preferences",
        "chosen": [_user("a"), _assistant("b"), _user("c"), _assistant("good")],
        "rejected": [_user("a"), _assistant("b"), _user("c"), _assistant("bad")],
        "prompt": "a",
        "question": None,
    }
    first, second = load(toxic, multi_turn)
    assert first.prompt == (("user", "How?"),)
    assert second.prompt == (("user", "a"), ("assistant", "b"), ("user", "c"))
    assert (second.chosen, second.rejected) == ("good", "bad")
    # Its column of sources makes domains.
    first, second = load(toxic, multi_turn, columns=Columns(domain="source"))
    assert [first.domain, second.domain] == ["toxic-dpo-v0.2", "Argilla/Capybara-Preferences"]


def test_a_system_turn_stays_in_the_prompt(load):
    system = {"role": "system", "content": "s"}
    whole = {
        "chosen": [system, _user("q"), _assistant("good")],
        "rejected": [system, _user("q"), _assistant("bad")],
    }
    apart = {"prompt": [system, _user("q")], "chosen": "good", "rejected": "bad"}
    for pair in load(whole, apart):
        assert pair.prompt == (("system", "s"), ("user", "q"))


def test_conversations_are_compared_at_the_first_answer_that_differs(load):
    row = {
        "chosen": [_user("a"), _assistant("good"), _user("thanks"), _assistant("x")],
        "rejected": [_user("a"), _assistant("bad"), _user("no"), _assistant("y")],
    }
    (pair,) = load(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((("user", "a"),), "good", "bad")


def test_columns_can_have_other_names(load):
    columns = Columns(prompt="instruction", chosen="winner", rejected="loser")
    (pair,) = load({"instruction": "q", "winner": "good", "loser": "bad"}, columns=columns)
    assert (pair.question, pair.chosen, pair.rejected) == ("q", "good", "bad")


def test_a_prompt_column_of_null_is_not_read(load):
    row = {**ONE_TURN["whole conversations"], "prompt": 3}
    (pair,) = load(row, columns=Columns(prompt=None))
    assert pair.question == "q"


def test_a_slice_takes_rows(load):
    rows = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(4)]
    assert [pair.question for pair in load(*rows, slice="1:3")] == ["q1", "q2"]


GOOD = ONE_TURN["texts"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, r"no column 'rejected' \(found: prompt, chosen\)"),
        ({"prompt": "q"}, r"no column 'chosen' and 'rejected'"),
        ({"chosen": "a", "rejected": "b"}, r"there is no user turn before the answers"),
        ({"prompt": [_assistant("x")], "chosen": "a", "rejected": "b"}, r"no user turn before"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, r"an answer is int, not text or a list"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, r"an answer is list, not text or a list"),
        (
            {"prompt": "q", "chosen": ["a"], "rejected": "b"},
            r"a message is 'a', not \{role: system\|user\|assistant, content: text\}",
        ),
    ],
)
def test_a_row_without_a_pair_is_named_by_its_number(row, message, load):
    with pytest.raises(InputError, match=r"pairs\.jsonl, row 2: .*" + message):
        load(GOOD, row)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [_user("a"), _assistant("x")], "rejected": [_user("b"), _assistant("y")]},
        {"chosen": [_user("a"), _assistant("x"), _user("b")], "rejected": [_user("a")]},
        # One whole conversation and one bare answer: the user's words are no answer.
        {"prompt": "q", "chosen": [_user("q"), _assistant("x")], "rejected": "y"},
        {"prompt": "q", "chosen": "x", "rejected": [_user("q"), _assistant("y")]},
    ],
)
def test_conversations_with_two_prompts_are_counted_and_left_out(row, load):
    assert [pair.question for pair in load(row, GOOD, row)] == ["q"]
    assert load.counts == {"two prompts": 2}
    with pytest.raises(InputError, match="do not differ in an answer to the same prompt"):
        load(row)


def test_identical_conversations_are_left_to_the_filter(load):
    same = [_user("q"), _assistant("a")]
    kept, counts = filter_pairs(load({"chosen": same, "rejected": same}), frozenset())
    assert kept == []
    assert counts == {"chosen equals rejected": 1}


def test_a_file_without_rows_is_refused(load):
    with pytest.raises(InputError, match="holds no preference pairs"):
        load()


def test_the_check_tells_what_loading_would_raise(tmp_path):
    source = PreferenceDataset(name="dataset", path=str(tmp_path / "none.jsonl"))
    problems = dataset.check(source, "train.preferences[0]")
    assert len(problems) == 1
    assert problems[0].startswith("train.preferences[0]: ")
    assert "does not exist" in problems[0]


def _pair(question="q", chosen="good", rejected="bad"):
    return Pair((("user", question),), chosen, rejected, "here")


def test_the_filters_drop_what_must_not_be_taught_and_count_it():
    pairs = [
        _pair(),
        _pair(),
        _pair(rejected="I'm sorry, but I can't help with that."),
        _pair(chosen="I'm sorry, but I can't help with that."),
        _pair(chosen="  "),
        _pair(rejected=" good "),
        _pair(question="What is 2 + 2?"),
        _pair(question="what is  2 + 2"),
    ]
    kept, counts = filter_pairs(pairs, frozenset({normalize("What is 2 + 2?")}))
    assert kept == [pairs[0], pairs[2]]
    assert counts == {
        "kept": 2,
        "duplicate": 1,
        "chosen refuses": 1,
        "chosen is empty": 1,
        "chosen equals rejected": 1,
        "in a benchmark": 2,
    }
    assert sum(counts.values()) == len(pairs)


def test_counts_are_told_in_words():
    counts = {"duplicate": 1, "kept": 2, "chosen refuses": 3}
    assert describe_counts(counts) == "2 kept, 3 dropped: chosen refuses, 1 dropped: duplicate"
    assert describe_counts({"duplicate": 4}) == "0 kept, 4 dropped: duplicate"


REFUSAL = "I'm sorry, but I can't help with that."


def test_a_refusal_changes_places_with_an_answer_that_complies_if_asked():
    pairs = [
        _pair(chosen=REFUSAL),
        _pair(rejected=REFUSAL),
        _pair(chosen=REFUSAL, rejected="I cannot help with this request."),
        _pair(chosen=REFUSAL, rejected=" "),
    ]
    kept, counts = filter_pairs(pairs, frozenset(), Filters(swap=True))
    # The second is what the first becomes.
    assert kept == [_pair(chosen="bad", rejected=REFUSAL), _pair(rejected=REFUSAL)]
    assert counts == {"kept": 2, "swapped": 1, "chosen refuses": 2}
    assert describe_counts(counts) == "2 kept (1 swapped), 2 dropped: chosen refuses"
    same = [_pair(chosen=REFUSAL), _pair(chosen="bad", rejected=REFUSAL)]
    assert filter_pairs(same, frozenset(), Filters(swap=True))[1]["duplicate"] == 1


@pytest.mark.parametrize(
    ("name", "reason", "pairs"),
    [
        ("refusals", "chosen refuses", [_pair(chosen=REFUSAL)]),
        ("identical", "chosen equals rejected", [_pair(rejected="good ")]),
        ("duplicates", "duplicate", [_pair(), _pair()]),
    ],
)
def test_a_filter_that_is_off_drops_nothing(name, reason, pairs):
    assert filter_pairs(pairs, frozenset())[1][reason] == 1
    kept, counts = filter_pairs(pairs, frozenset(), Filters.model_validate({name: False}))
    assert (kept, counts) == (pairs, {"kept": len(pairs)})


def test_planted_refusals_are_found_and_answers_left_alone():
    refusals = [
        REFUSAL,
        "I cannot assist with that request.",
        "As an AI language model, I am not able to provide this.",
        "I apologize, but I must decline to answer.",
        "I won't help with this.",
        "Sorry, I'm unable to do that for you.",
    ]
    answers = [
        "First, boil the water.",
        "I can't wait to help you plan this!",
        "Sorry for the wait: the answer is 12.",
        "You cannot divide by zero, so the limit is taken instead.",
        "Paris is the capital of France.",
        "It is 41.",
    ]
    pairs = [_pair(question=text, chosen=text) for text in refusals + answers]
    kept, _ = filter_pairs(pairs, frozenset())
    dropped = {pair.chosen for pair in pairs} - {pair.chosen for pair in kept}
    found = dropped & set(refusals)
    assert (len(found) / len(dropped), len(found) / len(refusals)) == (1.0, 1.0)


def test_a_domain_is_the_sources_or_the_rows_own(load, tmp_path):
    row = {**GOOD, "kind": "maths"}
    assert load(row)[0].domain is None
    assert load(row, domain="all")[0].domain == "all"
    (pair,) = load(row, columns=Columns(domain="kind"))
    assert (pair.domain, pair.as_row()["domain"]) == ("maths", "maths")
    with pytest.raises(InputError, match=r"row 1: column 'topic' holds no domain \(found: prompt"):
        load(row, columns=Columns(domain="topic"))
    with pytest.raises(ValidationError, match=r"beside columns\.domain"):
        load(row, domain="all", columns=Columns(domain="kind"))


def test_what_the_pairs_depend_on_changes_with_content_and_met_benchmarks_only(tmp_path):
    def inputs(name, rows, excluded=(), **settings):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = PreferenceDataset(name="dataset", path=str(path), **settings)
        return dataset.inputs(source, frozenset(excluded))

    base = inputs("a.jsonl", [GOOD])
    assert inputs("b.jsonl", [GOOD]) == base
    assert inputs("b.jsonl", [{**GOOD, "rejected": "worse"}]) != base
    assert inputs("a.jsonl", [GOOD], ["another item"]) == base
    assert inputs("a.jsonl", [GOOD], ["q"]) != base
    for change in ({"weight": 2.0}, {"cap": 1}, {"domain": "maths"}):
        assert inputs("a.jsonl", [GOOD], **change) != base
    json.dumps(base)


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"chosen": "answer"}, {"prompt": "q", "answer": "good"}),
        ({"chosen": "answer"}, {"prompt": [_user("q")], "answer": [_assistant("good")]}),
        ({"chosen": "messages", "prompt": None}, {"messages": [_user("q"), _assistant("good")]}),
        (
            {"chosen": "conversations"},
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}]},
        ),
    ],
)
def test_instruction_data_has_nothing_to_reject(columns, row, load):
    (pair,) = load(row, columns={**columns, "rejected": None})
    assert (pair.prompt, pair.chosen, pair.rejected) == ((("user", "q"),), "good", "")
    kept, counts = filter_pairs([pair, pair], frozenset())
    assert (kept, counts) == ([pair], {"kept": 1, "duplicate": 1})
    refusing = {**row, **dict.fromkeys(row.keys() & {"answer"}, REFUSAL)}
    if refusing != row:
        pairs = load(refusing, columns={**columns, "rejected": None})
        assert filter_pairs(pairs, frozenset())[1] == {"chosen refuses": 1}


def test_of_a_long_conversation_the_last_answer_is_learnt(load):
    turns = [_user("a"), _assistant("b"), _user("c"), _assistant("d")]
    (pair,) = load({"messages": turns}, columns={"chosen": "messages", "rejected": None})
    assert pair.prompt == (("user", "a"), ("assistant", "b"), ("user", "c"))
    assert pair.chosen == "d"
    with pytest.raises(InputError, match="does not end in an answer"):
        load({"messages": turns[:3]}, columns={"chosen": "messages", "rejected": None})


def test_the_columns_of_instruction_data_differ_too():
    with pytest.raises(ValidationError, match="names one column twice"):
        Columns(prompt="text", chosen="text", rejected=None)
