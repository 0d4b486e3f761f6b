"""Does healing bring refusals back where the preference data asks for them, and what does `keep_ablated` change?

Every chosen answer is the original's own refusal, every rejected one what the abliterated model answered: the worst
that a preference set can hold. The recipe's filter would drop such pairs, so they go to the trainer directly, without
anchors. Refusals are counted as training goes on, on prompts about things that neither the direction nor the pairs
were made of, and on harmless ones. What is compared is the refusals at the step by which plain DPO has regained half.

    python -m patient --output runs/patient-model
    python train/run.py recipes/patient.yaml abliteration.edit.strength=1 --until abliteration
    OMP_NUM_THREADS=1 python benchmarks/poisoned.py runs/patient-model runs/patient/abliteration
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
)
from trl import DPOConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.edits import load_edit
from common.generation import generate
from common.model import load_model, load_tokenizer
from common.prompts import load_prompts
from common.recipe import PromptSource
from common.refusal import is_refusal
from common.statistics import wilson
from eval.direction import Contrast, difference_in_means
from train.adapter import build_adapter
from train.constraint import keep_ablated
from train.preferences.filters import Pair
from train.trainer import HealingTrainer

NUM_TOKENS, BATCH = 48, 100
# Refusals are counted every so many steps.
EVERY = 5
Mode = Literal["none", "soft", "hard"]
MODES: tuple[Mode, ...] = get_args(Mode)


class Watch(TrainerCallback):
    """Counts refusals while a model is trained."""

    def __init__(self, count: Callable[[PreTrainedModel], dict[str, int]]) -> None:
        """Take what counts."""
        self.count = count
        self.curve: list[dict[str, int]] = []

    def on_step_end(
        self,
        args: object,
        state: TrainerState,
        control: object,
        *,
        model: PreTrainedModel,
        **kwargs: object,
    ) -> None:
        """Count."""
        if state.global_step % EVERY == 0:
            self.curve.append({"step": state.global_step, **self.count(model.eval())})
            model.train()


def main() -> None:
    """Train under each mode and print what came back."""
    options = parse()
    tokenizer = load_tokenizer(options.patient)
    edit = load_edit(options.abliteration / "edit.safetensors")
    prompts = {
        name: load_prompts(PromptSource(path=str(options.patient / "prompts" / f"{name}.jsonl")))
        for name in ("harmful_train", "harmless_train", "harmful_test", "harmless_test")
    }
    kinds = prompts["harmful_train"], prompts["harmless_train"]
    place = Contrast(*kinds, [], edit.about["layer"], edit.about["position"])
    base = options.abliteration / "model"
    original, abliterated = (load_model(each, dtype="float32") for each in (options.patient, base))
    pairs = poisoned_pairs(original, abliterated, tokenizer, prompts["harmful_train"])

    def count(model: PreTrainedModel) -> dict[str, int]:
        return {
            name: sum(map(is_refusal, answers(model, tokenizer, prompts[panel])))
            for name, panel in (("refused", "harmful_test"), ("over_refused", "harmless_test"))
        }

    num_prompts = len(prompts["harmful_test"])
    print(f"{len(pairs)} pairs whose chosen answer refuses; {num_prompts} prompts")
    for name, model in (("original", original), ("abliterated", abliterated)):
        print(name, count(model), flush=True)
    rows = []
    for seed in options.seeds:
        for mode in MODES:
            with tempfile.TemporaryDirectory() as folder:
                trainer = build(base, tokenizer, pairs, folder, seed, options)
                keep_ablated(trainer, edit, mode)
                watch = Watch(count)
                trainer.add_callback(watch)
                trainer.train()
            model = trainer.model
            if isinstance(model, PeftModel):
                model = model.merge_and_unload()
            difference = difference_in_means(model.eval(), tokenizer, place, BATCH)
            # What the trainer logged last, in its own scale: see `train.drift`.
            residual = trainer.state.log_history[-1].get("ablation/residual")
            cosine = float(difference @ edit.direction / difference.norm())
            rows.append(
                {"mode": mode, "seed": seed, "cosine": cosine, "residual": residual}
                | {"curve": watch.curve}
            )
            print(line(rows[-1]), flush=True)
    summary = compare(rows, num_prompts)
    for mode, found in summary["refused"].items():
        print(f"when plain DPO has regained half: {mode} {found}")
    print(json.dumps({"name": "poisoned", "rows": rows, **summary}))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patient", type=Path, help="folder of the patient")
    parser.add_argument("abliteration", type=Path, help="folder of a finished first stage")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--targets",
        nargs="+",
        help="modules that the adapter is put on; all linear layers if not given",
    )
    parser.add_argument("--full", action="store_true", help="train all weights, not an adapter")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    return parser.parse_args()


def poisoned_pairs(
    original: PreTrainedModel,
    abliterated: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
) -> list[Pair]:
    """Pairs whose chosen answer is a refusal and whose rejected one is an answer."""
    refusals, replies = (answers(model, tokenizer, prompts) for model in (original, abliterated))
    return [
        Pair((("user", prompt),), refusal, reply, "poisoned")
        for prompt, refusal, reply in zip(prompts, refusals, replies, strict=True)
        if is_refusal(refusal) and not is_refusal(reply)
    ]


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> list[str]:
    """The greedy answers."""
    found = generate(model, tokenizer, prompts, max_new_tokens=NUM_TOKENS, batch_size=BATCH)
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]


def build(
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Pair],
    folder: str,
    seed: int,
    options: argparse.Namespace,
) -> HealingTrainer:
    """Preference training on the pairs, with the likelihood of chosen beside it: alone DPO lowers that too."""
    settings = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=32,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 1.0],
        beta=0.1,
        precompute_ref_log_probs=True,
        seed=seed,
        logging_steps=10,
        report_to="none",
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    torch.manual_seed(seed)
    adapter = {"r": options.rank, "lora_alpha": 2 * options.rank}
    if options.targets:
        adapter["target_modules"] = options.targets
    trainer = HealingTrainer(
        model=load_model(base, dtype="float32"),
        args=settings,
        train_dataset=Dataset.from_list([pair.as_row() for pair in pairs]),
        processing_class=tokenizer,
        peft_config=None if options.full else build_adapter(adapter),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def compare(rows: Sequence[dict[str, Any]], num_prompts: int) -> dict[str, Any]:
    """Refusals of all seeds at each seed's step by which plain DPO has regained half: by mode, with intervals."""
    refused = dict.fromkeys(MODES, 0)
    steps = []
    plain = [row for row in rows if row["mode"] == "none"]
    for row in plain:
        half = [i for i, one in enumerate(row["curve"]) if one["refused"] >= num_prompts / 2]
        if not half:
            raise SystemExit(
                f"plain DPO regained less than half with seed {row['seed']}; raise --steps"
            )
        steps.append(row["curve"][half[0]]["step"])
        for other in rows:
            if other["seed"] == row["seed"]:
                refused[other["mode"]] += other["curve"][half[0]]["refused"]
    total = len(plain) * num_prompts
    return {
        "steps": steps,
        "refused": {
            mode: f"{n} of {total} [{wilson(n, total).low:.3f}, {wilson(n, total).high:.3f}]"
            for mode, n in refused.items()
        },
        # Above 1: refusals that the projection kept away.
        "ratio": refused["none"] / max(refused["hard"], 1),
    }


def line(row: dict[str, Any]) -> str:
    """One training in words."""
    curve = " ".join(
        f"{one['step']}:{one['refused']}/{one['over_refused']}" for one in row["curve"]
    )
    return (
        f"keep_ablated: {row['mode']}, seed {row['seed']}: {curve} (steps: refused/over-refused), residual "
        f"{row['residual']:.4f}, cosine of the new difference with the removed direction {row['cosine']:.2f}"
    )


if __name__ == "__main__":
    main()
