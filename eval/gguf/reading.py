"""A GGUF file as a model of transformers, to hold it against the weights it was written from."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from common import distributed
from common.errors import StageError


def load(file: Path, config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:  # noqa: ANN401  # each family has a class of its own
    """The model of a file, on this process's device and in evaluation mode.

    Args:
        file: of GGUF.
        config: of the model it was written from: transformers reads a part of a header alone.
        dtype: to compute in; the file's numbers are rounded to it.

    Raises:
        StageError: if transformers cannot read it.
    """
    if config.model_type == "mistral":
        # A Mistral is a Llama there, and transformers knows its tensors under that name alone.
        config = LlamaConfig(**{**config.to_dict(), "model_type": "llama"})
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=dtype
        )
    # In each of these ways transformers says that a file is damaged, or of a type, family or shape it cannot read.
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise StageError(
            f"release: {file.name} cannot be loaded back ({str(error)[:200]}); delete its type from release.gguf"
        ) from error
    torch.nn.Module.to(model, distributed.device())
    model.eval()
    return model
