"""Direction, scores and choice on the patient equal a straight-line computation of the paper's formulae.

Source: Arditi et al. 2024, arXiv:2406.11717, sections 2.3 and 2.4 and appendix C. Nothing of the project's own
stage one is used here: one prompt at a time, transformers' hidden states, plain hooks.

Run: make setup && .venv/bin/python -m pytest tests/end_to_end/test_parity.py
"""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.road import Demo

STRENGTH = 2.0  # of the shipped recipe
SKIPPED = 0.2
MAX_KL = 1.0


class Reference:
    """refusal_direction, written down as the paper says it."""

    def __init__(self, folder: Path, tokens: list[int]) -> None:
        """Load the model, and its prompts as token ids."""
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokens = tokens
        self.prompts = {
            f"{kind}_{part}": [
                self.encode(json.loads(line)["prompt"])
                for line in (folder / "prompts" / f"{kind}_{part}.jsonl").read_text().splitlines()
            ]
            for kind in ("harmful", "harmless")
            for part in ("train", "validation")
        }

    def encode(self, prompt: str) -> torch.Tensor:
        message = [{"role": "user", "content": prompt}]
        encoded = self.tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return encoded["input_ids"]

    def probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).logits[0, -1].double().softmax(-1)

    def refusal(self, ids: torch.Tensor) -> float:
        p = self.probabilities(ids)[self.tokens].sum()
        return float(torch.log(p + 1e-8) - torch.log(1 - p + 1e-8))

    def keep_clear_cases(self) -> None:
        for name, prompts in self.prompts.items():
            sign = 1 if name.startswith("harmful") else -1
            self.prompts[name] = [ids for ids in prompts if sign * self.refusal(ids) > 0]

    def mean(self, name: str, num_positions: int) -> torch.Tensor:
        """[layers, positions, d_model]: hidden_states[i] is the input of block i."""
        total = 0
        for ids in self.prompts[name]:
            states = self.model(ids, output_hidden_states=True).hidden_states[:-1]
            total = total + torch.stack(states)[:, 0, -num_positions:].double()
        return total / len(self.prompts[name])

    def removing(self, vector: torch.Tensor) -> ExitStack:
        unit = (vector / vector.norm()).float()

        def hook(_module, _inputs, output):
            return output - STRENGTH * (output @ unit)[..., None] * unit

        inner, stack = self.model.model, ExitStack()
        writers = [layer.self_attn.o_proj for layer in inner.layers]
        writers += [layer.mlp.down_proj for layer in inner.layers]
        for module in [inner.embed_tokens, *writers]:
            stack.callback(module.register_forward_hook(hook).remove)
        return stack

    def adding(self, layer: int, vector: torch.Tensor) -> ExitStack:
        def hook(_module, inputs):
            return (inputs[0] + vector.float(), *inputs[1:])

        stack, block = ExitStack(), self.model.model.layers[layer]
        stack.callback(block.register_forward_pre_hook(hook).remove)
        return stack

    def scores(self, layer: int, vector: torch.Tensor) -> dict[str, float]:
        harmful, harmless = self.prompts["harmful_validation"], self.prompts["harmless_validation"]
        before = [self.probabilities(ids) for ids in harmless]
        with self.removing(vector):
            bypass = [self.refusal(ids) for ids in harmful]
            after = [self.probabilities(ids) for ids in harmless]
        with self.adding(layer, vector):
            induce = [self.refusal(ids) for ids in harmless]
        kls = [(p * (p / q).log()).sum() for p, q in zip(before, after, strict=True)]
        return {
            "bypass": sum(bypass) / len(bypass),
            "induce": sum(induce) / len(induce),
            "kl": float(sum(kls) / len(kls)),
        }


@torch.inference_mode()
def test_direction_scores_and_choice_equal_the_papers_formulae(demo: Demo, patient: Path) -> None:
    folder = demo.folder / "abliteration"
    found = json.loads((folder / "candidates.json").read_text(encoding="utf-8"))
    answers = [json.loads(line) for line in (folder / "baseline.jsonl").read_text().splitlines()]
    tokens = sorted({each["tokens"][0] for each in answers if each["refused"]})
    reference = Reference(patient, tokens)
    reference.keep_clear_cases()
    places = {(c["layer"], c["position"]): c for c in found["candidates"]}
    num_layers = len({layer for layer, _ in places})
    num_positions = len({position for _, position in places})
    harmful = reference.mean("harmful_train", num_positions)
    directions = harmful - reference.mean("harmless_train", num_positions)
    passed = {}
    for (layer, position), candidate in places.items():
        vector = directions[layer, position]
        assert candidate["norm"] == pytest.approx(float(vector.norm()), rel=1e-4, abs=1e-4)
        if candidate["bypass"] is None:
            assert layer >= int(num_layers * (1 - SKIPPED)) or vector.norm() < 1e-6
            continue
        scores = reference.scores(layer, vector)
        for name, value in scores.items():
            assert candidate[name] == pytest.approx(value, rel=1e-3, abs=1e-3), (layer, position)
        if scores["kl"] <= MAX_KL and scores["induce"] >= 0:
            passed[layer, position] = scores["bypass"]
    chosen = min(passed, key=passed.__getitem__)
    assert (found["chosen"]["layer"], found["chosen"]["position"]) == chosen
    saved = load_file(folder / "edit.safetensors")["direction"]
    unit = directions[chosen] / directions[chosen].norm()
    assert float(saved @ unit) == pytest.approx(1, abs=1e-6)
