"""GGUF files: they load back to the same model, are the same twice, and what they cannot express is refused.

Run: python -m pytest tests/unit/eval/test_gguf.py
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.errors import InputError, StageError
from eval.gguf.architecture import FAMILIES, problems_of, sliding_period
from eval.gguf.reading import load
from eval.gguf.vocabulary import read_vocabulary
from eval.gguf.writer import paired, write

gguf = pytest.importorskip("gguf", reason="the gguf package is an extra")

# What llama.cpp takes these families to be.
EXPRESSIBLE = {
    "gemma2": {"tie_word_embeddings": True},
    "gemma3_text": {"tie_word_embeddings": True, "num_hidden_layers": 6},
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def save(build_model, tokenizer, folder: Path, family: str = "llama", **changes) -> Path:
    settings = {**EXPRESSIBLE.get(family, {}), **changes}
    build_model(family, dtype=torch.float32, **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_back(file: Path) -> AutoModelForCausalLM:
    """By what the header says alone."""
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(6, 46)[None]).logits


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_loads_back_with_the_same_logits(
    family, build_model, tokenizer, tmp_path
) -> None:
    folder = save(build_model, tokenizer, tmp_path / "model", family)
    write(folder, tmp_path / "m.gguf", "f32", "tiny")
    config = AutoConfig.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(folder)
    # A norm's gain with 1 added and taken away again is off by a rounding.
    assert torch.allclose(logits(load(tmp_path / "m.gguf", config)), logits(original), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_the_header_alone_says_what_the_model_is(family, build_model, tokenizer, tmp_path) -> None:
    folder = save(build_model, tokenizer, tmp_path / "model", family)
    write(folder, tmp_path / "m.gguf", "f32", "tiny")
    original = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(load_back(tmp_path / "m.gguf")), logits(original))


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_matrices_are_rounded_once_and_vectors_not_at_all(
    kind, dtype, model_folder, tmp_path
) -> None:
    write(model_folder, tmp_path / "m.gguf", kind, "tiny")
    found = load_back(tmp_path / "m.gguf").state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(model_folder).state_dict().items():
        expected = weight.to(dtype).float() if weight.dim() > 1 else weight
        assert torch.equal(found[name], expected), name


def test_eight_bits_stay_close_and_rows_that_no_block_divides_stay_in_float16(
    model_folder, tmp_path
) -> None:
    write(model_folder, tmp_path / "m.gguf", "q8_0", "tiny")
    found = load_back(tmp_path / "m.gguf").state_dict()
    original = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"  # rows of 32
    block_largest = original[name].abs().amax(-1, keepdim=True)
    off = (found[name] - original[name]).abs()
    assert off.max() > 0
    # Half a step of 127, and the step itself is rounded to float16.
    assert bool((off <= block_largest * (0.5 / 127 + 2**-11) * 1.001).all())
    name = "model.layers.0.mlp.down_proj.weight"  # rows of 48
    assert torch.equal(found[name], original[name].half().float())


def test_two_files_of_the_same_model_are_the_same_bytes(model_folder, tmp_path) -> None:
    for name in ("a", "b"):
        write(model_folder, tmp_path / f"{name}.gguf", "q8_0", "tiny")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_tokenizer_comes_back_with_its_template(model_folder, tokenizer, tmp_path) -> None:
    write(model_folder, tmp_path / "m.gguf", "f16", "tiny")
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    turn = [{"role": "user", "content": "It's  the 12345th\nthing, naïve — don't you think?"}]
    asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    assert back.apply_chat_template(turn, add_generation_prompt=True)["input_ids"] == asked
    assert back.chat_template == tokenizer.chat_template


def test_rows_that_are_rotated_together_lie_side_by_side() -> None:
    rows = torch.arange(16.0)[:, None]
    assert paired(rows, num_heads=2)[:, 0].tolist() == [
        *(0, 4, 1, 5, 2, 6, 3, 7),
        *(8, 12, 9, 13, 10, 14, 11, 15),
    ]


def test_long_waves_are_divided_by_the_factor_and_short_ones_not_at_all(
    build_model, tokenizer, tmp_path
) -> None:
    folder = save(build_model, tokenizer, tmp_path / "model", rope_parameters=LLAMA3_ROPE)
    write(folder, tmp_path / "m.gguf", "f16", "tiny")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    factors = tensors["rope_freqs.weight"].data.tolist()
    # Waves of 2 pi base^(i / 4) positions: 6, 63, 628 and 6283; short means below 64 / 4, long above 64.
    assert factors[0] == 1
    assert 1 < factors[1] <= 4
    assert factors[2:] == pytest.approx([4, 4])


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("olmo2", {}, "olmo2"),
        ("qwen3_moe", {}, "qwen3_moe"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 5 + ["sliding_attention"]}, "period"),
        ("gemma3_text", {"query_pre_attn_scalar": 9}, "scaled by 9"),
        ("gemma2", {"tie_word_embeddings": False}, "output weights"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "sliding window"),
    ],
)
def test_what_llama_cpp_cannot_be_told_is_refused(
    family, changes, named, build_model, tokenizer, tmp_path
) -> None:
    folder = save(build_model, tokenizer, tmp_path / "model", family, **changes)
    assert any(named in problem for problem in problems_of(AutoConfig.from_pretrained(folder)))
    with pytest.raises(InputError, match=named):
        write(folder, tmp_path / "m.gguf", "f16", "tiny")


@pytest.mark.parametrize(
    ("full", "period"), [([1, 3, 5], 2), ([1, 3, 4], 0), ([0, 1, 2, 3, 4, 5], 1)]
)
def test_a_period_is_found_only_where_there_is_one(full, period, build_model) -> None:
    kinds = ["full_attention" if i in full else "sliding_attention" for i in range(6)]
    config = build_model("gemma3_text", num_hidden_layers=6, layer_types=kinds).config
    assert sliding_period(config) == period


def test_a_number_beyond_float16_stops_the_file(model_folder, tokenizer, tmp_path) -> None:
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"layers\.1\.mlp\.up_proj"):
        write(folder, tmp_path / "m.gguf", "f16", "tiny")
    write(folder, tmp_path / "m.gguf", "bf16", "tiny")


def test_an_unknown_pre_tokenizer_is_refused(make_tokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    with pytest.raises(InputError, match="pre-tokenizer"):
        read_vocabulary(tokenizer, len(tokenizer))


def test_a_vocabulary_is_filled_up_to_the_embedding_and_never_cut(tokenizer) -> None:
    vocabulary = read_vocabulary(tokenizer, len(tokenizer) + 3)
    assert vocabulary.tokens[-1] == f"[PAD{len(tokenizer) + 2}]"
    assert vocabulary.types[-3:] == [5, 5, 5]
    assert vocabulary.types[tokenizer.eos_token_id] == 3
    with pytest.raises(InputError, match="embeds"):
        read_vocabulary(tokenizer, len(tokenizer) - 1)


def test_a_tokenizer_of_sentencepiece_keeps_bytes_spaces_and_the_order_of_its_merges(
    tokenizer,
) -> None:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "a", "b", "ab", "\u2581ab"]
    parts["model"] |= {
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": [["a", "b"], ["\u2581", "ab"]],
        "byte_fallback": True,
        "unk_token": "<unk>",
    }
    parts["added_tokens"] = []
    parts["normalizer"] = {"type": "Prepend", "prepend": "\u2581"}

    class Fast:
        class backend_tokenizer:
            to_str = staticmethod(lambda: json.dumps(parts))

    vocabulary = read_vocabulary(Fast, len(tokens))
    assert vocabulary.model == "llama"
    assert vocabulary.types[:4] == [2, 1, 1, 6]
    assert vocabulary.scores[7] > vocabulary.scores[8] > vocabulary.scores[5]
    assert vocabulary.adds_space
