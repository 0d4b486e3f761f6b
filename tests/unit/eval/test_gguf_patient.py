"""The patient as GGUF: what rounding to a type costs, on its own answers.

Run: python -m pytest tests/unit/eval/test_gguf_patient.py
"""

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


def test_float16_costs_less_than_a_thousandth_and_is_exact_for_weights_that_fit_it(
    patient, model, texts, tmp_path
) -> None:
    found = torch.cat(logits_of(patient, texts, tmp_path, "f16"))
    expected = torch.cat(answer_logits(model, *texts))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-3
    fitting = AutoModelForCausalLM.from_pretrained(patient).eval()
    with torch.no_grad():
        for weight in fitting.parameters():
            if weight.dim() > 1:
                weight.copy_(weight.half().float())
    assert torch.equal(found, torch.cat(answer_logits(fitting, *texts)))


def test_eight_bits_cost_less_than_a_hundredth_of_a_nat(patient, model, texts, tmp_path) -> None:
    found = torch.cat(logits_of(patient, texts, tmp_path, "q8_0"))
    kl = kl_divergence(torch.cat(answer_logits(model, *texts)), found)
    assert 0 < float(kl.mean()) < 0.01
    assert float(kl.max()) < 0.1
