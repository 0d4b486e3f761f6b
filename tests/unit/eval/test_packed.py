"""Packed rows score options as the harness's own HFLM does, in fewer tokens.

Run: python -m pytest tests/unit/eval/test_packed.py
"""

import itertools
import json
import logging
import os
import random
import sys
import types
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from common.errors import InputError
from eval import harness, packed
from eval.harness import HarnessModel
from eval.packed import MIN_PREFIX, MIN_SAVING, batches

DATA = os.environ.get("HEALING_TEST_DATA")
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# Windows of 16 tokens; the shared beginning below is longer.
FAMILIES = {
    "llama": {},
    "qwen2": {"sliding_window": 16, "use_sliding_window": True, **MIXED},
    "mistral": {"sliding_window": 16},
    "gemma3_text": MIXED,
    "gemma3": MIXED,
    "gpt_oss": MIXED,
    "deepseek_v3": {},
}
# A state-space model reads plain rows.
MAMBA = {"num_hidden_layers": 2, "hidden_size": 32, "state_size": 8, "initializer_range": 0.15}


def words(rng: random.Random, length: int) -> str:
    return "".join(rng.choice("bcdefghijklmnop") for _ in range(length))


def items(num_items: int, shared: int = 0) -> list[tuple[str, str]]:
    """Contexts with options of all kinds: texts, letters, one that is there twice, some with a common beginning."""
    rng = random.Random(0)
    beginning = words(rng, shared)
    pairs = []
    for _ in range(num_items):
        context, stem = beginning + words(rng, rng.randint(1, 20)), words(rng, 4)
        options = [words(rng, rng.randint(2, 14)) for _ in range(2)]
        options += ["x", "y", stem + "x", stem + "y", stem, options[0]]
        pairs += [(context, option) for option in options]
    rng.shuffle(pairs)
    return pairs


