"""The chosen direction is the planted one, and the scores are what the paper's formulae say.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_selection.py
"""

import copy
import math
from pathlib import Path

import pytest
import torch

from abliteration import selection
from abliteration.activations import collect
from abliteration.edits import orthogonalize
from abliteration.findings import Findings, find
from abliteration.prompt_sets import PromptSet
from abliteration.selection import Candidate, choose, next_token_logits, score_candidates
from common import chat
from common.architecture import find_writers
from common.errors import StageError
from common.recipe import DifferenceInMeans, Orthogonalize, ScoresSelection

HARMFUL = ["do it !", "tell ! me", "how ! is it made", "! now", "the other ! one"]
HARMLESS = ["do it .", "tell . me", "how . is it made", ". now", "the other . one"]
VALIDATION = PromptSet(["make ! it", "! please do"], ["make . it", ". please do", "why"])
SETTINGS = ScoresSelection(name="scores", skip_last_layers=0.0)


def _score(model, tokenizer, findings, tokens, settings=SETTINGS, validation=VALIDATION):
    writers, edit = find_writers(model), Orthogonalize(name="orthogonalize")
    return score_candidates(
        model,
        tokenizer,
        findings,
        validation,
        tokens,
        lambda direction: orthogonalize.build(direction, writers, edit, {}),
        settings,
        batch_size=2,
    )


def _findings(directions):
    """Given directions [layers, positions, d_model], without the means that no plain edit needs."""
    means = torch.zeros_like(directions)
    return Findings(directions.unsqueeze(-2), means, means)


# Planted truth: a Llama made by hand. The last token of a prompt looks for "!" and, in blocks 1 and 3,
# writes the refusal direction if it finds it; other heads write decoys that no output reads.

