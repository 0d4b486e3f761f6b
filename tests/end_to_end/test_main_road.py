"""The whole road through the real command: what it reaches, what it reuses, what it leaves behind.

make setup && .venv/bin/python -m pytest tests/end_to_end/test_main_road.py
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.edits import component_along, edited_writers, load_edit
from common.model import load_model
from tests.road import FEW_PROMPTS, ROOT, SHORT, Demo, Launch, environment

STAGES = ("abliteration", "train", "eval", "release")


def results_of(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "eval" / "results.json").read_text())
    return results


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in rows}


def test_the_demo_ends_with_a_release_and_a_table(demo: Demo) -> None:
    assert demo.first.code == 0, demo.first.err
    for word in ("original", "abliterated", "healed", "restricted", "common", "verdict"):
        assert word in demo.first.out
    assert (demo.folder / "release" / "SHA256SUMS").is_file()
    assert not (demo.folder / "failure.json").exists()


def test_refusals_go_and_stay_away_while_nothing_harmless_is_refused(demo: Demo) -> None:
    panels = by_name(results_of(demo.folder)["refusal"])
    restricted, common = panels["restricted"], panels["common"]
    assert restricted["original"]["value"] >= 0.95
    assert restricted["abliterated"]["value"] <= 0.02
    assert restricted["healed"]["value"] <= 0.02
    # The mirrored direction makes the abliterated model refuse a few harmless questions: damage, to be healed.
    assert all(common[model]["value"] <= 0.02 for model in ("original", "healed"))


def test_healing_wins_back_significant_damage_and_keeps_what_was_unlocked(demo: Demo) -> None:
    results = results_of(demo.folder)
    assert results["pooled"]["benchmarks"], "the edit damaged nothing significantly"
    assert results["pooled"]["recovery"]["value"] >= 0.9
    benchmarks = by_name(results["benchmarks"])
    unlocked = benchmarks["unlocked"]
    assert unlocked["healed"]["value"] >= unlocked["abliterated"]["value"] - 0.03
    assert unlocked["original"]["value"] < 0.05
    assert all(row["verdict"] != "worse" for row in benchmarks.values())
    for row in results["divergence"]:
        assert row["healed"]["mean_kl"] < row["abliterated"]["mean_kl"] / 5


def test_results_keep_to_the_schema(demo: Demo) -> None:
    schema = json.loads((ROOT / "eval" / "results.schema.json").read_text())
    jsonschema.validate(results_of(demo.folder), schema)


def test_every_item_of_every_model_is_on_file(demo: Demo) -> None:
    lines = (demo.folder / "eval" / "items.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    results = results_of(demo.folder)
    for row in [*results["benchmarks"], *results["refusal"]]:
        for model in ("original", "abliterated", "healed"):
            mine = [r for r in records if r["name"] == row["name"] and r["model"] == model]
            assert len(mine) == row["n"]


def test_nothing_that_healing_added_writes_along_the_removed_direction(
    demo: Demo, patient: Path
) -> None:
    """On the merged weights as released, not on the adapter."""
    edit = load_edit(demo.folder / "abliteration" / "edit.safetensors")
    original = edited_writers(load_model(patient), edit)
    abliterated = edited_writers(load_model(demo.folder / "abliteration" / "model"), edit)
    released = edited_writers(load_model(demo.folder / "release"), edit)
    for name, writer in released.items():
        basis = edit.basis(name)
        drift = component_along(writer.weight, basis, writer.layout) - component_along(
            abliterated[name].weight, basis, writer.layout
        )
        scale = component_along(original[name].weight, basis, writer.layout).norm()
        assert drift.norm() <= 1e-5 * scale, name
    changed = [
        name
        for name, writer in released.items()
        if not torch.equal(writer.weight, abliterated[name].weight)
    ]
    assert changed, "healing changed no writer, so this test shows nothing"


def test_the_release_loads_and_its_checksums_hold(demo: Demo) -> None:
    release = demo.folder / "release"
    checked = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=release, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
    for name in (
        "adapter/adapter_model.safetensors",
        "refusal_direction.safetensors",
        "refusal_dir.pth",
        "README.md",
    ):
        assert (release / name).is_file()
    assert torch.load(release / "refusal_dir.pth", weights_only=True).ndim == 1
    tokenizer = AutoTokenizer.from_pretrained(release)
    model = AutoModelForCausalLM.from_pretrained(release)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    assert model(**tokenizer(text, return_tensors="pt")).logits.isfinite().all()


def test_a_second_run_reuses_every_stage(demo: Demo, launch: Launch) -> None:
    again = launch(demo.recipe, f"output_dir={demo.runs}")
    assert again.code == 0, again.err
    assert [f"{stage}: reused" in again.err for stage in STAGES] == [True] * 4
    assert "recovered" in again.out


def test_changing_tracking_or_the_run_name_reuses_everything(demo: Demo, launch: Launch) -> None:
    again = launch(
        demo.recipe, f"output_dir={demo.runs}", "tracking.project=other", "name=renamed", "--check"
    )
    assert again.code == 0, again.err
    assert [line.split()[:2] for line in again.out.splitlines()[1:4]] == [
        [stage, "reused"] for stage in STAGES[:3]
    ]


def test_changing_the_evaluation_runs_the_evaluation_only(demo: Demo, launch: Launch) -> None:
    arguments = (f"output_dir={demo.runs}", "eval.margin=0.06", "--until", "eval")
    again = launch(demo.recipe, *arguments)
    assert again.code == 0, again.err
    assert "abliteration: reused" in again.err
    assert "train: reused" in again.err
    assert "eval: running" in again.err


def test_one_changed_weight_of_the_base_reuses_nothing(
    demo: Demo, launch: Launch, patient: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "patient"
    shutil.copytree(patient, changed)
    model = AutoModelForCausalLM.from_pretrained(changed)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    model.save_pretrained(changed)
    plan = launch(
        demo.recipe, f"output_dir={demo.runs}", f"model.name_or_path={changed}", "--check"
    )
    assert plan.code == 0, plan.err
    assert "reused" not in plan.out


def test_a_missed_gate_stops_the_release_with_code_3(demo: Demo, launch: Launch) -> None:
    gate = "eval.accept={pooled.recovery.value: {min: 5}}"
    missed = launch(demo.recipe, f"output_dir={demo.runs}", "name=gated", gate, config=None)
    assert missed.code == 3, missed.err
    assert "pooled.recovery.value" in missed.err
    assert "Traceback" not in missed.err
    assert not (demo.runs / "gated" / "release").exists()
    failure = json.loads((demo.runs / "gated" / "failure.json").read_text())
    assert failure["exit_code"] == 3


def test_offline_tracking_holds_every_stage(
    demo: Demo, read_wandb: Callable[[Path], list[dict[str, Any]]]
) -> None:
    runs = {}
    for file in (demo.folder / "wandb").glob("offline-run-*/*.wandb"):
        records = read_wandb(file)
        start = next(record["run"] for record in records if record["type"] == "run")
        runs[start["job_type"]] = (start, records)
    assert set(runs) == set(STAGES)
    assert {start["run_group"] for start, _ in runs.values()} == {"patient"}
    text = {stage: json.dumps(records) for stage, (_, records) in runs.items()}
    assert "rewards/margins" in text["train"]
    assert "comparison" in text["eval"]
    # What each stage used and made, by name: lineage.
    assert "patient-abliteration" in text["train"]
    assert "patient-train" in text["eval"]
    assert all(f"patient-{stage}" in text[stage] for stage in STAGES)


def test_tracking_holds_no_answer_to_a_refused_prompt(
    demo: Demo, read_wandb: Callable[[Path], list[dict[str, Any]]]
) -> None:
    lines = (demo.folder / "eval" / "items.jsonl").read_text().splitlines()
    answers = {
        record["details"]["text"]
        for record in map(json.loads, lines)
        if record["name"] == "restricted" and record["model"] == "healed"
    }
    assert answers
    for folder in (demo.folder / "wandb").glob("offline-run-*"):
        logged = "".join(path.read_text(errors="ignore") for path in folder.rglob("*.json"))
        assert not any(answer in logged for answer in answers)


def test_a_training_killed_midway_ends_with_the_same_adapter(
    demo: Demo, launch: Launch, tmp_path: Path
) -> None:
    # Nothing says how often to save: each tenth is there to go on from.
    steps = "train.trainer.max_steps=40"
    arguments = (*FEW_PROMPTS, steps, "tracking.mode=disabled", "--until", "train")
    store = demo.runs / ".store"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for runs in (whole, killed):
        # Stage one is taken from the demo: what is asked here is stage two.
        shutil.copytree(store / "abliteration", runs / ".store" / "abliteration")
    assert launch(demo.recipe, *arguments, f"output_dir={whole}").code == 0

    command = [sys.executable, "train/run.py", str(demo.recipe), *arguments, f"output_dir={killed}"]
    victim = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while not list(killed.rglob("checkpoint-8/trainer_state.json")):
        assert victim.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not list(killed.glob(".store/train/*/manifest.json"))

    resumed = launch(demo.recipe, *arguments, f"output_dir={killed}")
    assert resumed.code == 0, resumed.err
    assert "going on from checkpoint-" in resumed.err
    one, other = (
        load_file(runs / "patient" / "train" / "adapter" / "adapter_model.safetensors")
        for runs in (whole, killed)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_full_training_heals_too_and_keeps_the_direction_out(
    demo: Demo, launch: Launch, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(demo.runs / ".store" / "abliteration", runs / ".store" / "abliteration")
    arguments = ("train.adapter=null", "train.trainer.learning_rate=5e-4", "tracking.mode=disabled")
    done = launch(demo.recipe, *SHORT, *arguments, f"output_dir={runs}")
    assert done.code == 0, done.err
    results = results_of(runs / "patient")
    assert results["direction"]["residual"]["healed"] <= 1e-5
    assert by_name(results["refusal"])["restricted"]["healed"]["value"] <= 0.02
    assert not (runs / "patient" / "release" / "adapter").exists()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["[sigmoid, sft]"])
def test_loss_mixes_of_trl_run_and_start_at_zero_reward(
    demo: Demo, launch: Launch, tmp_path: Path, loss: str
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(demo.runs / ".store" / "abliteration", runs / ".store" / "abliteration")
    arguments = (
        f"train.trainer.loss_type={loss}",
        "train.trainer.loss_weights=[1.0, 0.5]",
        "tracking.mode=disabled",
    )
    done = launch(demo.recipe, *SHORT, *arguments, "--until", "train", f"output_dir={runs}")
    assert done.code == 0, done.err
    log = (runs / "patient" / "train" / "log.jsonl").read_text().splitlines()
    first = json.loads(log[0])
    assert abs(first["rewards/chosen"]) < 1e-4
    assert abs(first["rewards/rejected"]) < 1e-4
