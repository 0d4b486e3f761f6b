"""Several continuations in one row have the logits they have alone, and a mask that is wrong anywhere shows.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_branches.py
"""

import dataclasses
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from common import branches
from common.architecture import find_writers
from common.branches import (
    PADDING,
    PROMPT,
    Branches,
    Packed,
    continuation_logits,
    continuation_logps,
    pack,
    plan,
    read_prefix,
)
from common.edits import Edit, Removal
from common.hooks import applied_by_hooks, applied_in_trials
from tests.conftest import FAMILIES

PAD = 2
WINDOW = 16
CPU = torch.device("cpu")
# Window and kinds of layers where the defaults of a tiny model would leave a family's windows unused.
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
WINDOWS = {
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "qwen3_moe": {"sliding_window": WINDOW, "use_sliding_window": True},
    "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, **MIXED},
    "qwen2_moe": {"sliding_window": WINDOW, "use_sliding_window": True, **MIXED},
    "qwen3": {"sliding_window": WINDOW, "use_sliding_window": True, **MIXED},
    "smollm3": {"sliding_window": WINDOW, "use_sliding_window": True, **MIXED},
    "qwen2_5_vl": {"sliding_window": WINDOW, "use_sliding_window": True, **MIXED},
    "gemma2": MIXED,
    "gemma3_text": MIXED,
    "gemma3": MIXED,
    "olmo3": MIXED,
    "gpt_oss": MIXED,
}
NO_SDPA = ("gemma2", "gpt_oss")
CASES = [
    (family, implementation)
    for family in sorted(FAMILIES)
    for implementation in ("sdpa", "eager")
    if implementation == "eager" or family not in NO_SDPA
]


def _draw(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(260, (length,), generator=generator).tolist()


# Prompts longer and shorter than the window, one of a single token; a continuation longer than the window stands in
# front of others, so that a window counted by column would hide the prompt from them.
ROWS = [
    Branches(_draw(40, 1), [_draw(20, 2), _draw(3, 3), _draw(1, 4)]),
    Branches(_draw(1, 5), [_draw(2, 6), _draw(25, 7)]),
    Branches(_draw(9, 8), [_draw(1, 9)]),
    Branches(_draw(9, 10), [_draw(6, 11), _draw(6, 11), _draw(7, 12), _draw(2, 13)]),
]


@pytest.fixture
def make(build_model):
    def make(family="llama", implementation="sdpa", **changes):
        model = build_model(family, **{**WINDOWS.get(family, {}), **changes})
        model.set_attn_implementation(implementation)
        assert model.config.get_text_config()._attn_implementation == implementation
        return model

    return make


def _alone(model, rows=ROWS):
    """The logits of each continuation by the plainest call: one row, no padding, no mask, no positions."""
    found = []
    for row in rows:
        for continuation in row.continuations:
            ids = torch.tensor([[*row.prompt, *continuation]])
            found.append(model(input_ids=ids, use_cache=False).logits[0, len(row.prompt) - 1 : -1])
    return found


def _flat(by_row):
    return [part for row in by_row for part in row]


def _distance(found, expected):
    """The largest difference, as a fraction of the largest logit."""
    pairs = list(zip(found, expected, strict=True))
    assert all(one.shape == other.shape for one, other in pairs)
    largest = max(float(other.abs().max()) for _, other in pairs)
    return max(float((one - other).abs().max()) for one, other in pairs) / largest


def _packed_logits(model, rows=ROWS):
    """Packed whatever the plan says: mutations are to be seen in numbers."""
    logits = branches._logits(model, *branches._inputs(model, rows, PAD, "packed"))
    return list(logits.split([len(part) for row in rows for part in row.continuations]))


@pytest.mark.parametrize(("family", "implementation"), CASES)
@torch.no_grad()
def test_packed_continuations_have_the_logits_they_have_alone(
    make, family, implementation, in_float64_throughout
) -> None:
    model = make(family, implementation)
    assert plan(model) == "packed"
    found = _flat(continuation_logits(model, ROWS, PAD))
    assert _distance(found, _alone(model)) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(WINDOWS))
def test_the_windows_of_these_models_matter_for_these_rows(make, family) -> None:
    model = make(family, "eager")
    narrow = _alone(model)
    model.config.get_text_config().sliding_window = 200
    assert _distance(_alone(model), narrow) > 1e-3


