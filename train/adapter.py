"""The LoRA adapter: peft's LoraConfig by its own names, and the proof that merging it gives the model that was trained.

Stage three and the release load the abliterated model with the adapter merged into its weights. Merging rounds, and an
adapter that was trained on weights in 4 bits (QLoRA) is merged into other weights than it was trained on; so the
merged model has to answer as the trained one did, and how nearly it does is measured.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, TaskType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.errors import StageError
from common.model import auto_class, load_config, resolve
from common.recipe import Recipe

# Every linear layer, as the Daredevil recipe trained them; peft leaves the unembedding out by itself.
DEFAULT_TARGETS = "all-linear"
# How far the logits of the merged model may be from the trained one's, as a share of their own spread: a few hundred
# roundings of the dtype that one of the two computes in. A merge that leaves out the adapter, its scaling or its
# magnitudes is a multiple of these as soon as training has changed an answer.
MERGE_TOLERANCE: Final[Mapping[torch.dtype, float]] = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 3e-2,
    torch.bfloat16: 1e-1,
}
# Weights in 4 bits answer otherwise than the full ones with or without an adapter. What has to carry over is what the
# adapter changes; this share of it may be lost, where an adapter that is not merged at all would lose 1.
LOST_FROM_4BIT: Final = 0.75


def build_adapter(block: Mapping[str, Any]) -> LoraConfig:
    """The LoraConfig of a recipe's `train.adapter` block, which `train.settings.check_adapter` has checked."""
    settings = {"target_modules": DEFAULT_TARGETS, **block}
    if "target_parameters" in block and "target_modules" not in block:
        settings.pop("target_modules")
    return LoraConfig(task_type=TaskType.CAUSAL_LM, **settings)


def without_weights(recipe: Recipe) -> PreTrainedModel:
    """The recipe's model as its configuration describes it, on the meta device."""
    config = load_config(resolve(recipe.model.name_or_path, recipe.model.revision))
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config)
    return model


def num_parameters(recipe: Recipe) -> tuple[int, int]:
    """How many numbers the recipe's model has, and the bytes of one."""
    model = without_weights(recipe)
    return sum(p.numel() for p in model.parameters()), stored_dtype(recipe, model.config).itemsize


def stored_dtype(recipe: Recipe, config: Any) -> torch.dtype:  # noqa: ANN401  # each family has a class of its own
    """What a recipe's model is loaded in: the checkpoint's own dtype where the recipe says `auto`."""
    if recipe.model.dtype != "auto":
        named: torch.dtype = getattr(torch, recipe.model.dtype)
        return named
    own: torch.dtype = config.dtype or config.get_text_config().dtype or torch.float32
    return own


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Every LoRA layer by its path; those of several parameters of one module stand inside each other."""
    return [
        (path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)
    ]


def adapters_of(layer: LoraLayer) -> list[str]:
    """The names of a layer's adapters, those of embeddings among them."""
    return [*layer.lora_B, *layer.lora_embedding_B]


def factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """What an adapter adds to a layer is its scaling times B A, and the same of a bias behind B.

    Args:
        layer: the layer.
        adapter: which of its adapters.

    Returns:
        A [experts * r, d_in], one expert after the other; B [d_out, r * experts], the experts side by side for each
        rank; and the bias [d_out], if there is one. They are the layer's parameters of now: sharding puts others in
        their place.
    """
    if adapter in layer.lora_embedding_B:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], None
    writing = layer.lora_B[adapter]
    return layer.lora_A[adapter].weight, writing.weight, writing.bias


def num_experts(layer: LoraLayer) -> int:
    """How many products of factors lie in a layer's."""
    return int(layer.num_experts) if isinstance(layer, ParamWrapper) else 1


def keep_adapter_in_float32(model: PeftModel) -> None:
    """Undo TRL's cast of an adapter over packed weights to bfloat16, in which small steps would round to nothing."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def answer_logits(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """What a model answers to rows of token ids, for `require_same_answers`.

    Args:
        model: a causal language model; its mode is left as it was found.
        rows: token ids, read one row at a time, so that no padding is in the way.

    Returns:
        The logits of all positions [tokens, vocabulary] in float32 on the CPU, each without its mean, which no
        probability depends on.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        logits = [
            model(input_ids=torch.tensor([list(row)], device=device), use_cache=False).logits[0]
            for row in rows
        ]
    model.train(training)
    answers = torch.cat(logits).float().cpu()
    return answers - answers.mean(dim=1, keepdim=True)


def carried_over(trained: Tensor, packed: Tensor, full: Tensor) -> tuple[Tensor, float]:
    """What an adapter that was trained on packed weights should answer once it is merged into the full ones.

    Args:
        trained: `answer_logits` of the packed model with the adapter.
        packed: of the packed model without it.
        full: of the full-precision model without it.

    Returns:
        The answers that are expected of the merged model, and how far from them it may be beside rounding, as a share
        of their spread.
    """
    change = trained - packed
    expected = full + change
    return expected, LOST_FROM_4BIT * float(change.norm() / expected.norm())


def require_same_answers(trained: Tensor, merged_answers: Tensor, tolerance: float) -> float:
    """Hold a merged model against the model that was trained.

    Args:
        trained: `answer_logits` of the model with the adapter beside its weights, or what `carried_over` expects.
        merged_answers: of the one with the adapter in its weights.
        tolerance: as a share of the spread of the first.

    Returns:
        The root mean square of their difference as that share.

    Raises:
        StageError: if they are further apart, or not finite.
    """
    share = float((merged_answers - trained).norm() / trained.norm())
    if share <= tolerance:
        return share
    raise StageError(
        f"train: with the adapter merged into the weights the logits differ from the trained model's by {share:.2g} of "
        f"their spread, more than the {tolerance:.2g} that rounding explains, so stage three would measure another "
        "model than was trained; train without what merging loses (train.load_in_4bit, a model.dtype of few digits)"
    )


def merge_tolerance(dtype: torch.dtype, *, half: bool) -> float:
    """How far a merged model may be from the trained one by rounding.

    Args:
        dtype: of the weights that the adapter is merged into.
        half: whether training computed in 16 bits.
    """
    return MERGE_TOLERANCE[torch.bfloat16] if half else MERGE_TOLERANCE[dtype]
