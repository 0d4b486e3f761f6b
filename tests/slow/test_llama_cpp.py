"""llama.cpp answers from our GGUF files as transformers answers from the weights they were written from.

Run: pip install cyllama && .venv/bin/python -m pytest -m slow tests/slow/test_llama_cpp.py
"""

import importlib
import json

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from common import artifacts, chat
from common.generation import continue_rows
from eval.gguf.architecture import FAMILIES
from eval.gguf.runtimes import quantize
from eval.gguf.writer import write

pytest.importorskip("gguf", reason="the gguf package is an extra")
cyllama = pytest.importorskip("cyllama", reason="llama.cpp is called through cyllama, an extra")

LENGTH = 40
NUM_TOKENS = 12
# What llama.cpp takes these families to be.
EXPRESSIBLE = {
    "gemma2": {"tie_word_embeddings": True},
    "gemma3_text": {"tie_word_embeddings": True, "num_hidden_layers": 6},
}


def llama_answers(file, prompts) -> list[str]:
    settings = {"temperature": 0.0, "max_tokens": LENGTH, "repeat_penalty": 1.0, "n_ctx": 512}
    model = cyllama.LLM(str(file), n_gpu_layers=0, **settings)
    return [str(model(prompt)) for prompt in prompts]


def llama_tokens(file, text) -> tuple[list[int], list[int]]:
    """The tokens that llama.cpp makes of a text, and those it goes on with greedily, with everything in float32."""
    llama_cpp = importlib.import_module("cyllama.llama.llama_cpp")
    settings = llama_cpp.LlamaModelParams()
    settings.n_gpu_layers = 0
    model = llama_cpp.LlamaModel(str(file), settings)
    ids = list(model.get_vocab().tokenize(text, add_special=False, parse_special=True))
    settings = llama_cpp.LlamaContextParams()
    settings.n_ctx, settings.type_k, settings.type_v = 256, 0, 0
    context = llama_cpp.LlamaContext(model, settings)
    sampler = llama_cpp.LlamaSampler()
    sampler.add_greedy()
    context.decode(llama_cpp.llama_batch_get_one(ids, 0))
    found: list[int] = []
    for _ in range(NUM_TOKENS):
        found.append(sampler.sample(context, -1))
        context.decode(llama_cpp.llama_batch_get_one(found[-1:], len(ids) + len(found) - 1))
    return ids, found


def sentencepiece_like(*, prepends: bool) -> PreTrainedTokenizerFast:
    """A BPE with bytes to fall back on, as Llama 2 and Mistral (which put a space in front) and Gemma have it."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    lines = ["the thing that the other one made", "once upon a time the rest of the story"]
    backend.train_from_iterator([line.replace(" ", "\u2581") for line in lines * 9], trainer)
    parts = json.loads(backend.to_str())
    parts["added_tokens"] = parts["added_tokens"][:4]  # bytes are no special tokens
    backend = Tokenizer.from_str(json.dumps(parts))
    spaces = normalizers.Replace(" ", "\u2581")
    prepended = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces])
    backend.normalizer = prepended if prepends else spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def own_answers(folder, prompts) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    answers = [continue_rows(model, tokenizer, [row], max_new_tokens=LENGTH)[0] for row in rows]
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_twenty_greedy_answers_of_the_patient_are_the_same(kind, patient, tmp_path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(patient)
    names = ("harmless_test", "harmful_test")
    rows = [r for n in names for r in artifacts.read_jsonl(patient / "prompts" / f"{n}.jsonl")[:10]]
    prompts = [chat.render(tokenizer, row["prompt"]) for row in rows]
    write(patient, tmp_path / "m.gguf", kind, "patient")
    assert len(prompts) == 20
    assert llama_answers(tmp_path / "m.gguf", prompts) == own_answers(patient, prompts)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_random_weights_of_every_family_give_the_same_tokens(
    family, build_model, tokenizer, tmp_path
) -> None:
    folder = tmp_path / "model"
    # Longer than the window, shorter than a Mistral's, which llama.cpp does not know of.
    window = 256 if family == "mistral" else 16
    settings = {"sliding_window": window, **EXPRESSIBLE.get(family, {})}
    settings |= {"vocab_size": len(tokenizer) + 8}
    built = build_model(family, dtype=torch.float32, **settings)
    built.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write(folder, tmp_path / "m.gguf", "f32", "tiny")
    own = AutoTokenizer.from_pretrained(folder)
    text = chat.render(
        own, "It's  the 12th thing\n\nthat the OTHER one made, naïve — and the rest?"
    )
    ids = own(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 40
    found_ids, found = llama_tokens(tmp_path / "m.gguf", text)
    assert found_ids == ids
    with torch.inference_mode():
        predicted = built(torch.tensor([[*ids, *found]])).logits[0, len(ids) - 1 : -1]
    assert found == predicted.argmax(dim=-1).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "prepends"), [("llama", True), ("gemma2", False)])
def test_a_sentencepiece_tokenizer_cuts_texts_alike(
    family, prepends, build_model, tmp_path
) -> None:
    tokenizer = sentencepiece_like(prepends=prepends)
    settings = {"vocab_size": len(tokenizer) + 3, **EXPRESSIBLE.get(family, {})}
    build_model(family, dtype=torch.float32, **settings).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write(tmp_path, tmp_path / "m.gguf", "f32", "tiny")
    for text in ("the other thing", "  two  spaces, naïve — x", "once upon\na tim", "<s>the rest"):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert llama_tokens(tmp_path / "m.gguf", text)[0] == expected, text


@pytest.mark.slow
def test_a_k_quant_of_the_patient_answers_nearly_always_alike(patient, tmp_path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(patient)
    rows = artifacts.read_jsonl(patient / "prompts" / "harmful_test.jsonl")[:20]
    prompts = [chat.render(tokenizer, row["prompt"]) for row in rows]
    write(patient, tmp_path / "full.gguf", "f32", "patient")
    quantize(tmp_path / "full.gguf", tmp_path / "small.gguf", "q4_k_m")
    assert (tmp_path / "small.gguf").stat().st_size < (tmp_path / "full.gguf").stat().st_size / 3
    pairs = zip(
        llama_answers(tmp_path / "small.gguf", prompts), own_answers(patient, prompts), strict=True
    )
    assert sum(found == expected for found, expected in pairs) >= 18
