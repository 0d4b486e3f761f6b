"""The patient as GGUF: what rounding to a type costs, on its own answers.

Run: python -m pytest tests/unit/eval/test_gguf_patient.py
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import artifacts, chat
from common.divergence import answer_logits, kl_divergence
from common.generation import continue_rows
from common.model import load_config
from eval.gguf.reading import load
from eval.gguf.writer import write

pytest.importorskip("gguf", reason="the gguf package is an extra")


@pytest.fixture(scope="module")
def model(patient):
    return AutoModelForCausalLM.from_pretrained(patient).eval()


@pytest.fixture(scope="module")
def texts(patient, model):
    """Twenty prompts and the patient's greedy answers, as token ids."""
    tokenizer = AutoTokenizer.from_pretrained(patient, padding_side="left")
    files = [patient / "prompts" / f"{name}_test.jsonl" for name in ("harmless", "harmful")]
    rows = [row for file in files for row in artifacts.read_jsonl(file)[:10]]
    prompts = chat.encode(tokenizer, [row["prompt"] for row in rows])
    answers = continue_rows(model, tokenizer, prompts, max_new_tokens=40)
    return prompts, answers, tokenizer.pad_token_id


def logits_of(patient, texts, tmp_path, kind):
    write(patient, tmp_path / "m.gguf", kind, "patient")
    return answer_logits(load(tmp_path / "m.gguf", load_config(patient)), *texts)


def rounded(model, dtype):
    """The model with its matrices rounded to a type, in float32."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(weight.to(dtype).float())
    return model


def furthest(first, second):
    return float((torch.cat(first) - torch.cat(second)).abs().max())


def saved(model, patient, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(patient).save_pretrained(folder)
    return folder


def test_float16_holds_the_patient_within_a_thousandth_of_a_logit(
    patient, model, texts, tmp_path
) -> None:
    assert furthest(logits_of(patient, texts, tmp_path, "f16"), answer_logits(model, *texts)) == 0.0
    brainfloat = rounded(model, torch.bfloat16)
    found = logits_of(saved(brainfloat, patient, tmp_path / "bf16"), texts, tmp_path, "f16")
    assert furthest(found, answer_logits(brainfloat, *texts)) <= 1e-3


def test_of_weights_in_float32_the_rounding_of_matrices_is_all_that_float16_costs(
    patient, model, texts, tmp_path
) -> None:
    full = copy.deepcopy(model)
    with torch.no_grad():
        for weight in full.parameters():
            weight.mul_(1.0001)  # between two values of float16
    found = logits_of(saved(full, patient, tmp_path / "full"), texts, tmp_path, "f16")
    assert furthest(found, answer_logits(rounded(full, torch.float16), *texts)) == 0.0
    expected = answer_logits(full, *texts)
    # Up to one part in 2048 of each weight is lost, which may be more than a thousandth of a logit.
    assert 1e-4 < furthest(found, expected) < 0.05
    assert float(kl_divergence(torch.cat(expected), torch.cat(found)).max()) < 1e-4


def test_eight_bits_cost_less_than_a_hundredth_of_a_nat(patient, model, texts, tmp_path) -> None:
    found = torch.cat(logits_of(patient, texts, tmp_path, "q8_0"))
    kl = kl_divergence(torch.cat(answer_logits(model, *texts)), found)
    assert 0 < float(kl.mean()) < 0.01
    assert float(kl.max()) < 0.1