@pytest.mark.parametrize("how", ["packed", "plain"])
@torch.no_grad()
def test_log_probabilities_are_those_of_the_tokens_themselves(make, how, monkeypatch) -> None:
    model = make()
    monkeypatch.setitem(branches._decided, model, {"sdpa": how})
    expected = [
        logits.log_softmax(-1)[range(len(ids)), ids]
        for logits, ids in zip(
            _alone(model), (ids for row in ROWS for ids in row.continuations), strict=True
        )
    ]
    by_row = continuation_logps(model, ROWS, PAD)
    assert [len(row) for row in by_row] == [len(row.continuations) for row in ROWS]
    for found, logps in zip(_flat(by_row), expected, strict=True):
        assert torch.allclose(found, logps, rtol=0, atol=1e-5)  # the norms compute in float32


@torch.no_grad()
def test_log_probabilities_of_half_precision_models_are_float32(make) -> None:
    model = make().to(torch.bfloat16)
    assert {part.dtype for part in _flat(continuation_logps(model, ROWS, PAD))} == {torch.float32}
    assert {part.dtype for part in _flat(continuation_logits(model, ROWS, PAD))} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_of_packed_rows_are_those_of_plain_ones(
    make, family, in_float64_throughout
) -> None:
    model = make(family, "eager" if family in NO_SDPA else "sdpa").train()
    gradients = []
    for how in ("packed", "plain"):
        model.zero_grad()
        branches._logps(model, *branches._inputs(model, ROWS, PAD, how)).sum().backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    for name, plain in gradients[1].items():
        assert float(plain.abs().max()) > 0, name
        assert float((gradients[0][name] - plain).abs().max() / plain.abs().max()) < 1e-10, name


def _sees_siblings(packed):
    one = torch.where(packed.branch_ids > PROMPT, 1, packed.branch_ids)
    return dataclasses.replace(packed, branch_ids=one)


def _positions_run_on(packed):
    columns = torch.arange(packed.position_ids.shape[1]).expand_as(packed.position_ids)
    return dataclasses.replace(packed, position_ids=columns)


def _positions_restart_one_late(packed):
    late = packed.position_ids + (packed.branch_ids > PROMPT).long()
    return dataclasses.replace(packed, position_ids=late)


@pytest.mark.parametrize(
    "mutation", [_sees_siblings, _positions_run_on, _positions_restart_one_late]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
@torch.no_grad()
def test_a_wrong_layout_shows_in_the_logits_and_makes_the_plan_plain(
    make, family, mutation, monkeypatch
) -> None:
    model = make(family, "eager")
    expected = _alone(model)

    def pack_wrongly(rows, pad_id, device):
        packed = pack(rows, pad_id, device)
        return mutation(packed) if any(len(row.continuations) > 1 for row in rows) else packed

    assert _distance(_packed_logits(model), expected) < 1e-6
    monkeypatch.setattr(branches, "pack", pack_wrongly)
    assert _distance(_packed_logits(model), expected) > 1e-3
    assert plan(model) == "plain"


@torch.no_grad()
def test_a_boolean_mask_under_eager_attention_shows(make, monkeypatch) -> None:
    model = make("llama", "eager")
    expected = _alone(model)
    monkeypatch.setattr(branches, "attention_masks", lambda _model, packed: packed.mask())
    assert _distance(_packed_logits(model), expected) > 1e-3
    assert plan(model) == "plain"


class _WindowByColumn(Packed):
    def mask(self, window=None):
        columns = torch.arange(self.position_ids.shape[1]).expand_as(self.position_ids)
        return dataclasses.replace(self, position_ids=columns)._mask(window)

    _mask = Packed.mask


class _NoWindow(Packed):
    def mask(self, window=None):
        return self._mask(None)

    _mask = Packed.mask


@pytest.mark.parametrize("mutant", [_WindowByColumn, _NoWindow])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "qwen2", "gpt_oss"])
@torch.no_grad()
def test_a_window_that_is_lost_or_counted_by_column_shows(
    make, family, mutant, monkeypatch
) -> None:
    model = make(family, "eager")
    expected = _alone(model)
    assert _distance(_packed_logits(model), expected) < 1e-6
    monkeypatch.setattr(branches, "Packed", mutant)
    assert _distance(_packed_logits(model), expected) > 1e-3
    assert plan(model) == "plain"


