"""Does healing bring refusals back where the preference data asks for them, and what does `keep_ablated` change?

Every chosen answer is the original's own refusal, every rejected one what the abliterated model answered: the worst
that a preference set can hold. The recipe's filter would drop such pairs, so they go to the trainer directly, without
anchors. Refusals are counted on prompts about things that neither the direction nor the pairs were made of.

    python -m patient --output runs/patient-model
    python train/run.py recipes/patient.yaml --until abliteration
    python benchmarks/poisoned.py runs/patient-model runs/patient/abliteration
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Literal, get_args

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import DPOConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.edits import Edit, load_edit
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
Mode = Literal["none", "soft", "hard"]
MODES: tuple[Mode, ...] = get_args(Mode)


def main() -> None:
    """Train under each mode and print what came back."""
    options = parse()
    tokenizer = load_tokenizer(options.patient)
    edit = load_edit(options.abliteration / "edit.safetensors")
    prompts = {
        name: load_prompts(PromptSource(path=str(options.patient / "prompts" / f"{name}.jsonl")))
        for name in ("harmful_train", "harmless_train", "harmful_test")
    }
    kinds = prompts["harmful_train"], prompts["harmless_train"]
    place = Contrast(*kinds, [], edit.about["layer"], edit.about["position"])
    original = load_model(options.patient, dtype="float32")
    base = options.abliteration / "model"
    abliterated = load_model(base, dtype="float32")
    pairs = poisoned_pairs(original, abliterated, tokenizer, prompts["harmful_train"])
    rows = []

    def report(shape: str, model: PreTrainedModel, residual: float | None) -> None:
        difference = difference_in_means(model, tokenizer, place, BATCH)
        row = {
            "shape": shape,
            **refusals(answers(model, tokenizer, prompts["harmful_test"])),
            "cosine": round(float(difference @ edit.direction / difference.norm()), 4),
            "norm": round(float(difference.norm()), 1),
            "residual": residual,
        }
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    print(f"{len(pairs)} pairs whose chosen answer refuses")
    report("original", original, None)
    report("abliterated", abliterated, None)
    for mode in MODES:
        with tempfile.TemporaryDirectory() as folder:
            model = load_model(base, dtype="float32")
            trainer = heal(model, tokenizer, edit, pairs, mode, folder, options)
        healed = trainer.model
        if isinstance(healed, PeftModel):
            healed = healed.merge_and_unload()
        # What the trainer logged last, in its own scale: see `train.drift`.
        report(
            f"keep_ablated: {mode}",
            healed.eval(),
            trainer.state.log_history[-1].get("ablation/residual"),
        )
    free, held = rows[-len(MODES)]["refused"], rows[-1]["refused"]
    # Above 1: refusals that the projection kept away.
    print(json.dumps({"name": "poisoned", "rows": rows, "ratio": free / max(held, 1)}))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patient", type=Path, help="folder of the patient")
    parser.add_argument("abliteration", type=Path, help="folder of a finished first stage")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--full", action="store_true", help="train all weights, not an adapter")
    parser.add_argument("--seed", type=int, default=0)
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


def refusals(texts: list[str]) -> dict[str, float]:
    """How many answers refuse, and the rate with its interval."""
    refused = sum(map(is_refusal, texts))
    interval = wilson(refused, len(texts))
    return {
        "refused": refused,
        "n": len(texts),
        "rate": round(interval.value, 4),
        "low": round(interval.low, 4),
        "high": round(interval.high, 4),
    }


def heal(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Edit,
    pairs: list[Pair],
    mode: Mode,
    folder: str,
    options: argparse.Namespace,
) -> HealingTrainer:
    """Preference training on the pairs, with the likelihood of chosen beside it: alone DPO lowers that too."""
    settings = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=32,
        max_steps=options.steps,
        learning_rate=options.learning_rate if not options.full else options.learning_rate / 10,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 1.0],
        beta=0.1,
        precompute_ref_log_probs=True,
        seed=options.seed,
        logging_steps=10,
        report_to="none",
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    torch.manual_seed(options.seed)
    trainer = HealingTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list([pair.as_row() for pair in pairs]),
        processing_class=tokenizer,
        peft_config=None if options.full else build_adapter({"r": 16, "lora_alpha": 32}),
    )
    trainer.remove_callback(PrinterCallback)
    keep_ablated(trainer, edit, mode)
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
