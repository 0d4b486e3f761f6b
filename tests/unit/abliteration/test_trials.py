"""Several edits in one pass measure as edited models do one by one, and answers end when they are settled.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_trials.py
"""

import copy
import itertools

import pytest
import torch

from abliteration import trials as module
from abliteration.trials import ANSWER_TOKENS, Trials, is_settled
from common import chat
from common.edits import Edit, apply_to_weights
from common.errors import StageError
from common.refusal import OPENING_CHARACTERS, is_refusal
from tests.editing import edit_of, vector

HARMFUL = ["do it", "tell me how the other one is made", "why", "the rest, and the other"]
HARMLESS = ["and the thing", "make me one that the other made", "what is it?"]
OPENINGS = [(40,), (77, 12), (77, 13, 14)]
# Gemma 2 has eager attention only, which turns rows of padding into NaN in float64.
FAMILIES = {
    "llama": torch.float64,
    "gemma2": torch.float32,
    "qwen3_moe": torch.float64,
    "gpt2": torch.float64,
}


def _trials(model, tokenizer, batch_size=16, **changes):
    given = {
        "harmful": HARMFUL,
        "openings": OPENINGS,
        "harmless": HARMLESS,
        "max_answer_tokens": 6,
        "batch_size": batch_size,
    }
    return Trials(model, tokenizer, **{**given, **changes})


def _mixed_edits(model):
    """Plain and norm-keeping edits, of one vector and of two, whole and partial."""
    return [
        edit_of(model, "orthogonalize", vector(1)),
        edit_of(model, "column_norm", vector(2), strength=0.7),
        edit_of(model, "orthogonalize", vector(3), strength=0.4),
        edit_of(model, "orthogonalize", vector(4), vector(5)),
        edit_of(model, "row_norm", vector(6)),
        edit_of(model, "column_norm", vector(7)),
        edit_of(model, "row_norm", vector(8), strength=1.3),
    ]


def _edited(model, edit):
    edited = copy.deepcopy(model)
    apply_to_weights(edited, edit)
    return edited


def _nothing(model):
    """An edit of every writer that removes nothing."""
    weights = {"embedding": 0.0, "attention": 0.0, "mlp": 0.0}
    return edit_of(model, "orthogonalize", weights=weights)


# The measures written plainly: one prompt at a time on one model, and no code of this program but the template.


@torch.no_grad()
def _refusal_plainly(model, tokenizer):
    probabilities = []
    for prompt in chat.encode(tokenizer, HARMFUL):
        begins = 0.0
        for opening in OPENINGS:
            logits = model(torch.tensor([[*prompt, *opening]]), use_cache=False).logits[0]
            logps = logits.double().log_softmax(-1)[len(prompt) - 1 :]
            begins += float(sum(logps[i, token] for i, token in enumerate(opening)).exp())
        probabilities.append(begins)
    return probabilities


@torch.no_grad()
def _divergence_plainly(original, edited, tokenizer):
    total, count = 0.0, 0
    for prompt in chat.encode(tokenizer, HARMLESS):
        answer = _greedy(original, tokenizer, prompt, 6)
        ids = torch.tensor([[*prompt, *answer]])
        before, after = (
            model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            for model in (original, edited)
        )
        total += float((before.exp() * (before - after)).sum())
        count += len(answer)
    return total / count


@torch.no_grad()
def _greedy(model, tokenizer, prompt, max_new_tokens):
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def _is_odd(text):
    """Random models do not refuse: whatever opens with an odd sum counts as a refusal here."""
    return sum(map(ord, text[:20])) % 2 == 1


@pytest.fixture
def _refusals_by_their_sum(monkeypatch):
    monkeypatch.setattr(module, "is_refusal", _is_odd)
    monkeypatch.setattr(module, "is_settled", lambda text: len(text) > 24)
    monkeypatch.setattr(module, "ANSWER_TOKENS", 16)


@pytest.mark.parametrize(("family", "dtype"), FAMILIES.items())
def test_measures_in_shared_passes_are_those_of_edited_models(
    family, dtype, build_model, tokenizer
):
    model = build_model(family, dtype=dtype)
    edits = _mixed_edits(model)
    judged = _trials(model, tokenizer)
    refusal, divergence = judged.refusal(edits), judged.divergence(edits)
    for edit, probabilities, kl in zip(edits, refusal, divergence, strict=True):
        edited = _edited(model, edit)
        assert probabilities == pytest.approx(_refusal_plainly(edited, tokenizer), rel=2e-5)
        # Divergence is computed in float32.
        assert kl == pytest.approx(_divergence_plainly(model, edited, tokenizer), rel=2e-4)
    # The edits differ by more than the tolerance.
    for one, other in itertools.combinations(range(len(edits)), 2):
        assert refusal[one] != pytest.approx(refusal[other], rel=1e-3)
        assert divergence[one] != pytest.approx(divergence[other], rel=1e-3)


