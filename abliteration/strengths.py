"""How strongly each writer is edited: the strength of the edit times the weight of its component and layer."""

from collections.abc import Sequence

from common.architecture import PlacedWriter
from common.recipe import EditWeights, LayerKernel


def strengths_of(
    writers: Sequence[PlacedWriter], strength: float, weights: EditWeights
) -> dict[str, float]:
    """The strength at every writer, by its name.

    Args:
        writers: the writers of the model.
        strength: of the edit.
        weights: for the embedding one number; for attention and MLP a number, one per block, or a kernel.
    """
    return {writer.name: strength * _weight(writer, weights) for writer in writers}


def kernel_weight(kernel: LayerKernel, layer: float) -> float:
    """The weight of one layer under a triangular kernel.

    Largest at its position, falling in a straight line to `min_weight` at `min_weight_distance` layers from
    it, and 0 beyond. Heretic's published form, with its names.
    """
    distance = abs(layer - kernel.max_weight_position)
    if distance > kernel.min_weight_distance:
        return 0.0
    slope = (kernel.min_weight - kernel.max_weight) / kernel.min_weight_distance
    return kernel.max_weight + slope * distance


def layer_problems(weights: EditWeights, num_layers: int) -> list[str]:
    """What of the weights does not fit a model's depth: `component: problem`."""
    problems = []
    for component in ("attention", "mlp"):
        given = getattr(weights, component)
        if isinstance(given, tuple) and len(given) != num_layers:
            problems.append(
                f"{component}: holds {len(given)} numbers, but the model has {num_layers} layers; give one for each"
            )
        if isinstance(given, LayerKernel) and all(
            kernel_weight(given, layer) == 0 for layer in range(num_layers)
        ):
            problems.append(
                f"{component}: the kernel reaches none of the model's {num_layers} layers (0 to {num_layers - 1})"
            )
    return problems


def _weight(writer: PlacedWriter, weights: EditWeights) -> float:
    given = getattr(weights, writer.component)
    if isinstance(given, float | int):
        return float(given)
    assert writer.block is not None  # the embedding's weight is a number
    if isinstance(given, LayerKernel):
        return kernel_weight(given, writer.block)
    return float(given[writer.block])
