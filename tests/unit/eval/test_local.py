"""Questions of one's own, from JSONL and CSV.

Run: python -m pytest tests/unit/eval/test_local.py
"""

import json

import pytest
from pydantic import ValidationError

from common.errors import InputError
from common.questions import is_right
from common.recipe import LocalQuestions
from eval import parts
from eval.benchmarks import Subject, local
from eval.harness import HarnessModel

ROWS = [
    {
        "ask": f"Which letter is number {number}?",
        "options": ["a", "b b", "c yes"],
        "right": "ABC"[number % 3],
        "theme": f"t{number // 2}",
    }
    for number in range(8)
]


@pytest.fixture
def write(tmp_path):
    """Write rows as JSONL, or as CSV; gives the settings of a benchmark over them."""

    def make(rows, name="mine.jsonl", **settings):
        path = tmp_path / name
        if name.endswith(".csv"):
            lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        else:
            lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n")
        return LocalQuestions(name="local", task="mine", path=str(path), **settings)

    return make


def options_of(write, rows=ROWS, **settings):
    chosen = {"question": "ask", "choices": "options", "label": "right", "cluster": "theme"}
    return write(rows, **chosen | settings)


def test_options_are_scored_as_the_harness_scores_them(byte_tokenizer, make_model, write) -> None:
    model = make_model(0)
    (loaded,) = local.load(options_of(write), byte_tokenizer, batch_size=4)
    assert (loaded.row.name, loaded.row.about["metric"]) == ("mine", "acc")
    harness = HarnessModel(model, byte_tokenizer, 1)
    for item, row in zip(loaded.score(Subject("original", model, model)), ROWS, strict=True):
        chat = [{"role": "user", "content": row["ask"]}]
        context = byte_tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        logps = harness.log_probabilities([(context, option) for option in row["options"]], "x")
        right = "ABC".index(row["right"])
        assert item.value == float(logps.index(max(logps)) == right)
        assert item.answer_logp == pytest.approx(logps[right], abs=1e-4)
        assert item.cluster == row["theme"]


def test_a_written_answer_is_judged_as_everywhere(byte_tokenizer, make_model, write) -> None:
    rows = [{"question": f"{n}+{n}=", "answer": 2 * n} for n in range(6)]
    spec = write(rows, answer="answer", max_new_tokens=5)
    (loaded,) = local.load(spec, byte_tokenizer, batch_size=4)
    model = make_model(0)
    items = loaded.score(Subject("original", model, model))
    assert all(len(item.details["answer"]) <= 5 and item.answer_logp < 0 for item in items)
    for item, row in zip(items, rows, strict=True):
        assert item.value == float(is_right(item.details["answer"], str(row["answer"])))
    judged = loaded.task.process_results({"answer": "12"}, ["That makes 12."])
    assert judged == {"acc": 1.0}
    assert loaded.task.process_results({"answer": "12"}, ["That makes 13."]) == {"acc": 0.0}


def test_a_spreadsheet_of_columns_gives_the_same_task(byte_tokenizer, write) -> None:
    sheet = [
        {"ask": row["ask"], "one": "a", "two": "b b", "three": "c yes", "right": row["right"]}
        for row in ROWS
    ]
    from_sheet = write(
        sheet, "mine.csv", question="ask", choices=["one", "two", "three"], label="right"
    )
    (wide,) = local.load(from_sheet, byte_tokenizer, batch_size=4)
    (long,) = local.load(options_of(write), byte_tokenizer, batch_size=4)
    assert [request.args for request in wide.task.instances] == [
        request.args for request in long.task.instances
    ]
    assert [document["label"] for document in wide.documents.values()] == [
        document["label"] for document in long.documents.values()
    ]


@pytest.mark.parametrize(
    ("label", "options", "number"),
    [
        (1, ["x", "y"], 1),
        ("1", ["x", "y"], 1),
        ("b", ["x", "y"], 1),
        ("B", ["x", "y"], 1),
        ("y", ["x", "y"], 1),
        (2, ["1", "2", "3"], 2),  # a number of JSON is the option's number
        ("B", ["A", "B"], 1),
        (" yes ", ["no", "yes"], 1),
    ],
)
def test_a_label_means_a_number_a_letter_or_a_text(label, options, number) -> None:
    assert local.option_number(label, options) == number


