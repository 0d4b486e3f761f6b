"""Models and tokenizers: found, checked without loading a weight, and loaded."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed

from common import chat, distributed
from common.architecture import architecture_of
from common.edits import SIDECAR, load_edit
from common.errors import InputError
from common.hooks import add_for_good

# How text and images become what the model reads, the templates of conversations included.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
NEEDED_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer*",
    "merges.txt",
    "LICENSE*",
    "NOTICE*",
)

logger = logging.getLogger(__name__)


def resolve(name_or_path: str, revision: str | None = None) -> Path:
    """The local folder of a model: the path itself, or the snapshot of a hub id.

    Raises:
        InputError: if it is neither a folder nor a model that the hub or its local cache can give.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.exists() or name_or_path.startswith((".", "/")) or name_or_path.count("/") != 1:
        hint = (
            "; build it with `python -m patient --output " + name_or_path + "`"
            if "patient" in name_or_path
            else ""
        )
        raise InputError(
            f"model: {name_or_path} is no folder and no hub id of the form owner/name{hint}"
        )
    try:
        return Path(
            snapshot_download(name_or_path, revision=revision, allow_patterns=list(NEEDED_FILES))
        )
    except (
        Exception
    ) as error:  # the hub raises a dozen kinds, none of which the user should read as a traceback
        hint = (
            "; build it with `python -m patient --output " + name_or_path + "`"
            if "patient" in name_or_path
            else ""
        )
        raise InputError(
            f"model: {name_or_path} is no local folder, and the hub did not give it ({type(error).__name__}); check "
            f"the name, revision and network{hint}"
        ) from error


def check_model(folder: Path) -> list[str]:
    """What makes a model folder unusable here, found without loading a weight.

    Returns:
        Problems in words; empty if there is none.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        architecture_of(config.model_type)
    except InputError as error:
        return [str(error)]
    except (OSError, ValueError, KeyError) as error:
        return [
            f"model: {folder} has no readable config.json ({_first_line(error)}); name a complete model folder"
        ]
    problems = list(_weight_problems(folder))
    if getattr(config, "quantization_config", None) is not None:
        problems.append(
            f"model: {folder} is quantized; an edit of packed weights gives garbage: name the full-precision source"
        )
    try:
        load_tokenizer(folder)
    except InputError as error:
        problems.append(str(error))
    return problems


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted by name."""
    return sorted(folder.glob("*.safetensors"))


def identity_files(folder: Path) -> list[Path]:
    """The files that make a model what it is: weights, configuration, tokenizer and template."""
    others = [folder / name for name in ("config.json", "generation_config.json")]
    return [
        *weight_files(folder),
        *(file for file in others if file.is_file()),
        *tokenizer_files(folder),
    ]


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a model folder's tokenizer and processor."""
    return [file for pattern in TOKENIZER_FILES for file in sorted(folder.glob(pattern))]


def load_config(folder: Path) -> Any:  # noqa: ANN401  # each family has a class of its own
    """The configuration of a model folder."""
    return AutoConfig.from_pretrained(folder)


def auto_class(config: Any) -> Any:  # noqa: ANN401  # neither configurations nor auto classes share a useful type
    """The class of transformers that makes or loads the model of a configuration.

    Most vision-language models are not among its causal language models, though they answer text alike.
    """
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer that pads on the left and has a chat template, which opens answers without thinking aloud.

    Raises:
        InputError: if there is no tokenizer, no chat template, or one that cannot render a user turn.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(str(path), revision))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model: {path} has no readable tokenizer ({_first_line(error)}); add its files"
        ) from error
    if not tokenizer.chat_template:
        raise InputError(
            f"model: {path} has no chat template, so it is no chat model and cannot refuse as one; add "
            "chat_template.jinja, or name its instruct version"
        )
    _amend_template(tokenizer, path)
    # Right padding would make the last position of a short prompt a pad token.
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    checked: PreTrainedTokenizerBase = tokenizer
    return checked


