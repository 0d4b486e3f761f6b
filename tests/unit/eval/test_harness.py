"""The harness's view of a model: the same numbers as its own, without the newline trap.

Run: python -m pytest tests/unit/eval/test_harness.py
"""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from eval.harness import HarnessModel

# One of each kind: plain, absolute positions, sliding windows, latent attention, experts in both layouts, images.
FAMILIES = [
    "llama",
    "gpt2",
    "gemma3_text",
    "deepseek_v3",
    "qwen3_moe",
    "gpt_oss",
    "gemma3",
    "llava",
    "qwen2_5_vl",
]


def pairs(count: int) -> list[tuple[str, str]]:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(97, 122, (count, 30), generator=generator).tolist()
    return [
        (bytes(row[: 4 + i % 20]).decode(), bytes(row[24 : 25 + i % 5]).decode())
        for i, row in enumerate(draw)
    ]


def brute_force(model, byte_tokenizer, context: str, answer: str) -> tuple[float, bool]:
    start = byte_tokenizer.encode(context, add_special_tokens=False)
    ids = byte_tokenizer.encode(answer, add_special_tokens=False)
    with torch.inference_mode():
        logps = model(torch.tensor([[*start, *ids]])).logits[0].log_softmax(-1)
    rows = logps[len(start) - 1 : -1]
    return sum(float(rows[i, t]) for i, t in enumerate(ids)), rows.argmax(-1).tolist() == ids


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_log_probabilities_are_those_of_one_row_at_a_time(
    make_model, byte_tokenizer, batch_size: int
) -> None:
    model, asked = make_model(0), pairs(40)
    asked += [(asked[0][0], answer) for answer in "xyz"]  # options of one token share a row
    harness = HarnessModel(model, byte_tokenizer, batch_size)
    found = harness.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in asked])
    for (logp, is_greedy), pair in zip(found, asked, strict=True):
        expected, expected_greedy = brute_force(model, byte_tokenizer, *pair)
        assert logp == pytest.approx(expected, abs=1e-4)  # float32, other batch shapes
        assert is_greedy == expected_greedy


def test_the_harness_itself_agrees_where_its_boundary_is_clean(make_model, byte_tokenizer) -> None:
    model, requests = make_model(1), [Instance("loglikelihood", {}, pair, 0) for pair in pairs(30)]
    theirs = HFLM(pretrained=model, tokenizer=byte_tokenizer, batch_size=8, add_bos_token=False)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = HarnessModel(model, byte_tokenizer, 8).loglikelihood(requests)
    assert [logp for logp, _ in found] == pytest.approx([logp for logp, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_templates_last_newline_stays_out_of_the_answer(make_model, byte_tokenizer) -> None:
    model, context = make_model(0), "<|user|>\nhi<|end|>\n<|assistant|>\n"
    request = Instance("loglikelihood", {}, (context, "abc"), 0)
    ((found, _),) = HarnessModel(model, byte_tokenizer, 1).loglikelihood([request])
    theirs = HFLM(pretrained=model, tokenizer=byte_tokenizer, batch_size=1, add_bos_token=False)
    ((trapped, _),) = theirs.loglikelihood([request], disable_tqdm=True)
    assert found == pytest.approx(brute_force(model, byte_tokenizer, context, "abc")[0], abs=1e-4)
    assert abs(found - trapped) > 0.1


def test_a_question_too_long_loses_its_beginning(make_model, byte_tokenizer) -> None:
    model = make_model(0)
    long = "q" * 400 + "the end"
    harness = HarnessModel(model, byte_tokenizer, 2)
    (found,) = harness.log_probabilities([(long, "abc")], "x")
    assert found == pytest.approx(
        brute_force(model, byte_tokenizer, long[-254:], "abc")[0], abs=1e-4
    )


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_generation_stops_at_the_stop_and_does_not_depend_on_the_batch(
    make_model, byte_tokenizer, batch_size: int
) -> None:
    model = make_model(2)
    contexts = [context for context, _ in pairs(9)]

    def requests(until: list[str], length: int) -> list[Instance]:
        settings = {"until": until, "max_gen_toks": length, "do_sample": False, "temperature": 0.0}
        return [Instance("generate_until", {}, (c, dict(settings)), 0) for c in contexts]

    harness = HarnessModel(model, byte_tokenizer, batch_size)
    free = harness.generate_until(requests([], 8))
    for context, text in zip(contexts, free, strict=True):
        ids = torch.tensor([byte_tokenizer.encode(context, add_special_tokens=False)])
        alone = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert text == byte_tokenizer.decode(alone, skip_special_tokens=True)
    stop = next(letter for letter in free[0][1:] if free[0].index(letter) > 0)
    stopped = harness.generate_until(requests([stop], 8))
    assert stopped == [text.split(stop)[0] for text in free]


def test_a_question_that_leaves_little_room_gets_a_short_answer(make_model, byte_tokenizer) -> None:
    request = Instance("generate_until", {}, ("q" * 250, {"until": [], "max_gen_toks": 64}), 0)
    (text,) = HarnessModel(make_model(0), byte_tokenizer, 1).generate_until([request])
    assert len(text) <= 6  # one token per byte


def test_the_number_of_processes_changes_no_number(make_model, byte_tokenizer, request) -> None:
    harness = HarnessModel(make_model(0), byte_tokenizer, 4)
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs(30)]
    alone = harness.loglikelihood(requests)

    request.getfixturevalue("two_processes")
    assert harness.loglikelihood(requests) == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_an_architecture_is_scored_as_it_scores_itself(
    family: str, build_model, byte_tokenizer
) -> None:
    model = build_model(family, dtype=torch.float32)
    asked = pairs(6)
    found = HarnessModel(model, byte_tokenizer, 6).log_probabilities(asked, "x")
    expected = [brute_force(model, byte_tokenizer, *pair)[0] for pair in asked]
    assert found == pytest.approx(expected, abs=1e-3)