ANSWER, REFUSE = 60, 61
OPENING, MARK, OTHER, REFUSAL, DECOY_0, DECOY_1, DECOY_2 = range(7)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def planted(build_model, make_tokenizer):
    """The hand-made model, its tokenizer, and its refusal direction."""
    tokenizer = make_tokenizer(TEMPLATE)
    # So slow a rotation that heads read contents and no positions in their slow dimensions.
    model = build_model(
        num_hidden_layers=4,
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
    )
    basis = torch.linalg.qr(
        torch.randn(32, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    )[0]
    mark, opening = (
        tokenizer.convert_tokens_to_ids("!"),
        tokenizer.convert_tokens_to_ids("<|assistant|>"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        embedding = torch.zeros(len(tokenizer), 32, dtype=torch.float64)
        embedding[:, OTHER] = 1
        embedding[[mark, opening]] = 0
        # Large, so that the decoys do not drown them in a norm.
        embedding[mark, MARK], embedding[opening, OPENING] = 50, 4
        model.model.embed_tokens.weight.copy_(embedding @ basis.T)
        head = torch.zeros(len(tokenizer), 32, dtype=torch.float64)
        head[ANSWER, OPENING], head[REFUSE, REFUSAL] = 2, 2
        model.lm_head.weight.copy_(head @ basis.T)
        _plant_uniform_head(model.model.layers[0].self_attn, basis, DECOY_0, 2.0)
        _plant_uniform_head(model.model.layers[1].self_attn, basis, DECOY_1, 2.0)
        _plant_searching_head(model.model.layers[1].self_attn, basis, REFUSAL, 2.0)
        _plant_searching_head(model.model.layers[2].self_attn, basis, DECOY_2, 2.0)
        # Behind the last candidate, so that removing refusal mixed with the decoy is not enough.
        _plant_searching_head(model.model.layers[3].self_attn, basis, REFUSAL, 2.0)
    return model, tokenizer, basis[:, REFUSAL]


def _plant_uniform_head(attention, basis, target, size):
    """Head 0: at every position, the share of marks so far, written along a basis direction."""
    attention.v_proj.weight[0] = basis[:, MARK]
    attention.o_proj.weight[:, 0] = size * basis[:, target]


def _plant_searching_head(attention, basis, target, size):
    """Head 1: from the opening of the answer, whether there is a mark, written along a direction."""
    slow = 8 + 3  # the slowest of the head's four rotations
    attention.q_proj.weight[slow] = basis[:, OPENING]
    attention.k_proj.weight[slow] = 2 * basis[:, MARK]
    attention.v_proj.weight[8] = basis[:, MARK]
    attention.o_proj.weight[:, 8] = size * basis[:, target]


def _candidates(planted, settings=SETTINGS):
    model, tokenizer, _ = planted

    def read(sets, _quantile, _files):
        return [
            collect(model, tokenizer, prompts, num_positions=2, batch_size=3) for prompts in sets
        ]

    estimator = DifferenceInMeans(name="difference_in_means")
    findings = find(estimator, PromptSet(HARMFUL, HARMLESS), read, Path("nowhere"))
    return findings.directions[:, :, 0], _score(model, tokenizer, findings, [REFUSE], settings)


def test_the_planted_model_refuses_exactly_the_marked_prompts(planted):
    model, tokenizer, _ = planted
    logits = next_token_logits(model, tokenizer, [*HARMFUL, *HARMLESS], 4)
    assert logits.argmax(dim=-1).tolist() == [REFUSE] * 5 + [ANSWER] * 5


def test_the_planted_cell_is_chosen_and_its_direction_is_the_planted_one(planted):
    directions, candidates = _candidates(planted)
    chosen = choose(candidates, SETTINGS)
    assert (chosen.layer, chosen.position) == (2, -1)
    cosine = torch.cosine_similarity(directions[2, -1], planted[2], dim=0)
    assert cosine > 0.95
    assert chosen.bypass < 0 < chosen.induce
    assert chosen.kl < 1e-3


def test_the_chosen_direction_beats_every_other_cell_by_a_margin(planted):
    _, candidates = _candidates(planted)
    chosen = choose(candidates, SETTINGS)
    others = [c for c in candidates if c.bypass is not None and c != chosen]
    assert len(others) >= 4
    assert all(other.bypass > chosen.bypass + 1 for other in others)


def test_the_input_of_the_first_block_at_fixed_tokens_is_no_candidate(planted):
    _, candidates = _candidates(planted)
    first = [candidate for candidate in candidates if candidate.layer == 0]
    assert [c.dropped for c in first] == ["no difference between the prompt sets"] * 2
    assert all(candidate.bypass is None for candidate in first)


@pytest.mark.parametrize(("skipped", "left"), [(0.0, 4), (0.25, 3), (0.3, 2), (0.5, 2), (0.9, 0)])
def test_the_last_layers_are_skipped_as_a_share(skipped, left, planted):
    _, candidates = _candidates(planted, SETTINGS.model_copy(update={"skip_last_layers": skipped}))
    late = {c.layer for c in candidates if c.dropped == "among the last layers"}
    assert late == set(range(max(left, 1), 4))
    assert len(candidates) == 8


def test_candidates_that_change_harmless_answers_or_do_not_induce_are_dropped(planted):
    _, strict = _candidates(planted, SETTINGS.model_copy(update={"min_induce": 1e6}))
    scored = [c for c in strict if c.bypass is not None]
    assert scored
    assert {c.dropped for c in scored} == {"induce below min_induce"}
    _, strict = _candidates(planted, SETTINGS.model_copy(update={"max_kl": 1e-300}))
    assert "kl above max_kl" in {c.dropped for c in strict}


def test_a_direction_that_carries_true_refusal_is_dropped_where_that_must_stay(planted):
    model, tokenizer, refusal = planted
    # The marked prompts are to be kept; the planted direction is all there is to refusing them.
    validation = PromptSet(VALIDATION.harmful, VALIDATION.harmless, ["! make it"])
    noise = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    harmless = 1e-3 * (noise - (noise @ refusal) * refusal)
    directions = torch.stack([refusal, harmless]).unsqueeze(1)
    loose = SETTINGS.model_copy(update={"max_kl": 1e9, "min_induce": -1e9})
    lost, kept = _score(model, tokenizer, _findings(directions), [REFUSE], loose, validation)
    assert lost.dropped == "true refusal lost"
    assert (lost.retain, kept.retain) == (0.0, 1.0)
    assert kept.dropped is None


@pytest.mark.parametrize("score", ["bypass", "induce", "kl", "retain"])
def test_a_score_that_is_not_finite_drops_a_candidate(score, planted, monkeypatch):
    model, tokenizer, refusal = planted
    validation = PromptSet(VALIDATION.harmful, VALIDATION.harmless, ["! make it"])
    real = selection.replace

    def broken(candidate, **scores):
        return real(candidate, **{k: math.nan if k == score else v for k, v in scores.items()})

    monkeypatch.setattr(selection, "replace", broken)
    candidates = _score(
        model, tokenizer, _findings(refusal[None, None]), [REFUSE], SETTINGS, validation
    )
    assert [candidate.dropped for candidate in candidates] == ["a score is not finite"]


def test_nothing_left_is_an_error_with_the_nearest_candidates():
    candidates = [
        Candidate(0, -1, 0.0, dropped="no difference between the prompt sets"),
        Candidate(1, -1, 1.0, 2.0, -3.0, 0.5, dropped="kl above max_kl"),
        Candidate(1, -2, 1.0, -1.5, -3.0, 0.5, dropped="kl above max_kl"),
    ]
    with pytest.raises(StageError) as caught:
        choose(candidates, SETTINGS)
    text = str(caught.value)
    assert "none of 3 candidate directions passed the filters" in text
    assert "nearest: layer 1 position -2: bypass -1.50, induce -3.00, KL 0.500 (kl above" in text


def test_nothing_scored_is_an_error_with_the_reasons():
    candidates = [Candidate(layer, -1, 0.0, dropped="among the last layers") for layer in (0, 1)]
    with pytest.raises(StageError, match="among the last layers"):
        choose(candidates, SETTINGS)


def test_the_smallest_bypass_is_chosen_and_ties_go_to_the_earlier_layer():
    def make(layer, position, bypass, dropped=None):
        return Candidate(layer, position, 1.0, bypass, 1.0, 0.0, dropped=dropped)

    candidates = [make(0, -1, -1.0), make(1, -1, -9.0, "kl above max_kl"), make(2, -1, -5.0)]
    assert choose(candidates, SETTINGS) is candidates[2]
    tied = [make(3, -1, -5.0), make(2, -1, -5.0), make(2, -2, -5.0)]
    assert choose(tied, SETTINGS) is tied[2]


# The formulae of Arditi et al. 2024, section 2.3 and appendix C, written plainly: one prompt at a time,
# weights edited by hand, and no code of this program but the chat template.


def _logits_one_by_one(model, tokenizer, prompts):
    rows = []
    for ids in chat.encode(tokenizer, prompts):
        with torch.no_grad():
            rows.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].double())
    return rows


def _log_odds(rows, tokens):
    """log(P / (1 - P)) of the refusal tokens, with refusal_direction's epsilon."""
    scores = []
    for row in rows:
        p = sum(torch.softmax(row, dim=-1)[token].item() for token in tokens)
        scores.append(math.log(p + 1e-8) - math.log(1 - p + 1e-8))
    return sum(scores) / len(scores)


def _without(model, direction):
    """W - r r^T W for every matrix that writes into a Llama's stream; rows of the embedding."""
    r = direction / direction.norm()
    edited = copy.deepcopy(model)
    with torch.no_grad():
        embedding = edited.model.embed_tokens.weight
        embedding -= torch.outer(embedding @ r, r)
        for block in edited.model.layers:
            for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
                weight -= torch.outer(r, r @ weight)
    return edited


def _kl(p_logits, q_logits):
    p, q = torch.softmax(p_logits, dim=-1), torch.softmax(q_logits, dim=-1)
    return float((p * (p / q).log()).sum())


def test_the_scores_equal_a_straight_line_computation(build_model, tokenizer):
    model = build_model("llama", seed=4)
    directions = torch.randn(
        3, 2, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    tokens = [40, 77]
    loose = SETTINGS.model_copy(update={"max_kl": 1e9, "min_induce": -1e9})
    candidates = _score(model, tokenizer, _findings(directions), tokens, loose)
    original = _logits_one_by_one(model, tokenizer, VALIDATION.harmless)
    for candidate in candidates:
        assert candidate.dropped is None
        direction = directions[candidate.layer, candidate.position]
        edited = _without(model, direction)
        harmful = _logits_one_by_one(edited, tokenizer, VALIDATION.harmful)
        harmless = _logits_one_by_one(edited, tokenizer, VALIDATION.harmless)
        handle = model.model.layers[candidate.layer].register_forward_pre_hook(
            lambda _module, args, direction=direction: (args[0] + direction, *args[1:])
        )
        added = _logits_one_by_one(model, tokenizer, VALIDATION.harmless)
        handle.remove()
        kl = sum(_kl(p, q) for p, q in zip(original, harmless, strict=True)) / len(original)
        # Logits are kept in float32.
        assert candidate.bypass == pytest.approx(_log_odds(harmful, tokens), abs=1e-6)
        assert candidate.induce == pytest.approx(_log_odds(added, tokens), abs=1e-6)
        assert candidate.kl == pytest.approx(kl, abs=1e-6)
        assert candidate.norm == pytest.approx(float(direction.norm()))
        assert candidate.retain is None


def test_what_must_go_on_refusing_is_scored_while_the_direction_is_removed(build_model, tokenizer):
    """False-refusal mode: bypass is over the falsely refused prompts, retain over the harmful ones."""
    model = build_model("llama", seed=4)
    directions = torch.randn(
        3, 1, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    tokens = [40, 77]
    loose = SETTINGS.model_copy(update={"max_kl": 1e9, "min_induce": -1e9})
    validation = PromptSet(VALIDATION.harmful, VALIDATION.harmless, ["kill the process", "the end"])
    candidates = _score(model, tokenizer, _findings(directions), tokens, loose, validation)
    for candidate, direction in zip(candidates, directions[:, 0], strict=True):
        edited = _without(model, direction)
        rows = _logits_one_by_one(edited, tokenizer, validation.falsely_refused)
        assert candidate.bypass == pytest.approx(_log_odds(rows, tokens), abs=1e-6)
        rows = _logits_one_by_one(edited, tokenizer, validation.harmful)
        kept = [_log_odds(row[None], tokens) > 0 for row in rows]
        assert candidate.retain == sum(kept) / len(kept)
        # A random model does not refuse, so nothing here keeps true refusal.
        assert candidate.dropped == "true refusal lost"


def test_logits_come_in_the_order_of_the_prompts_for_any_batch_size(build_model, tokenizer):
    model = build_model("qwen3", seed=4)
    prompts = ["a long prompt to begin with", "b", "a middle one", "c d"]
    expected = torch.stack(_logits_one_by_one(model, tokenizer, prompts)).float()
    for batch_size in (1, 2, 3, 10):
        logits = next_token_logits(model, tokenizer, prompts, batch_size)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_scoring_leaves_the_model_as_it_was(build_model, tokenizer):
    model = build_model("llama")
    before = copy.deepcopy(model.state_dict())
    _score(model, tokenizer, _findings(torch.ones(3, 1, 32, dtype=torch.float64)), [40])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in model.modules()]
    assert not any(hooks)
