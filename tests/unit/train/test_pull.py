"""The pull measures what training did to the weights themselves.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_pull.py
"""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from train.pull import Distance

ADAPTERS = {
    "llama": {"target_modules": ["q_proj", "down_proj", "embed_tokens"]},
    "gpt2": {"target_modules": ["c_attn", "c_proj"]},
    "qwen3_moe": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    "gpt_oss": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
}


def _moved(model):
    """Every trained parameter somewhere else."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(noise, alpha=0.1)


def _squared_change(before, after):
    theirs = dict(before.named_parameters())
    return sum(
        (parameter - theirs[name]).square().sum() for name, parameter in after.named_parameters()
    )


@pytest.mark.parametrize("family", sorted(ADAPTERS))
def test_with_an_adapter_it_is_the_change_of_the_merged_weights(family, build_model):
    base = build_model(family)
    settings = LoraConfig(r=4, lora_alpha=12, use_rslora=family == "llama", **ADAPTERS[family])
    adapted = get_peft_model(copy.deepcopy(base), settings)
    distance = Distance(adapted)
    assert float(distance()) == 0
    _moved(adapted)
    found = distance()
    expected = _squared_change(base, copy.deepcopy(adapted).merge_and_unload())
    assert float(expected) > 1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_in_full_training_it_is_the_change_of_the_weights(build_model):
    model = build_model("llama")
    before = copy.deepcopy(model)
    distance = Distance(model)
    assert float(distance()) == 0
    _moved(model)
    torch.testing.assert_close(distance(), _squared_change(before, model), rtol=1e-9, atol=0)


def test_its_gradient_leads_back(build_model):
    model = build_model("llama")
    distance = Distance(model)
    start = copy.deepcopy(model)
    _moved(model)
    (0.5 * distance()).backward()
    theirs = dict(start.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, parameter.detach() - theirs[name].detach())


def test_whole_modules_that_are_trained_beside_an_adapter_count_as_well(build_model):
    settings = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    adapted = get_peft_model(build_model("llama"), settings)
    distance = Distance(adapted)
    with torch.no_grad():
        adapted.base_model.model.model.norm.modules_to_save["default"].weight.add_(1.0)
    assert float(distance()) == pytest.approx(32)