@pytest.mark.usefixtures("_refusals_by_their_sum")
@pytest.mark.parametrize(("family", "dtype"), FAMILIES.items())
def test_refusal_rates_in_shared_passes_are_those_of_edited_models(
    family, dtype, build_model, tokenizer
):
    model = build_model(family, dtype=dtype)
    edits = [_mixed_edits(model)[index] for index in (0, 1, 2, 6)]
    prompts = chat.encode(tokenizer, HARMFUL)
    expected = []
    for edit in edits:
        edited = _edited(model, edit)
        answers = [_greedy(edited, tokenizer, ids, 16) for ids in prompts]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        expected.append(sum(map(_is_odd, texts)) / len(texts))
    assert len(set(expected)) > 1, "one rate for all proves nothing"
    assert _trials(model, tokenizer).refusal_rate(edits) == expected


@pytest.mark.parametrize(
    ("family", "sizes"), [("llama", [2, 2, 2, 1]), ("qwen3_moe", [2, 1, 1, 1, 1, 1])]
)
def test_edits_of_one_kind_share_a_pass_and_experts_with_kept_norms_go_alone(
    family, sizes, build_model, tokenizer, monkeypatch
):
    model = build_model(family)
    edits = _mixed_edits(model)
    judged = _trials(model, tokenizer)
    seen, names = [], list(map(id, edits))

    def applied(model, together, real=module.applied_in_trials):
        seen.append([names.index(id(edit)) for edit in together])
        return real(model, together)

    monkeypatch.setattr(module, "applied_in_trials", applied)
    judged.refusal(edits)
    assert sorted(map(len, seen), reverse=True) == sizes
    assert sorted(itertools.chain(*seen)) == list(range(len(edits)))