@pytest.mark.parametrize(
    ("label", "options", "reason"),
    [
        ("2", ["1", "2", "3"], "means several options"),
        ("B", ["B", "A"], "means several options"),
        ("C", ["x", "y"], "is no option"),
        (2, ["x", "y"], "is no option"),
        (-1, ["x", "y"], "is no option"),
        (None, ["x", "y"], "is no option"),
        (True, ["x", "y"], "is no option"),
        ("x", ["x", "x"], "means several options"),
    ],
)
def test_a_label_that_means_none_or_several_is_refused(label, options, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        local.option_number(label, options)


@pytest.mark.parametrize(
    ("change", "settings", "reason"),
    [
        ({}, {"label": "gold"}, r"has no column 'gold' \(found: ask, options, right, theme\)"),
        ({"right": "Z"}, {}, r"row 3: label 'Z' is no option \(of 3\)"),
        ({"options": ["one"]}, {}, "row 3: .* list of two or more options"),
        ({"ask": " "}, {}, "row 3: column 'ask' should hold words"),
        ({"theme": None}, {}, "row 3: column 'theme' should hold words"),
    ],
)
def test_rows_that_cannot_be_asked_are_found_by_number(
    finished, write, change, settings, reason
) -> None:
    rows = [*ROWS[:2], {**ROWS[2], **change}, *ROWS[3:]]
    spec = options_of(write, rows, **settings)
    with pytest.raises(InputError, match=reason):
        local.texts(spec)
    section = finished.recipe.eval.model_copy(update={"benchmarks": (spec,), "accept": {}})
    recipe = finished.recipe.model_copy(update={"eval": section})
    (problem,) = local.check(spec, recipe)
    assert problem.startswith("eval.benchmarks[0]: ")


def test_many_faults_are_told_in_one_line(write) -> None:
    rows = [{"question": "?", "answer": "..."} for _ in range(9)]
    with pytest.raises(InputError, match=r"row 1: .* row 5: .*\(and 4 more\)"):
        local.names(write(rows, answer="answer")) and local.texts(write(rows, answer="answer"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "needs one of the two"),
        ({"answer": "a", "choices": "c", "label": "l"}, "needs one of the two"),
        ({"choices": "c"}, "label.*is missing"),
        ({"choices": ["c"], "label": "l"}, "names one option"),
        ({"answer": "a", "label": "l"}, "has no effect beside answer"),
        ({"choices": "c", "label": "l", "max_new_tokens": 5}, "has no effect on options"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(settings, reason) -> None:
    with pytest.raises(ValidationError, match=rf"(?s){reason}"):
        LocalQuestions(name="local", task="mine", path="mine.jsonl", **settings)


def test_the_fingerprint_follows_the_questions_and_not_the_path(write, tmp_path) -> None:
    before = local.inputs(options_of(write))
    (tmp_path / "mine.jsonl").rename(tmp_path / "other.jsonl")
    moved = options_of(write).model_copy(update={"path": str(tmp_path / "other.jsonl")})
    assert local.inputs(moved) == before
    changed = options_of(write, [{**ROWS[0], "right": "B"}, *ROWS[1:]])
    assert local.inputs(changed) != before


def test_questions_can_be_measured_in_parts(byte_tokenizer, make_model, write) -> None:
    rows = [{**ROWS[number % 8], "theme": f"t{number}"} for number in range(40)]
    (loaded,) = local.load(options_of(write, rows), byte_tokenizer, batch_size=4)
    model = make_model(0)
    found = [
        item.id
        for part in ("search", "confirmation", "test")
        for item in parts.restrict(
            local.load(options_of(write, rows), byte_tokenizer, batch_size=4)[0], part
        ).score(Subject("original", model, model))
    ]
    assert sorted(found) == sorted(loaded.documents)