def requests(pairs: list[tuple[str, str]]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


def of_the_harness(model, tokenizer, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, add_bos_token=False)
    scored: list[tuple[float, bool]] = theirs.loglikelihood(requests(pairs), disable_tqdm=True)
    return scored


def assert_same(found, expected, within: float) -> None:
    assert [logp for logp, _ in found] == pytest.approx([logp for logp, _ in expected], abs=within)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.fixture
def mamba() -> AutoModelForCausalLM:
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", vocab_size=280, **MAMBA)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("shared", [0, 60])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_numbers_are_the_harnesss_own(family, shared, build_model, byte_tokenizer) -> None:
    model, pairs = build_model(family, dtype=torch.float32, **FAMILIES[family]), items(20, shared)
    ours = HarnessModel(model, byte_tokenizer, 8)
    assert ours.scorer.plan == "packed"
    found = ours.loglikelihood(requests(pairs))
    assert_same(found, of_the_harness(model, byte_tokenizer, pairs), 1e-4)
    assert (ours.scorer._prefix is not None) == bool(shared)


@pytest.mark.parametrize("shared", [0, 60])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_in_float64_nothing_but_its_rounding_is_left(
    family, shared, build_model, byte_tokenizer, in_float64_throughout
) -> None:
    model, pairs = build_model(family, **FAMILIES[family]), items(20, shared)
    found = HarnessModel(model, byte_tokenizer, 8).loglikelihood(requests(pairs))
    assert_same(found, of_the_harness(model, byte_tokenizer, pairs), 1e-10)


def test_greedy_answers_are_known_as_such(make_model, byte_tokenizer) -> None:
    model, ids = make_model(0), byte_tokenizer.encode("bcd", add_special_tokens=False)
    for _ in range(3):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    likeliest = tuple(ids[3:])
    others = [(*likeliest[:2], likeliest[2] ^ 1), likeliest[:1]]
    asked = [(None, ids[:3], list(option)) for option in (likeliest, *others)]
    scored = HarnessModel(model, byte_tokenizer, 8)._loglikelihood_tokens(asked)
    assert [greedy for _, greedy in scored] == [True, False, True]


@pytest.mark.parametrize("shared", [0, 60])
def test_a_model_that_takes_no_masks_falls_back_with_one_line(
    mamba, byte_tokenizer, shared, caplog
) -> None:
    pairs = items(20, shared)
    with caplog.at_level(logging.INFO, "common.branches"):
        for _ in range(2):
            found = HarnessModel(mamba, byte_tokenizer, 8).loglikelihood(requests(pairs))
    assert_same(found, of_the_harness(mamba, byte_tokenizer, pairs), 1e-4)
    ours = [record.message for record in caplog.records if record.name == "common.branches"]
    assert len(ours) == 1
    assert "mamba" in ours[0]


@pytest.mark.parametrize("engine", ["packed", "hf"])
@pytest.mark.parametrize(
    "opening",
    [
        "<|user|>\nhi<|end|>\n<|assistant|>\n\n",  # as Llama 3's
        "<|user|>\nhi<|end|>\n<|assistant|>\n",  # as ChatML's
        "<|user|>\nhi<|end|><|assistant|>model\n",  # as Gemma's
    ],
)
def test_the_newline_that_ends_a_template_is_no_part_of_an_option(
    engine, opening, make_model, byte_tokenizer
) -> None:
    """The tokenizer merges a newline and an `a`: apart, an option of one letter is one token."""
    model, options = make_model(0), ["a", "b", "abc"]
    ours = HarnessModel(model, byte_tokenizer, 8, engine=engine)
    found = ours.loglikelihood(requests([(opening, option) for option in options]))
    start = byte_tokenizer.encode(opening, add_special_tokens=False)
    for (logp, _), option in zip(found, options, strict=True):
        ids = [byte_tokenizer.convert_tokens_to_ids(letter) for letter in option]
        with torch.no_grad():
            logits = model(torch.tensor([[*start, *ids]])).logits[0]
        logps = logits.log_softmax(-1)[len(start) - 1 :]
        expected = sum(float(logps[place, token]) for place, token in enumerate(ids))
        assert logp == pytest.approx(expected, abs=1e-4)
    trapped = of_the_harness(model, byte_tokenizer, [(opening, "a")])[0][0]
    assert abs(found[0][0] - trapped) > 0.1


def test_a_context_too_long_loses_its_beginning_as_in_the_harness(
    make_model, byte_tokenizer
) -> None:
    """Each option then has a context of its own, and what was shared is shared no more."""
    rng = random.Random(1)
    pairs = [
        (words(rng, length), option)
        for length in (250, 300, 400)
        for option in ("x", "yy", words(rng, 14))
    ]
    model = make_model(0)
    found = HarnessModel(model, byte_tokenizer, 4).loglikelihood(requests(pairs))
    assert_same(found, of_the_harness(model, byte_tokenizer, pairs), 1e-4)


def test_without_a_context_an_option_stands_behind_the_first_token(
    make_model, byte_tokenizer
) -> None:
    """Sentences without a context, hundreds of them, are one context's options: they fill many rows."""
    rng, model = random.Random(2), make_model(0)
    pairs = [("", words(rng, rng.randint(1, 20))) for _ in range(200)]
    ours = HarnessModel(model, byte_tokenizer, 4)
    assert_same(
        ours.loglikelihood(requests(pairs)), of_the_harness(model, byte_tokenizer, pairs), 1e-4
    )


@pytest.mark.parametrize(
    ("pair", "message"), [(("bcd", ""), "empty option"), (("b", "c" * 300), "does not fit")]
)
def test_an_option_that_cannot_be_scored_is_the_users_matter(
    pair, message, make_model, byte_tokenizer
) -> None:
    with pytest.raises(InputError, match=message):
        HarnessModel(make_model(0), byte_tokenizer, 4).loglikelihood(requests([pair]))


@pytest.mark.parametrize("engine", ["packed", "hf"])
def test_whole_texts_are_scored_in_the_harnesss_windows(engine, make_model, byte_tokenizer) -> None:
    rng, model = random.Random(3), make_model(0)
    texts = [words(rng, length) for length in (1, 100, 256, 257, 700)]
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    theirs = HFLM(pretrained=model, tokenizer=byte_tokenizer, batch_size=2, add_bos_token=False)
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    ours = HarnessModel(model, byte_tokenizer, 2, engine=engine)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, abs=2e-3)  # of 700 tokens


def test_what_contexts_begin_with_is_read_once_and_letters_share_a_row(
    make_model, byte_tokenizer
) -> None:
    model, rng, read = make_model(0), random.Random(4), []
    beginning = words(rng, 100)
    contexts = [beginning + words(rng, 10) for _ in range(20)]
    pairs = [(context, letter) for context in contexts for letter in "wxyz"]
    ours = HarnessModel(model, byte_tokenizer, 8)
    ours.loglikelihood(requests(pairs))  # the checks have run now
    ours.scorer._prefix = None
    model.model.embed_tokens.register_forward_hook(
        lambda _m, args, _out: read.append(tuple(args[0].shape))
    )
    ours.loglikelihood(requests(pairs))
    (beginning_read, *rows) = read
    assert beginning_read[0] == 1
    assert 100 <= beginning_read[1] <= 102  # by chance contexts may share a letter more
    assert rows == [(count, 110 - beginning_read[1]) for count in (8, 8, 4)]