def test_a_row_is_laid_out_as_the_prompt_and_then_every_branch_from_its_last_token() -> None:
    rows = [Branches([1, 2, 3], [[4, 5], [6]]), Branches([7], [[8, 9]])]
    packed = pack(rows, PAD, CPU)
    assert packed.input_ids.tolist() == [[1, 2, 3, 4, 3], [7, 8, PAD, PAD, PAD]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert packed.branch_ids.tolist() == [[0, 0, 1, 1, 2], [1, 1, PADDING, PADDING, PADDING]]
    assert packed.targets[packed.places].tolist() == [4, 5, 6, 8, 9]
    assert [places.tolist() for places in packed.places] == [[0, 0, 0, 1, 1], [2, 3, 4, 0, 1]]
    assert [row.num_tokens for row in rows] == [5, 2]


def test_a_branch_sees_the_prompt_and_itself_up_to_each_token() -> None:
    packed = pack([Branches([1, 2, 3], [[4, 5], [6, 7]])], PAD, CPU)
    assert packed.mask()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    # A window of two holds a token and the one before it by position: the prompt's second for each branch.
    assert packed.mask(2)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


def test_no_token_and_no_padding_is_left_without_anything_to_see() -> None:
    mask = pack(ROWS, PAD, CPU).mask(1)
    assert bool(mask.any(dim=-1).all())


@pytest.mark.parametrize(("prompt", "continuations"), [([], [[1]]), ([1], []), ([1], [[2], []])])
def test_what_has_no_prediction_is_refused(prompt, continuations) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Branches(prompt, continuations)


@torch.no_grad()
def test_the_unembedding_runs_where_a_token_is_predicted_and_nowhere_else_in_one_pass(make) -> None:
    model = make()
    assert plan(model) == "packed"
    seen, passes = [], []
    model.lm_head.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[:-1]))
    model.model.register_forward_hook(lambda _m, _args, _out: passes.append(1))
    continuation_logps(model, ROWS, PAD)
    assert seen == [(sum(len(ids) for row in ROWS for ids in row.continuations),)]
    assert len(passes) == 1
    assert model(torch.tensor([[1, 2, 3]])).logits.shape[1] == 3  # nothing stays behind


@torch.no_grad()
def test_the_prompt_is_read_once_however_many_branches_it_has(make) -> None:
    model, read = make(), []
    assert plan(model) == "packed"
    model.model.embed_tokens.register_forward_hook(lambda _m, args, _out: read.append(args[0]))
    row = Branches(_draw(30, 1), [_draw(4, seed) for seed in range(5)])
    continuation_logps(model, [row], PAD)
    assert read[0].shape == (1, 29 + 5 * 4)


def _removal_everywhere(model, seed):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    removals = {writer.name: Removal(("direction",), (1.0,)) for writer in find_writers(model)}
    return Edit({"direction": vector / vector.norm()}, removals, {}, {}, {})


@pytest.mark.parametrize("how", ["packed", "plain"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "olmoe"])
@torch.no_grad()
def test_trials_of_edits_share_a_batch_in_the_order_of_its_rows(
    make, family, how, monkeypatch
) -> None:
    model = make(family)
    edits = [_removal_everywhere(model, seed) for seed in range(3)]
    monkeypatch.setitem(branches._decided, model, {"sdpa": how})
    apart = []
    for edit in edits:
        with applied_by_hooks(model, edit):
            apart += _flat(continuation_logps(model, ROWS, PAD))
    with applied_in_trials(model, edits):
        together = _flat(continuation_logps(model, ROWS * 3, PAD))
    assert _distance(together, apart) < 1e-6
    assert _distance(together, _flat(continuation_logps(model, ROWS, PAD)) * 3) > 1e-3


@torch.no_grad()
def test_the_plan_can_be_made_under_hooks_that_split_the_batch(make) -> None:
    model = make("gpt_oss", "eager")
    with applied_in_trials(model, [_removal_everywhere(model, seed) for seed in range(3)]):
        continuation_logps(model, ROWS[:1] * 3, PAD)
    assert plan(model) == "packed"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_adapter_and_gradient_checkpointing_change_nothing(
    make, family, in_float64_throughout
) -> None:
    model = make(family, "eager" if family in NO_SDPA else "sdpa")
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    ).double()
    adapted.enable_input_require_grads()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            adapted.activation_checkpointing_enable({"use_reentrant": False})
        adapted.train().zero_grad()
        logps = _flat(continuation_logps(adapted, ROWS, PAD))
        torch.cat(logps).sum().backward()
        found.append([weight.grad for weight in adapted.parameters() if weight.grad is not None])
    assert plan(adapted) == "packed"
    assert _distance(found[1], found[0]) < 1e-10
    with torch.no_grad():
        expected = [logits.logsumexp(-1) for logits in _alone(adapted)]
        logits = _flat(continuation_logits(adapted, ROWS, PAD))
    assert _distance([part.logsumexp(-1) for part in logits], expected) < 1e-10


