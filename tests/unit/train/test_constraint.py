"""Healing that is held to the ablation adds nothing along the removed direction, whatever the steps.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_constraint.py
"""

import copy
import math
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model

from common.architecture import find_writers
from common.edits import Removal, apply_to_weights, component_along
from common.errors import StageError
from common.hooks import add_for_good
from common.recipe import Recipe
from tests.editing import edit_of
from train import constraint
from train.adapter import build_adapter
from train.constraint import (
    KeepAblated,
    find_drifts,
    hold_norms,
)
from train.drift import lora_drifts, residual
from train.launch import Strategy

DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
OTHER = torch.randn(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
# With a norm behind the writers, on both sides; with weights stored the other way round; through PEFT.
FAMILIES = ["llama", "gemma3_text", "olmo2", "gpt2"]
EXPERTS = ["qwen3_moe", "gpt_oss"]  # [experts, d_model, d_in]; [experts, d_in, d_model] with biases
TARGETS = {
    "gpt2": ["wte", "wpe", "c_proj", "c_attn", "c_fc"],
    "qwen3_moe": ["embed_tokens", "o_proj", "q_proj"],
    "gpt_oss": ["embed_tokens", "o_proj", "q_proj"],
}
PLAIN_TARGETS = ["embed_tokens", "o_proj", "down_proj", "q_proj", "gate_proj"]
KINDS = {
    "biprojected": {},
    "column_norm": {},
    "row_norm": {"strength": 0.7},
    "orthogonalize": {"weights": {"attention": [1.0, 0.0, 0.5], "mlp": 0.0}},
}
# float32 weights of size 0.3: what rounding alone leaves, with room for the sum over 32 rows.
ROUNDING = 1e-6


@pytest.fixture
def abliterated(build_model):
    """Make an edited model in float32, with its edit."""

    def make(family, kind="orthogonalize", vectors=(DIRECTION,), settings=None, **changes):
        model = build_model(family, dtype=torch.float32, **changes)
        edit = edit_of(model, kind, *vectors, **(settings or {}))
        apply_to_weights(model, edit)
        return model, edit

    return make


def _drifts(model, edit):
    """What training adds to a model, and nothing else."""
    drifts, problems = find_drifts(model, edit)
    assert not problems
    return drifts


def _train(model, drifts):
    """Adam steps with weight decay on random batches; the callback acts after each, as in the trainer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.1)
    callback = KeepAblated(drifts)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        ids = torch.randint(3, 280, (2, 8), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        callback.on_optimizer_step(None, None, None)
        optimizer.zero_grad()


def _added_along(healed, before, edit):
    """The largest |u^T (W_healed - W_abliterated)| and the largest change at all, over writers and biases."""
    originals = {writer.name: writer for writer in find_writers(before)}
    along, change = [], []
    for writer in find_writers(healed):
        if writer.name not in edit.removals:
            continue
        basis, original = edit.basis(writer.name), originals[writer.name]
        difference = writer.weight.detach().double() - original.weight.detach().double()
        along.append(component_along(difference, basis, writer.layout).abs().max())
        change.append(difference.abs().max())
        if writer.bias is not None:
            difference = (writer.bias - original.bias).detach().double()
            along.append((difference @ basis.T).abs().max())
    return float(max(along)), float(min(change))


def _heal_with_adapter(model, edit, hold, **settings):
    torch.manual_seed(0)  # the adapter's initial values
    peft_model = get_peft_model(
        copy.deepcopy(model), build_adapter({"r": 4, "lora_alpha": 8, **settings})
    )
    _train(peft_model, _drifts(peft_model, edit) if hold else [])
    return peft_model.merge_and_unload()


def _heal_fully(model, edit, hold):
    healed = copy.deepcopy(model)
    if hold:
        hold_norms(healed, edit)
    _train(healed, _drifts(healed, edit) if hold else [])
    return healed


def _require_held(heal, model, edit):
    """Held healing adds nothing along the removed vectors and does heal; free healing adds along them."""
    along, change = _added_along(heal(model, edit, True), model, edit)
    assert along < ROUNDING
    assert change > 1e-2, "nothing was healed"
    assert _added_along(heal(model, edit, False), model, edit)[0] > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_adds_nothing_along_the_direction(family, abliterated):
    targets = TARGETS.get(family, PLAIN_TARGETS)

    def heal(model, edit, hold):
        return _heal_with_adapter(model, edit, hold, target_modules=targets)

    _require_held(heal, *abliterated(family))


@pytest.mark.parametrize("family", EXPERTS)
def test_an_adapter_on_experts_adds_nothing_along_the_direction(family, abliterated):
    settings = {
        "target_modules": TARGETS[family],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    # Dense blocks among sparse ones are named otherwise.
    model, edit = abliterated(family, **({"mlp_only_layers": []} if "moe" in family else {}))
    _require_held(lambda *given: _heal_with_adapter(*given, **settings), model, edit)


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_full_training_adds_nothing_along_the_direction(family, abliterated):
    _require_held(_heal_fully, *abliterated(family))


@pytest.mark.parametrize("heal", [_heal_with_adapter, _heal_fully], ids=["adapter", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_healing_is_held_whatever_the_kind_of_edit(kind, heal, abliterated):
    model, edit = abliterated("llama", kind, settings=KINDS[kind], attention_bias=True)
    held = heal(model, edit, True)
    assert _added_along(held, model, edit)[0] < ROUNDING
    assert _added_along(heal(model, edit, False), model, edit)[0] > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("heal", [_heal_with_adapter, _heal_fully], ids=["adapter", "full"])
def test_every_one_of_several_directions_is_held(heal, family, abliterated):
    model, edit = abliterated(family, vectors=(DIRECTION, OTHER))
    writer = next(name for name in edit.removals if name.endswith("1.self_attn.o_proj"))
    assert len(edit.basis(writer)) == 2
    assert _added_along(heal(model, edit, True), model, edit)[0] < ROUNDING
    # That of the first alone would not do.
    first = dict.fromkeys(edit.removals, Removal(("direction",), (1.0,)))
    one = type(edit)(edit.vectors, first, {}, edit.left_alone, edit.about)
    held = heal(model, one, True)
    assert _added_along(held, model, one)[0] < ROUNDING
    assert _added_along(held, model, edit)[0] > 1e-2


def test_a_writer_that_was_not_edited_is_held_too(abliterated):
    settings = {"weights": {"mlp": [1.0, 0.0, 1.0]}}
    model, edit = abliterated("llama", settings=settings)
    name = "model.layers.1.mlp.down_proj"
    assert edit.removals[name].is_void
    weight = model.get_submodule(name).weight
    assert component_along(weight, edit.basis(name), "linear").abs().max() > 1e-2, "it was edited"
    for heal in (_heal_with_adapter, _heal_fully):
        moved = heal(model, edit, True).get_submodule(name).weight - weight
        assert moved.abs().max() > 1e-2
        assert component_along(moved, edit.basis(name), "linear").abs().max() < ROUNDING


@pytest.mark.parametrize("heal", [_heal_with_adapter, _heal_fully], ids=["adapter", "full"])
def test_an_edit_that_only_adds_holds_nothing_back(heal, build_model):
    model = build_model("llama", dtype=torch.float32)
    edit = edit_of(model, "add", DIRECTION)
    add_for_good(model, edit)
    held, free = (heal(model, edit, hold) for hold in (True, False))
    for name, weight in free.state_dict().items():
        assert torch.equal(held.state_dict()[name], weight), name


def test_every_adapted_writer_is_held(abliterated):
    model, edit = abliterated("llama")
    peft_model = get_peft_model(model, build_adapter({"r": 4}))
    assert len(_drifts(peft_model, edit)) == 6
    assert "model.embed_tokens" in edit.removals


def test_an_adapter_with_biases_and_rank_stabilized_scaling_is_held_too(abliterated):
    # peft merges a bias of the adapter only into one that is there.
    model, edit = abliterated("llama", attention_bias=True, mlp_bias=True)
    settings = {"lora_bias": True, "use_rslora": True, "target_modules": ["o_proj", "down_proj"]}
    healed = _heal_with_adapter(model, edit, True, **settings)
    assert _added_along(healed, model, edit)[0] < ROUNDING
    bias = healed.model.layers[1].mlp.down_proj.bias - model.model.layers[1].mlp.down_proj.bias
    assert bias.abs().max() > 1e-3
    free = _heal_with_adapter(model, edit, False, **settings)
    assert _added_along(free, model, edit)[0] > 1e-2


def test_biases_of_writers_are_held_in_full_training(abliterated):
    model, edit = abliterated("llama", attention_bias=True, mlp_bias=True)
    held, free = (_heal_fully(model, edit, hold) for hold in (True, False))
    bias = model.model.layers[1].mlp.down_proj.bias
    moved = held.model.layers[1].mlp.down_proj.bias - bias
    assert moved.abs().max() > 1e-3
    assert abs(float(moved.detach().double() @ edit.direction)) < ROUNDING
    loose = free.model.layers[1].mlp.down_proj.bias - bias
    assert abs(float(loose.detach().double() @ edit.direction)) > 1e-3


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2"])
def test_the_norms_behind_writers_stay_as_they_were(family, abliterated):
    model, edit = abliterated(family)
    healed = _heal_fully(model, edit, True)
    for before, after in zip(find_writers(model)[1:], find_writers(healed)[1:], strict=True):
        assert torch.equal(before.post_norm_gain, after.post_norm_gain)
    # Other norms are trained.
    assert not torch.equal(model.model.norm.weight, healed.model.norm.weight)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
def test_the_stream_of_a_healed_model_has_no_component_along_the_direction(
    family, abliterated, read_stream
):
    model, edit = abliterated(family)
    ids = torch.tensor([[0, 40, 41, 99, 120, 7, 200]])
    healed = _heal_with_adapter(model, edit, True)
    for stream in read_stream(healed, ids):
        reach = (stream.double() @ edit.direction).abs().max() / stream.double().norm(dim=-1).max()
        assert reach < 1e-5


def test_a_half_edit_keeps_the_half_it_left(abliterated):
    model, edit = abliterated("llama", settings={"strength": 0.5})
    healed = _heal_fully(model, edit, True)
    assert _added_along(healed, model, edit)[0] < ROUNDING
    weight = healed.model.layers[0].mlp.down_proj.weight
    assert component_along(weight, edit.direction[None], "linear").abs().max() > 1e-2


@pytest.mark.parametrize(
    "module", ["embed_tokens", "o_proj", "self_attn", "mlp", "post_attention_layernorm"]
)
def test_a_whole_module_that_could_bring_the_direction_back_is_refused(module, abliterated):
    model, edit = abliterated("olmo2")
    # What is trained whole must not be targeted as well.
    targets = ["gate_proj"] if module == "self_attn" else ["q_proj"]
    config = LoraConfig(target_modules=targets, modules_to_save=[module], task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    _, problems = lora_drifts(peft_model, edit)
    assert re.match(rf"the adapter trains .*{module}", problems[0])


def test_whole_modules_that_write_nowhere_are_allowed(abliterated):
    model, edit = abliterated("llama")
    config = LoraConfig(
        target_modules=["o_proj"],
        modules_to_save=["q_proj", "input_layernorm"],
        task_type="CAUSAL_LM",
    )
    assert len(_drifts(get_peft_model(model, config), edit)) == 3


def test_trained_embedding_rows_are_refused(abliterated):
    model, edit = abliterated("llama")
    config = LoraConfig(
        target_modules=["q_proj"], trainable_token_indices=[5, 6], task_type="CAUSAL_LM"
    )
    _, problems = lora_drifts(get_peft_model(model, config), edit)
    assert "embed_tokens" in problems[0]


def test_dora_on_a_writer_is_refused(abliterated):
    model, edit = abliterated("llama")
    config = LoraConfig(target_modules=["o_proj"], use_dora=True, task_type="CAUSAL_LM")
    _, problems = lora_drifts(get_peft_model(model, config), edit)
    assert re.match(r"DoRA .*train\.adapter\.use_dora to false", problems[0])


def test_dora_elsewhere_is_allowed(abliterated):
    model, edit = abliterated("llama")
    config = LoraConfig(target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    assert _drifts(get_peft_model(model, config), edit) == []


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_default_adapter_can_be_held_on_experts(family, abliterated):
    model, edit = abliterated(family)
    assert _drifts(get_peft_model(model, build_adapter({"r": 4})), edit)


def test_an_adapter_on_what_experts_read_alone_is_allowed(abliterated):
    model, edit = abliterated("mixtral")
    config = LoraConfig(
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj"],
        task_type="CAUSAL_LM",
    )
    assert _drifts(get_peft_model(model, config), edit) == []


@pytest.mark.parametrize(
    ("family", "parameter"),
    [
        ("gpt_oss", "mlp.experts.down_proj_bias"),
        ("gpt2", "mlp.c_proj.weight"),
        ("llama", "embed_tokens.weight"),
    ],
)
def test_an_adapter_on_a_parameter_that_peft_reads_the_other_way_is_refused(
    family, parameter, abliterated
):
    model, edit = abliterated(family)
    config = LoraConfig(target_modules=[], target_parameters=[parameter], task_type="CAUSAL_LM")
    _, problems = lora_drifts(get_peft_model(model, config), edit)
    assert "which no projection can hold" in problems[0]


def test_experts_of_a_layout_that_peft_takes_for_another_are_refused(abliterated):
    model, edit = abliterated("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.experts.is_transposed = False
    config = LoraConfig(
        target_modules=[], target_parameters=["mlp.experts.down_proj"], task_type="CAUSAL_LM"
    )
    _, problems = lora_drifts(get_peft_model(model, config), edit)
    assert "mlp.experts" in problems[0]


def _replace_parameters(model, make):
    """Put new parameters in the place of the trained ones, as sharding does when training starts."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(make(parameter.detach().clone())))


@pytest.mark.parametrize("adapter", [True, False])
def test_parameters_that_were_replaced_after_the_start_are_projected(adapter, abliterated):
    model, edit = abliterated("llama", attention_bias=True, mlp_bias=True)
    held = copy.deepcopy(model)
    if adapter:
        targets = ["embed_tokens", "o_proj", "down_proj"]
        held = get_peft_model(held, build_adapter({"r": 4, "target_modules": targets}))
    drifts = _drifts(held, edit)
    _replace_parameters(held, lambda parameter: parameter)
    _train(held, drifts)
    healed = held.merge_and_unload() if adapter else held
    along, change = _added_along(healed, model, edit)
    assert along < ROUNDING
    assert change > 1e-3


@pytest.mark.parametrize("adapter", [True, False])
def test_parameters_of_which_a_process_holds_a_part_are_refused(adapter, abliterated):
    model, edit = abliterated("llama")
    if adapter:
        model = get_peft_model(model, build_adapter({"r": 4}))
    drifts = _drifts(model, edit)
    _replace_parameters(model, lambda parameter: parameter.flatten()[: parameter.numel() // 2])
    with pytest.raises(StageError, match=r"cannot project sharded parameters .*FSDP 2"):
        KeepAblated(drifts).on_optimizer_step(None, None, None)
    assert math.isnan(residual(drifts)), "what is only watched stops nothing"


@pytest.fixture
def recipe_for(build_model, tokenizer, tmp_path):
    """A recipe over a model folder without weights."""

    def make(family="llama", **train):
        build_model(family).config.save_pretrained(tmp_path / family)
        source = {"path": str(tmp_path / "prompts.txt")}
        panel = {"name": "refusal", "panel": "p", "prompts": source, "harmless": True}
        return Recipe.model_validate(
            {
                "name": "mini",
                "model": {"name_or_path": str(tmp_path / family)},
                "abliteration": {
                    "prompts": {"harmful": source, "harmless": {**source, "slice": "1:"}}
                },
                "train": {"preferences": [{"name": "on_policy", "prompts": source}], **train},
                "eval": {"benchmarks": [panel]},
            }
        )

    return make


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"use_dora": True}, "DoRA rescales the rows of model.layers.0.self_attn.o_proj"),
        ({"modules_to_save": ["embed_tokens"]}, "the adapter trains .*embed_tokens"),
        ({"use_dora": True, "target_modules": ["q_proj", "v_proj"]}, None),
        ({}, None),
        (None, None),
    ],
)
def test_what_no_projection_can_hold_is_told_before_weights_are_loaded(
    adapter, message, recipe_for
):
    problems = constraint.check(recipe_for(adapter=adapter))
    if message is None:
        assert problems == []
    else:
        assert re.match(
            rf"train\.keep_ablated: {message}.*or set train.keep_ablated to none", problems[0]
        )
    assert constraint.check(recipe_for(adapter=adapter, keep_ablated="none")) == []


