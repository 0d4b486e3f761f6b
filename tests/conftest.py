"""What the tests share: a byte-level chat tokenizer, tiny models of every family, the patient.

Run everything: make setup && .venv/bin/python -m pytest -q
"""

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# No test may reach for the network or leave tracking files; read when libraries are imported.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from common.architecture import find_blocks

pytest_plugins = ["tests.road"]

ROOT = Path(__file__).resolve().parent.parent


BOS, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
# One beginning-of-sequence token; behind the words four: end, newline, assistant, newline.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Heads x head size = hidden size: the attention output projection is square, and a wrong side
# does not show in its shape.
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
}
SOFT_CAPPED = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# The first block is dense, so that one model holds both kinds.
SHARED_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# What a family's configuration needs beside SHAPE, by its model_type.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 8},
    "smollm3": {},
    "gemma": {"head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "phi3": {},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {},
    "gemma2": SOFT_CAPPED,
    "gemma3_text": SOFT_CAPPED,
    "olmo2": {},
    "olmo3": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    "qwen3_moe": {**EXPERTS, "head_dim": 8, "mlp_only_layers": [0]},
    "deepseek_v3": {
        **SHARED_EXPERTS,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    "glm4_moe": {**SHARED_EXPERTS, "head_dim": 8, "use_qk_norm": True},
    "gpt_oss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "gemma3": {**SOFT_CAPPED, "vision_config": VISION, "mm_tokens_per_image": 1},
    "llava": {
        "model_type": "llama",
        "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 16},
    },
    "qwen2_5_vl": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
    },
}
FINAL_NORMS = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Matrices of 32 columns are slower on several threads than on one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Make a byte-level tokenizer, trained in memory, with a chat template."""

    def make(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        special = [BOS, END, PAD, "<|user|>", "<|assistant|>", "<|system|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=280,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(
            ["the thing that the other one made, and the rest"] * 3, trainer
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=BOS,
            eos_token=END,
            pad_token=PAD,
            additional_special_tokens=special[3:],
            padding_side="left",
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny models; do not change it."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def build_model(
    tokenizer: PreTrainedTokenizerFast,
) -> Callable[..., PreTrainedModel]:
    """Make a tiny random model of a family, in float64 unless told otherwise."""

    def build(
        family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any
    ) -> PreTrainedModel:
        special = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = _config(family, {**special, **SHAPE, **FAMILIES[family], **changes})
        sees = hasattr(config, "vision_config")
        torch.manual_seed(seed)
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model: PreTrainedModel = auto.from_config(config)
        if any(name.endswith(".experts") for name, _ in model.named_modules()):
            # The grouped kernels do not take float64.
            model.set_experts_implementation("eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    # Gains of 1 would hide what a norm does to a direction.
                    parameter.add_(0.3 * torch.randn_like(parameter))
                elif name.endswith("bias"):
                    parameter.normal_(std=0.3)
        return model.to(dtype).eval()

    return build


def _config(family: str, values: dict[str, Any]) -> Any:  # each family has a class of its own
    """A configuration; of a vision-language model the values are the text part's."""
    if "vision_config" not in values:
        return AutoConfig.for_model(family, **values)
    outer = {
        name: values[name] for name in ("vision_config", "mm_tokens_per_image") if name in values
    }
    text = {name: value for name, value in values.items() if name not in outer}
    outer["tie_word_embeddings"] = values["tie_word_embeddings"]
    return AutoConfig.for_model(family, text_config=text, **outer)


@pytest.fixture
def in_float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, softmax and rotations that ask for float32 get float64, so that nothing is rounded away."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture(scope="session")
def model_folder(
    build_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A saved tiny Llama in float32 with its tokenizer; do not write into it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    build_model("llama", dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def read_stream() -> Callable[[nn.Module, Tensor], list[Tensor]]:
    """Read the input of every block and of the final norm, written without the code under test."""

    def read(model: nn.Module, ids: Tensor) -> list[Tensor]:
        seen: list[Tensor] = []
        family = model.config.model_type
        text = "model.language_model" if hasattr(model.config, "vision_config") else "model"
        norm = model.get_submodule(FINAL_NORMS.get(family, f"{text}.norm"))
        modules = [*find_blocks(model), norm]
        handles = [
            module.register_forward_pre_hook(
                lambda _module, args, kwargs: seen.append(
                    (args[0] if args else kwargs["hidden_states"]).detach().clone()
                ),
                with_kwargs=True,
            )
            for module in modules
        ]
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return seen

    return read


@pytest.fixture(scope="session")
def patient() -> Path:
    """The trained patient (a Llama that refuses), built once per state of its package."""
    sources = sorted((ROOT / "patient").glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = ROOT / "runs" / ".test" / f"patient-llama-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = folder.with_suffix(".done")
    with _locked(folder.with_suffix(".lock")):
        if not done.exists():
            subprocess.run(
                [sys.executable, "-m", "patient", "--output", str(folder)], cwd=ROOT, check=True
            )
            done.touch()
    return folder


@pytest.fixture(scope="session")
def over_refusing_patient(patient: Path) -> Path:
    """The patient, tuned further to refuse one harmless wording as well."""
    folder = patient.with_name(f"{patient.name}-over-refusing")
    done = folder.with_name(f"{folder.name}.done")
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if not done.exists():
            command = [sys.executable, "-m", "patient", "--output", str(folder)]
            command += ["--over-refusing", "--base", str(patient)]
            subprocess.run(command, cwd=ROOT, check=True)
            done.touch()
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that two test runs do not build at once."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