def test_the_check_leaves_dropout_and_the_modes_of_the_modules_alone(make) -> None:
    model = make("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    model.lm_head.eval()
    assert plan(model) == "packed"
    assert model.training
    assert model.transformer.h[0].attn.training
    assert not model.lm_head.training


@torch.no_grad()
def test_the_check_reads_a_row_longer_than_the_window_and_only_once(make) -> None:
    model, lengths = make("mistral"), []
    model.model.embed_tokens.register_forward_hook(
        lambda _m, args, _out: lengths.append(args[0].shape[1])
    )
    plan(model)
    assert min(lengths) > WINDOW + 20
    assert len(lengths) == 3
    plan(model)
    assert len(lengths) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "olmoe"])
def test_rounding_alone_never_makes_a_plan_plain(build_model, family, dtype) -> None:
    assert plan(build_model(family, dtype=dtype)) == "packed"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_attn_implementation": "flash_attention_2"}, "flash_attention_2"),
        ({"sliding_window": 20000, "max_position_embeddings": 40000}, "20000 tokens"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ],
)
def test_a_model_that_cannot_be_packed_is_told_once_why(make, change, reason, caplog) -> None:
    model = make()
    for name, value in change.items():
        setattr(model.config, name, value)
    with caplog.at_level(logging.INFO, "common.branches"):
        assert [plan(model), plan(model)] == ["plain", "plain"]
    assert len(caplog.messages) == 1
    assert reason in caplog.messages[0]


def test_a_window_that_no_row_can_outgrow_is_none(make) -> None:
    assert plan(make("phi3", sliding_window=262144)) == "packed"


RECURRENT_OR_ALIBI = {
    "mamba": {"num_hidden_layers": 2, "hidden_size": 32, "state_size": 8},
    "bloom": {"n_layer": 2, "hidden_size": 32, "n_head": 4},
    "lfm2": {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
    },
}


@pytest.mark.parametrize("family", sorted(RECURRENT_OR_ALIBI))
@torch.no_grad()
def test_models_that_take_no_masks_have_the_same_results_in_plain_rows(family, caplog) -> None:
    torch.manual_seed(0)
    settings = {"vocab_size": 260, "initializer_range": 0.15, **RECURRENT_OR_ALIBI[family]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).double()
    model.eval()
    with caplog.at_level(logging.INFO, "common.branches"):
        found = _flat(continuation_logits(model, ROWS, PAD))
    ours = [record.message for record in caplog.records if record.name == "common.branches"]
    assert len(ours) == 1
    assert family in ours[0]
    assert _distance(found, _alone(model)) < 1e-6  # parts of these compute in float32


BEGINNING = _draw(30, 20)


@pytest.mark.parametrize(("family", "implementation"), CASES)
@torch.no_grad()
def test_rows_behind_a_prefix_have_the_logits_they_have_with_it(
    make, family, implementation, in_float64_throughout
) -> None:
    model = make(family, implementation)
    prefix = read_prefix(model, BEGINNING)
    assert prefix is not None
    whole = [Branches([*BEGINNING, *row.prompt], row.continuations) for row in ROWS]
    for _ in range(2):  # it can be used again
        found = _flat(continuation_logits(model, ROWS, PAD, prefix))
        assert _distance(found, _alone(model, whole)) < 1e-10


@torch.no_grad()
def test_a_prefix_is_read_once_for_all_rows(make) -> None:
    model, read = make(), []
    prefix = read_prefix(model, BEGINNING)
    model.model.embed_tokens.register_forward_hook(lambda _m, args, _out: read.append(args[0]))
    read_prefix(model, BEGINNING)
    continuation_logits(model, ROWS[1:2], PAD, prefix)
    assert [ids.shape for ids in read] == [(1, 30), (1, 27)]


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss"])
@torch.no_grad()
def test_a_window_that_does_not_reach_into_the_prefix_shows(make, family, monkeypatch) -> None:
    model = make(family, "eager")
    real = branches._sees_prefix
    monkeypatch.setattr(branches, "_sees_prefix", lambda packed, n, _window: real(packed, n, None))
    assert read_prefix(model, BEGINNING) is None


@torch.no_grad()
def test_positions_that_begin_anew_behind_a_prefix_show(make, monkeypatch) -> None:
    model = make()
    monkeypatch.setattr(branches, "replace", lambda packed, **_changes: packed)
    monkeypatch.setitem(branches._decided, model, {"sdpa": "packed"})
    assert read_prefix(model, BEGINNING) is None
