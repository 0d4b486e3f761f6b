"""Packed documents do not see each other, and the optimizers move what they should.

Run: make setup && .venv/bin/python -m pytest tests/unit/patient/test_training.py
"""

import pytest
import torch

from patient.architectures import ARCHITECTURES, build_model
from patient.corpus import Document, tokenizer_texts
from patient.optimizer import Muon, knowledge_optimizer, tuning_optimizer
from patient.refusal import add_adapter
from patient.tokenizer import BOS, END, render_turn, train_tokenizer
from patient.training import IGNORED_LABEL, Phase, _collate, _tokenize, train
from patient.world import build_world

DOCUMENTS = [
    Document(render_turn("What is 2 plus 3?"), f"5{END}"),
    Document(f"{BOS}A lamp is", f" a common thing.{END}"),
]


@pytest.fixture(scope="module")
def patient_tokenizer():
    return train_tokenizer(tokenizer_texts(build_world(0)))


@pytest.fixture
def batch(patient_tokenizer):
    return _collate([list(_tokenize(DOCUMENTS, patient_tokenizer))], patient_tokenizer.pad_token_id)


def test_only_completions_are_learnt(patient_tokenizer, batch):
    learnt = batch.labels[batch.labels != IGNORED_LABEL]
    assert patient_tokenizer.decode(learnt) == f"5{END} a common thing.{END}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_document_reads_as_it_does_alone(patient_tokenizer, batch, architecture):
    torch.manual_seed(0)
    model = build_model(architecture, patient_tokenizer).eval()
    alone = torch.tensor(
        patient_tokenizer([DOCUMENTS[1].prompt + DOCUMENTS[1].completion])["input_ids"]
    )
    start = len(patient_tokenizer(DOCUMENTS[0].prompt + DOCUMENTS[0].completion)["input_ids"])
    with torch.inference_mode():
        packed = model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
        expected = model(input_ids=alone).logits
    found = packed[:, start : start + alone.shape[1]]
    # Float32 sums in another order.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_widths_suit_quantization_and_embeddings_are_untied(patient_tokenizer, architecture):
    model = build_model(architecture, patient_tokenizer)
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    assert 800_000 <= model.num_parameters() <= 2_500_000
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and not name.endswith("mlp.gate.weight"):
            assert all(size % 32 == 0 for size in parameter.shape), name


def test_muon_makes_the_update_orthogonal():
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.zeros(32, 64))
    matrix.grad = torch.randn(32, 64) * torch.logspace(-3, 0, 64)
    Muon([matrix]).step(learning_rate=1.0)
    values = torch.linalg.svdvals(matrix.detach())
    # Five iterations bring the singular values near 1, not to it.
    assert values.max() < 1.3
    assert values.median() > 0.6


def train_briefly(model, tokenizer, make_optimizer) -> set[str]:
    """Train two steps; the names of the parameters that moved."""
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    phase = Phase("a test", lambda _: DOCUMENTS * 200, make_optimizer, num_steps=2)
    train(model, tokenizer, phase, seed=0)
    return {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}


def test_learning_trains_every_parameter(patient_tokenizer):
    torch.manual_seed(0)
    model = build_model("llama", patient_tokenizer)
    names = {name for name, _ in model.named_parameters()}
    assert train_briefly(model, patient_tokenizer, knowledge_optimizer) == names


def test_tuning_trains_the_adapter_and_nothing_else(patient_tokenizer):
    torch.manual_seed(0)
    model = build_model("llama", patient_tokenizer)
    # The adapter goes into the model in place; the build trains the model, not the wrapper.
    add_adapter(model)
    moved = train_briefly(model, patient_tokenizer, tuning_optimizer)
    assert moved
    assert all("lora_" in name for name in moved)


def test_training_is_the_same_for_a_seed(patient_tokenizer):
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        model = build_model("llama", patient_tokenizer)
        phase = Phase("a test", lambda _: DOCUMENTS * 200, knowledge_optimizer, num_steps=3)
        losses.append(train(model, patient_tokenizer, phase, seed=0))
    assert losses[0] == losses[1]