def _amend_template(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Amend the template in memory; the model's own files keep theirs."""

    def render(template: str, messages: chat.Messages, add_generation_prompt: bool) -> str:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        assert isinstance(text, str)
        return text

    try:
        own = tokenizer.get_chat_template()  # of several, the one for a conversation without tools
        dated = chat.fix_date(own)
        closed = chat.close_thinking(dated, render)
    except (jinja2.TemplateError, ValueError) as error:
        raise InputError(
            f"model: the chat template of {path} cannot render a user turn of plain text "
            f"({_first_line(error)}); correct its chat_template.jinja"
        ) from error
    if closed != own:
        tokenizer.chat_template = closed
        if closed != dated and distributed.is_main():
            _log_once(
                "model: it thinks before it answers; every stage opens its answers behind an empty thought"
            )


@lru_cache
def _log_once(message: str) -> None:
    logger.info(message)


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    in_4bit: bool = False,
) -> PreTrainedModel:
    """A causal language model, or the vision-language model around one, in evaluation mode on this process's device.

    Args:
        path: folder or hub id.
        revision: of the hub id.
        dtype: a torch dtype by name, or `auto` for the checkpoint's own.
        in_4bit: quantize the weights to nf4 as they are read (bitsandbytes).

    Returns:
        The model. What an edit adds to its stream without a bias to hold it is added by hooks.

    Raises:
        InputError: if the weights cannot be read.
    """
    folder = resolve(str(path), revision)
    several_gpus = distributed.world_size() == 1 and torch.cuda.device_count() > 1
    with _whole():
        model = _load(
            folder,
            dtype,
            device_map="auto" if several_gpus else distributed.device() if in_4bit else None,
            quantization_config=_nf4(dtype) if in_4bit else None,
        )
    if not several_gpus and not in_4bit:
        torch.nn.Module.to(model, distributed.device())
    return model


def load_to_shard(folder: Path, *, dtype: str) -> PreTrainedModel:
    """A model for FSDP 2 or ZeRO-3 to share out, which move part by part: on the CPU, since no GPU may hold it whole.

    In the checkpoint's own dtype its weights are the file, mapped into memory once for all processes of a machine.

    Args:
        folder: of the model.
        dtype: a torch dtype by name, or `auto` for the checkpoint's own.

    Raises:
        InputError: if the weights cannot be read.
    """
    with _whole():
        return _load(folder, dtype)


def _load(folder: Path, dtype: str, **settings: Any) -> PreTrainedModel:  # noqa: ANN401  # from_pretrained's
    try:
        model: PreTrainedModel = auto_class(load_config(folder)).from_pretrained(
            folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **settings
        )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise InputError(
            f"model: {folder} could not be loaded ({_first_line(error)}); check its files"
        ) from error
    if (folder / SIDECAR).is_file():
        add_for_good(model, load_edit(folder / SIDECAR))
    model.eval()
    return model


def _nf4(dtype: str) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
    )


def _weight_problems(folder: Path) -> Iterator[str]:
    files = weight_files(folder)
    if not files:
        yield f"model: {folder} holds no safetensors weights; convert the checkpoint (pickled weights are not loaded)"
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            yield f"model: {file} is truncated or damaged ({_first_line(error)}); fetch or build it again"
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        yield f"model: {index} is damaged, so it is not known which weight files there should be; fetch it again"
        return
    for missing in sorted(named - {file.name for file in files}):
        yield f"model: {folder} lacks {missing}, which its index names; fetch it"


@contextmanager
def _whole() -> Iterator[None]:
    """Let from_pretrained give every process a whole model, whatever the launch shares out in training."""
    # Under accelerate's FSDP variables it may leave all ranks but the first without weights.
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(name)
    if before is not None:
        os.environ[name] = "false"
    # While the settings of a ZeRO-3 training live, which trl's trainer reads, it gives each rank a part.
    settings, deepspeed._hf_deepspeed_config_weak_ref = (
        deepspeed._hf_deepspeed_config_weak_ref,
        None,
    )
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = settings
        if before is not None:
            os.environ[name] = before


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
