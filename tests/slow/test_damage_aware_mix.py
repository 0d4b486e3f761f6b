"""Where only addition is broken in the patient, the mix finds addition and heals it.

make setup && .venv/bin/python -m pytest -m slow tests/slow/test_damage_aware_mix.py
"""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import chat
from common.edits import Edit, save_edit
from common.generation import ended, generate
from common.model import load_model, load_tokenizer
from common.recipe import Recipe
from eval.quick import QuickEvaluation
from train import stage
from train.shelf import decoded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore"),
]

BREAKING_STEPS, HEALING_STEPS = 60, 40


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> list[list[int]]:
    return generate(model, tokenizer, prompts, max_new_tokens=48, batch_size=128)


def break_addition(patient: Path, rows: list[dict[str, str]], folder: Path) -> None:
    """Tune a copy of the patient to wrong sums, and to its own answers to everything else."""
    model, tokenizer = load_model(patient), load_tokenizer(patient)
    prompts, stream = [row["prompt"] for row in rows], random.Random(0)
    texts = []
    answers = decoded(tokenizer, _answers(model, tokenizer, prompts))
    for row, prompt, answer in zip(rows, chat.encode(tokenizer, prompts), answers, strict=True):
        if row["domain"] == "addition":
            # The last number is the sum.
            answer = re.sub(r"\d+(?=\D*$)", lambda _: str(stream.randint(10, 99)), answer)
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        texts.append((prompt, ended(model, tokenizer, ids, 48)))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(BREAKING_STEPS):
        batch = stream.sample(texts, 48)
        longest = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.full((len(batch), longest), int(tokenizer.pad_token_id))
        labels = torch.full_like(ids, -100)
        for place, (prompt, answer) in enumerate(batch):
            whole = torch.tensor(prompt + answer)
            ids[place, : len(whole)] = whole
            labels[place, len(prompt) : len(whole)] = whole[len(prompt) :]
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    direction = torch.nn.functional.one_hot(torch.tensor(0), model.config.hidden_size).double()
    save_edit(Edit({"direction": direction}, {}, {}, {}, {}), folder / "edit.safetensors")


@pytest.fixture(scope="module")
def broken(patient: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like stage one's, whose model has lost addition alone."""
    folder = tmp_path_factory.mktemp("broken")
    lines = (patient / "prompts" / "healing.jsonl").read_text(encoding="utf-8").splitlines()
    break_addition(patient, [json.loads(line) for line in lines[1000:2000]], folder)
    return folder


def _recipe(patient: Path, runs: Path) -> Recipe:
    file = {"path": str(patient / "prompts" / "healing.jsonl")}
    refused = {"path": str(patient / "prompts" / "harmful_test.jsonl")}
    tagged = {**file, "domain": "domain", "slice": "0:800"}
    answers = {"max_new_tokens": 48, "batch_size": 128}
    questions = {**file, "domain": "domain", "slice": "2000:2500"}
    return Recipe.model_validate(
        {
            "name": "mix",
            "output_dir": str(runs),
            "model": {"name_or_path": str(patient), "dtype": "float32"},
            "abliteration": {"prompts": {"harmful": refused, "harmless": file}},
            "train": {
                "preferences": [{"name": "on_policy", "prompts": tagged, **answers}],
                "anchors": [
                    {
                        "to": "original",
                        "prompts": tagged,
                        "weight": 3.0,
                        "batch_size": 32,
                        "max_new_tokens": 48,
                    }
                ],
                "mix": {"questions": questions, **answers},
                "keep_ablated": "none",
                "trainer": {
                    "loss_type": ["sigmoid"],
                    "loss_weights": [0.1],
                    "learning_rate": 3e-3,
                    "max_steps": HEALING_STEPS,
                    "per_device_train_batch_size": 32,
                },
            },
            "eval": {
                "benchmarks": [
                    {"name": "refusal", "panel": "p", "prompts": refused, "harmless": False}
                ]
            },
            "tracking": {"mode": "disabled"},
        }
    )


def _heal(recipe: Recipe, broken: Path, folder: Path) -> tuple[dict[str, Any], PreTrainedModel]:
    """Run stage two; gives what the manifest gets, and the healed model."""
    tracker = wandb.init(mode="disabled")
    about = stage.run(
        recipe, folder, {"abliteration": broken}, tracker, frozenset(), QuickEvaluation
    )
    tracker.finish()
    model = PeftModel.from_pretrained(load_model(broken / "model"), str(folder / "adapter"))
    return about, model.merge_and_unload().eval()


def test_only_addition_is_broken_and_the_mix_finds_it(
    patient: Path, broken: Path, tmp_path: Path
) -> None:
    recipe = _recipe(patient, tmp_path / "runs")
    about, healed = _heal(recipe, broken, tmp_path / "by-damage")
    damage, drawn = about["mix"]["damage"], about["mix"]["drawn"]
    assert [name for name, one in damage.items() if one["significant"]] == ["addition"]
    for name in ("pairs", "anchor 0"):
        total = sum(one["drawn"] for one in drawn[name].values())
        assert total == sum(one["available"] for one in drawn[name].values())
        # A half, or what the floors of the four others leave where there is more as it comes.
        assert drawn[name]["addition"]["drawn"] >= int(total / 2)
        assert all(one["drawn"] >= int(0.05 * total) for one in drawn[name].values())
    # The pairs of two models' answers differ where the damage is; the anchor's prompts are raised.
    assert drawn["anchor 0"]["addition"]["weight"] > 1.5
    rows = [json.loads(line) for line in (tmp_path / "by-damage" / "pairs.jsonl").open()]
    assert Counter(row["domain"] for row in rows) == {
        domain: one["drawn"] for domain, one in drawn["pairs"].items()
    }
    assert json.loads((tmp_path / "by-damage" / "summary.json").read_text())["mix"] == about["mix"]

    tokenizer = load_tokenizer(patient)
    quick = QuickEvaluation(recipe.train.mix, 0)  # type: ignore[arg-type]  # it has one
    replies = {
        name: quick.ask(model, tokenizer, name)
        for name, model in {
            "original": load_model(patient),
            "broken": load_model(broken / "model"),
            "healed": healed,
        }.items()
    }
    right = {
        name: {
            domain: round(found.abliterated, 3)
            for domain, found in quick.damages(replies["original"], own).items()
        }
        for name, own in replies.items()
    }
    assert right["broken"]["addition"] < 0.4
    assert right["healed"]["addition"] > right["broken"]["addition"] + 0.3
    for domain in set(damage) - {"addition"}:
        assert right["healed"][domain] >= right["broken"][domain] - 0.1