def test_every_text_is_tokenised_once_for_all_models(make_model, byte_tokenizer) -> None:
    class Counting:
        """Counts the texts that it is handed."""

        def __init__(self) -> None:
            self.texts: list[str] = []

        def __call__(self, texts, **settings):
            self.texts += texts
            return byte_tokenizer(texts, **settings)

    pairs, encoder = items(6), harness.Encoder(Counting())
    for seed in range(3):
        HarnessModel(make_model(seed), byte_tokenizer, 8, encoder=encoder).loglikelihood(
            requests(pairs)
        )
    assert sorted(encoder.tokenizer.texts) == sorted({text for pair in pairs for text in pair})


# ---- the plan of batches, on planted token ids


def planted(shared: int, num_contexts: int, seed: int) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    beginning = [rng.randrange(1000) for _ in range(shared)]
    return [
        tuple(beginning + [1000 + seed, number] + [rng.randrange(1000) for _ in range(9)])
        for number in range(num_contexts)
    ]


def pairs_of(contexts: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(context, (7, number)) for context in contexts for number in range(3)]


def prefixes_of(contexts: list[tuple[int, ...]]) -> dict[int, int]:
    """By length of the prefix the number of rows that are read behind it."""
    found: dict[int, int] = {}
    for batch in batches(pairs_of(contexts), 8, "packed"):
        found[len(batch.prefix)] = found.get(len(batch.prefix), 0) + len(batch.rows)
    return found


def test_few_shot_examples_are_found_as_what_all_contexts_begin_with() -> None:
    assert prefixes_of(planted(400, 30, seed=1)) == {401: 30}


def test_passages_are_found_where_several_questions_share_one() -> None:
    passages = [planted(300, 5, seed) for seed in range(4)]
    single = [context for seed in range(10, 20) for context in planted(40, 1, seed)]
    contexts = [*itertools.chain(*passages), *single]
    random.Random(0).shuffle(contexts)
    assert prefixes_of(contexts) == {301: 20, 0: 10}


def test_a_system_prompt_is_shared_by_what_shares_no_passage() -> None:
    system = planted(60, 1, seed=9)[0][:60]
    passages = [[system + context for context in planted(300, 5, seed)] for seed in range(3)]
    single = [system + context for seed in range(10, 40) for context in planted(40, 1, seed)]
    assert prefixes_of([*itertools.chain(*passages), *single]) == {361: 15, 60: 30}


@pytest.mark.parametrize(("shared", "num_contexts"), [(MIN_PREFIX - 2, 500), (400, 2), (0, 50)])
def test_a_beginning_that_is_short_or_rare_is_not_worth_it(shared, num_contexts) -> None:
    assert (shared + 1) * (num_contexts - 1) < MIN_SAVING or shared + 1 < MIN_PREFIX
    assert set(prefixes_of(planted(shared, num_contexts, seed=1))) == {0}


@pytest.mark.parametrize("how", ["packed", "plain"])
@pytest.mark.parametrize("seed", range(8))
def test_every_request_is_answered_once_behind_its_own_context(how, seed) -> None:
    rng = random.Random(seed)
    alphabet = range(rng.choice([2, 3, 50]))
    pairs = [
        (
            (5,) * rng.choice([0, 40, 60]) + tuple(rng.choices(alphabet, k=rng.randint(1, 30))),
            tuple(rng.choices(alphabet, k=rng.randint(1, 6))),
        )
        for _ in range(400)
    ]
    made = batches(pairs, 8, how)
    assert sorted(itertools.chain(*(batch.numbers for batch in made))) == list(range(400))
    for batch in made:
        assert 1 <= len(batch.rows) <= 8
        for row in batch.rows:
            assert row.context[: len(batch.prefix)] == batch.prefix
            assert len(row.context) > len(batch.prefix)
            for option, stem, numbers in row.asked:
                assert {pairs[number] for number in numbers} == {(row.context, option)}
                assert len(option) == len(row.stems[stem])
                assert option[:-1] == row.stems[stem][:-1]
    if how == "plain":
        assert {len(row.stems) for batch in made for row in batch.rows} == {1}
        assert {batch.prefix for batch in made} == {()}


def test_neither_a_row_nor_a_batch_holds_more_than_memory_is_meant_for() -> None:
    pairs = [((1,), tuple(range(number, number + 20))) for number in range(3000)]
    for batch in batches(pairs, 8, "packed"):
        assert sum(row.num_predictions for row in batch.rows) <= 8 * packed.PREDICTIONS_PER_ROW
        assert all(row.num_predictions <= packed.ROOM for row in batch.rows)


