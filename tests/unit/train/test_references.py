"""What the reference says of a pair is computed once, whichever training asks, and never served for anything else.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_references.py
"""

import copy

import pytest
import torch
from datasets import Dataset

from tests.training import settings_of
from train.adapter import build_adapter
from train.references import References, pair_key
from train.trainer import HealingTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # trl's and torch's own


@pytest.fixture(scope="module")
def model(build_model):
    return build_model("llama", seed=0, dtype=torch.float32)


def _dataset(answers):
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"question {number}"}],
                "chosen": [{"role": "assistant", "content": answer}],
                "rejected": [{"role": "assistant", "content": f"no {number}"}],
            }
            for number, answer in enumerate(answers)
        ]
    )


ANSWERS = ["yes", "it is", "so it is and stays", "how it is", "why not"]


@pytest.fixture
def start(model, tokenizer, tmp_path, monkeypatch):
    """Make a trainer; gives it, and how many pairs the reference read for it."""

    def make(folder="references", *, answers=ANSWERS, r=4, seed=0, **settings):
        read = []
        original = HealingTrainer.compute_ref_log_probs

        def count(self, model, inputs):
            read.append(len(inputs["input_ids"]) // 2)
            return original(self, model, inputs)

        monkeypatch.setattr(HealingTrainer, "compute_ref_log_probs", count)
        torch.manual_seed(seed)
        trainer = HealingTrainer(
            model=copy.deepcopy(model),
            args=settings_of(
                tmp_path / "out",
                **{"per_device_train_batch_size": 2, "max_length": 64, "seed": seed, **settings},
            ),
            train_dataset=_dataset(answers),
            processing_class=tokenizer,
            peft_config=build_adapter({"r": r, "lora_alpha": 8}),
            references=References(tmp_path / folder),
        )
        monkeypatch.setattr(HealingTrainer, "compute_ref_log_probs", original)
        return trainer, sum(read)

    return make


def _logps(trainer):
    data = trainer.train_dataset
    return list(zip(data["ref_chosen_logps"], data["ref_rejected_logps"], strict=True))


def test_a_second_training_reads_nothing_whatever_it_trains_with(start):
    first, read = start()
    assert read == len(ANSWERS)
    again, read = start(r=8, seed=7, learning_rate=1e-2, beta=0.5, output_dir="elsewhere")
    assert read == 0
    assert _logps(again) == _logps(first)


def test_what_is_served_is_what_trl_computes(start, model, tokenizer):
    trainer, _ = start()
    again, _ = start(folder="another")
    batch = again.data_collator([again.train_dataset[index] for index in range(len(ANSWERS))])
    chosen, rejected = again.compute_ref_log_probs(again.model, batch)
    found = torch.tensor(_logps(trainer))
    torch.testing.assert_close(found, torch.stack([chosen, rejected], dim=1), rtol=0, atol=1e-4)


def test_only_new_pairs_are_read(start):
    start()
    changed = [*ANSWERS[:2], "another answer", *ANSWERS[3:], "one more"]
    trainer, read = start(answers=changed)
    assert read == 2
    fresh, _ = start(folder="another", answers=changed)
    torch.testing.assert_close(
        torch.tensor(_logps(trainer)), torch.tensor(_logps(fresh)), rtol=0, atol=1e-4
    )


def test_another_truncation_is_read_again(start):
    trainer, _ = start()
    longest = max(
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for row in trainer.train_dataset
    )
    _, read = start(max_length=longest)
    assert read == 0
    _, read = start(max_length=longest - 1)
    assert 0 < read < len(ANSWERS)


def test_half_a_file_is_never_read(tmp_path):
    references = References(tmp_path)
    references.add({"a": (1.0, 2.0)})
    (tmp_path / ".half.jsonl.123").write_text('{"pair": "b", "chos')
    assert references.read() == {"a": (1.0, 2.0)}


def test_the_key_sees_the_border_between_prompt_and_answer():
    one = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [3, 5]}
    other = {"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5]}
    assert pair_key(one, 10, "keep_start") != pair_key(other, 10, "keep_start")
    # What is cut off is not read, so it does not count.
    longer = {**one, "chosen_ids": [3, 4, 9, 9], "rejected_ids": [3, 5, 9]}
    assert pair_key(one, 4, "keep_start") == pair_key(longer, 4, "keep_start")