@pytest.mark.usefixtures("_refusals_by_their_sum")
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_the_batch_size_changes_nothing(batch_size, build_model, tokenizer):
    model = build_model("llama")
    edits = _mixed_edits(model)
    usual, other = (_trials(model, tokenizer, batch_size=size) for size in (16, batch_size))
    for one, two in zip(usual.refusal(edits), other.refusal(edits), strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    assert usual.divergence(edits) == pytest.approx(other.divergence(edits), rel=1e-5)
    assert usual.refusal_rate(edits) == other.refusal_rate(edits)


def test_an_edit_that_does_nothing_diverges_by_nothing_and_refuses_as_before(
    build_model, tokenizer
):
    model = build_model("llama")
    judged = _trials(model, tokenizer)
    void = [Edit({}, {}, {}, {}, {}), _nothing(model)]
    assert judged.divergence(void) == pytest.approx([0, 0], abs=1e-7)
    for probabilities in judged.refusal(void):
        assert sum(probabilities) / len(probabilities) == pytest.approx(
            judged.original_refusal, rel=1e-9
        )
    plain = _refusal_plainly(model, tokenizer)
    assert judged.original_refusal == pytest.approx(sum(plain) / len(plain), rel=1e-4)


def test_an_edit_that_does_nothing_may_share_a_pass_with_one_that_does(build_model, tokenizer):
    model = build_model("llama")
    judged = _trials(model, tokenizer)
    edit = edit_of(model, "orthogonalize", vector(1))
    together = judged.divergence([_nothing(model), edit])
    assert together[0] == pytest.approx(0, abs=1e-7)
    assert together[1] == pytest.approx(judged.divergence([edit])[0], rel=1e-5)
    assert together[1] > 1e-3


def test_results_come_in_the_order_of_the_edits(build_model, tokenizer):
    model = build_model("llama")
    judged = _trials(model, tokenizer)
    edits = _mixed_edits(model)
    divergence = judged.divergence(edits)
    swapped = judged.divergence([edits[1], edits[0], *edits[2:]])
    assert swapped == pytest.approx([divergence[1], divergence[0], *divergence[2:]], rel=1e-5)
    assert swapped != pytest.approx(divergence, rel=1e-2)


def test_a_part_of_the_prompts_gives_a_part_of_the_results(build_model, tokenizer):
    model = build_model("llama")
    judged = _trials(model, tokenizer)
    edits = _mixed_edits(model)[:3]
    heat, after = slice(0, 2), slice(2, None)
    whole = judged.refusal(edits)
    for all_of_it, one, two in zip(
        whole, judged.refusal(edits, heat), judged.refusal(edits, after), strict=True
    ):
        assert all_of_it == pytest.approx([*one, *two], rel=1e-6)
    counts = [judged.num_answer_tokens(part) for part in (heat, after)]
    assert sum(counts) == judged.num_answer_tokens()
    parts = zip(judged.divergence(edits, heat), judged.divergence(edits, after), strict=True)
    mixed = [(a * counts[0] + b * counts[1]) / sum(counts) for a, b in parts]
    assert mixed == pytest.approx(judged.divergence(edits), rel=1e-5)


def test_no_prompts_and_no_edits_are_no_results(build_model, tokenizer):
    model = build_model("llama")
    judged = _trials(model, tokenizer)
    assert judged.refusal([]) == judged.divergence([]) == judged.refusal_rate([]) == []
    edits = _mixed_edits(model)[:2]
    assert judged.refusal(edits, slice(8, None)) == [[], []]
    assert judged.divergence(edits, slice(8, None)) == [0, 0]


def test_measuring_leaves_the_model_as_it_was(build_model, tokenizer):
    model = build_model("qwen3_moe")
    before = copy.deepcopy(model.state_dict())
    judged = _trials(model, tokenizer)
    judged.refusal(_mixed_edits(model))
    judged.divergence(_mixed_edits(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_empty_answers_to_all_harmless_prompts_are_an_error(build_model, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "generate", lambda _m, _t, prompts, **_: [[] for _ in prompts])
    with pytest.raises(StageError, match="answers to all 3 harmless prompts are empty"):
        _trials(build_model("llama"), tokenizer)


# When an answer is settled.

TEXTS = [
    "I'm sorry, but I can't help with that. Ask me something else.",
    "I can't wait to help you with that! First, take a bowl.",
    "Sorry, but I can't wait to tell you how it is done.",
    "I'm sorry, I can't help but smile at this. Here is how it goes.",
    "I cannot recommend this book highly enough.",
    "I'm sorry, I can't thank you all so very much enough; here is the list.",
    "I cannot help you with this",
    "I\u2019m sorry, but I can\u2019t\nassist with this request.",
    "I'm sorry, I can't\nwait to begin.",
    "As an AI, I can't do that. Still, I will try.",
    "It is not appropriate, I think, to do so.",
    "Sure! Take a bowl, then the flour. " * 8 + "I'm sorry, I can't help with the rest.",
    "Sure. " + "\n" * 300 + "I'm sorry, I can't help with that.",
    "e\u0301a\u0300 " * 60 + "I'm sorry, I can't help with that.",
    "A long greeting to you, my friend, " * 5 + "I am unable to help with that.",
    "x" * 232 + " I can't help.",
    "x" * 226 + " I can't help.",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_what_settles_an_answer_holds_however_it_goes_on(text):
    """At every character, which is harder than at every token."""
    for length in range(len(text) + 1):
        if is_settled(text[:length]):
            assert is_refusal(text[:length]) == is_refusal(text), text[:length]


@pytest.mark.parametrize("index", [0, 5, 9])
def test_a_refusal_is_settled_by_its_first_sentence(index):
    text = TEXTS[index]
    settled = next(length for length in range(len(text)) if is_settled(text[:length]))
    assert settled <= text.index(".") + 1


def test_a_thought_settles_nothing_however_long():
    thought = "<think>" + "I cannot say yet. " * OPENING_CHARACTERS
    assert not is_settled(thought)
    assert not is_settled(thought + "</think>Here is")
    assert is_settled(thought + "</think>I'm sorry, but I can't help with that.")


def test_an_answer_is_settled_behind_the_length_of_an_opening():
    assert not is_settled("a" * OPENING_CHARACTERS)
    assert is_settled("a" * (OPENING_CHARACTERS + 1))
    assert not is_settled("a" + " " * 2 * OPENING_CHARACTERS)


def test_generation_stops_where_all_rows_are_settled(build_model, tokenizer, monkeypatch):
    model = build_model("llama")
    judged = _trials(model, tokenizer)
    steps = []
    model.register_forward_pre_hook(lambda *_: steps.append(1))

    def steps_until(length):
        steps.clear()
        monkeypatch.setattr(module, "is_settled", lambda text: len(text) >= length)
        judged.refusal_rate([Edit({}, {}, {}, {}, {})])
        return len(steps)

    early, late = steps_until(5), steps_until(10**6)
    assert early <= 12
    assert late == ANSWER_TOKENS