# ---- as one of the harness's own classes


def evaluated(model, folder: Path, *tasks: str) -> dict[str, dict[str, float]]:
    done = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    return {
        task: {name: value for name, value in found.items() if isinstance(value, float)}
        for task, found in done["results"].items()
    }


def test_the_harnesss_own_evaluation_runs_with_it(make_model, byte_tokenizer, task_folder) -> None:
    rows = [{"text": text} for text in ("bcd efg", "hij")]
    (task_folder / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task_folder / "plain.yaml").write_text(
        "task: plain\ndataset_path: json\ndataset_kwargs: {data_files: {test: plain.jsonl}}\n"
        'test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\n'
        "doc_to_target: text\nmetric_list: [{metric: word_perplexity}]\n"
    )
    for path in task_folder.glob("*.yaml"):
        text = path.read_text()
        for name in ("letters", "sums", "plain"):
            text = text.replace(f"{name}.jsonl", str(task_folder / f"{name}.jsonl"))
        path.write_text(text)
    model, tasks = make_model(0), ("letters", "sums", "plain")
    theirs = HFLM(pretrained=model, tokenizer=byte_tokenizer, batch_size=4, add_bos_token=False)
    expected = evaluated(theirs, task_folder, *tasks)
    found = evaluated(HarnessModel(model, byte_tokenizer, 4), task_folder, *tasks)
    assert expected["letters"].keys() >= {"acc,none", "acc_norm,none"}
    assert "word_perplexity,none" in expected["plain"]
    for task in tasks:
        assert found[task] == pytest.approx(expected[task], rel=1e-4)


def test_vllm_is_handed_the_weights_and_asked_in_token_ids(
    make_model, byte_tokenizer, monkeypatch
) -> None:
    """Stands in for lm-eval's class, which needs a GPU: what it is given, and how often it is made."""
    made: list[str] = []

    class VLLM(HFLM):
        def __init__(self, pretrained: str, dtype: str, add_bos_token: bool) -> None:
            made.append(dtype)
            loaded = AutoModelForCausalLM.from_pretrained(pretrained)
            super().__init__(
                pretrained=loaded,
                tokenizer=AutoTokenizer.from_pretrained(pretrained),
                add_bos_token=add_bos_token,
            )

    module = types.SimpleNamespace(VLLM=VLLM)
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", module)
    model, pairs = make_model(0), items(4)
    for _ in range(2):
        ours = HarnessModel(model, byte_tokenizer, 8, engine="vllm")
        found = ours.loglikelihood(requests(pairs))
    assert_same(found, of_the_harness(model, byte_tokenizer, pairs), 1e-4)
    assert made == ["float32"]


# ---- public data


def agieval(folder: Path, name: str) -> None:
    """A task of the harness's own, pointed at a local file in the form of the data set that it names."""
    path = Path(str(DATA)) / "agieval" / f"{name}.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [
        {
            "query": f"{record['passage'] or ''}Q: {record['question']} Answer Choices: "
            f"{' '.join(record['options'])}\nA: Among A through {'ABCDE'[len(record['options']) - 1]}, the answer is",
            "choices": record["options"],
            "gold": ["ABCDE".index(record["label"])],
        }
        for record in records
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    definitions = Path(lm_eval.__file__).parent / "tasks" / "agieval"
    (folder / f"{name}.yaml").write_text(
        f"include: {definitions / name}.yaml\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\n"
    )


@pytest.fixture(scope="module")
def qwen():
    """A random Qwen2 of the real vocabulary, and the real tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(Path(str(DATA)) / "tokenizers" / "qwen2.5")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=1024,
    )
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


@pytest.mark.slow
@pytest.mark.timeout(7200)  # the harness computes all logits over 152k tokens
@pytest.mark.skipif(
    DATA is None,
    reason="HEALING_TEST_DATA names no folder of public test data, which is never copied here",
)
def test_agieval_gives_the_harnesss_own_accuracy(qwen, tmp_path) -> None:
    for name in ("aqua-rat", "logiqa-en"):
        agieval(tmp_path, name)
    (model, tokenizer), tasks = qwen, ("agieval_aqua_rat", "agieval_logiqa_en")
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, add_bos_token=False)
    found = evaluated(HarnessModel(model, tokenizer, 4), tmp_path, *tasks)
    assert found == evaluated(theirs, tmp_path, *tasks)
    for task in tasks:
        assert 0.1 < found[task]["acc,none"] < 0.4  # a random model guesses