@pytest.mark.parametrize("family", ["llama", *EXPERTS, "gemma3"])
def test_the_check_says_what_training_would(family, recipe_for, abliterated):
    for adapter in ({"r": 4}, {"r": 4, "use_dora": True, "target_modules": ["o_proj"]}):
        model, edit = abliterated(family)
        _, due = find_drifts(get_peft_model(model, build_adapter(adapter)), edit)
        found = constraint.check(recipe_for(family, adapter=adapter))
        assert bool(found) == bool(due)
        assert all(due[0] in problem for problem in found)


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize(
    ("strategy", "refused"),
    [
        (Strategy("ZeRO-3", 2, True, True, True), True),
        (Strategy("FSDP1", 2, True, True, True), True),
        (Strategy("FSDP2", 2, True, True, True), False),
        (Strategy("ZeRO-2", 2, False, True, True), False),
        (Strategy("DDP", 2), False),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_launches_that_flatten_parameters_are_refused(
    strategy, refused, mode, recipe_for, monkeypatch
):
    monkeypatch.setattr(constraint, "launch_strategy", lambda: strategy)
    problems = constraint.check(recipe_for(keep_ablated=mode))
    assert bool(problems) == refused
    if refused:
        assert problems[0].startswith(f"train.keep_ablated: {mode} cannot see")
        assert strategy.name in problems[0]
    assert constraint.check(recipe_for(keep_ablated="none")) == []
