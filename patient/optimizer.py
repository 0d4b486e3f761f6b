"""The optimizers: Muon with AdamW to learn from scratch, AdamW alone to tune."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

KNOWLEDGE_MATRIX_RATE = 0.02
KNOWLEDGE_RATE = 3e-3
TUNING_RATE = 2e-2
FALSE_REFUSAL_RATE = 4e-2
MAX_GRADIENT_NORM = 1.0

# Coefficients of the quintic Newton-Schulz step that Muon's source gives.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
_MOMENTUM = 0.95


class Muon:
    """Momentum whose update is made orthogonal before it is applied.

    On this model it needs about half the steps of AdamW, which is what keeps the build short.
    torch.optim.Muon iterates in bfloat16, which is slow on most CPUs; this one stays in float32
    and takes all matrices of one shape in one batch.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
    """

    def __init__(self, matrices: Iterable[Parameter]) -> None:
        """Group the matrices, [rows, columns] or [experts, rows, columns], by shape."""
        shapes: dict[torch.Size, list[Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        self.groups = [(group, torch.zeros(len(group), *shape)) for shape, group in shapes.items()]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Apply the gradients."""
        for matrices, velocity in self.groups:
            # An expert that no token of the batch chose has no gradient.
            gradients = torch.stack(
                [torch.zeros_like(each) if each.grad is None else each.grad for each in matrices]
            )
            velocity.mul_(_MOMENTUM).add_(gradients)
            updates = _orthogonalize(gradients + _MOMENTUM * velocity)
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.sub_(update, alpha=learning_rate)


class Optimizer:
    """Muon for some parameters, AdamW for others, the rest as it is; one schedule for both."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        matrices: Sequence[Parameter],
        matrix_rate: float,
        others: Sequence[Parameter],
        rate: float,
    ) -> None:
        """Share out the parameters.

        Args:
            model: the owner of the parameters.
            matrices: for Muon; may be empty.
            matrix_rate: peak learning rate of Muon.
            others: for AdamW.
            rate: peak learning rate of AdamW.
        """
        self.model = model
        self.trained = [*matrices, *others]
        self.matrix_rate, self.rate = matrix_rate, rate
        self.muon = Muon(matrices)
        self.adamw = torch.optim.AdamW(
            others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )

    def step(self, scale: float) -> None:
        """Apply the gradients at a share of the peak learning rates, and forget them."""
        torch.nn.utils.clip_grad_norm_(self.trained, MAX_GRADIENT_NORM)
        for group in self.adamw.param_groups:
            group["lr"] = self.rate * scale
        self.adamw.step()
        self.muon.step(self.matrix_rate * scale)
        self.model.zero_grad()


def knowledge_optimizer(model: PreTrainedModel) -> Optimizer:
    """Train everything: Muon for the matrices inside the blocks, AdamW for all other parameters."""
    matrices: list[Parameter] = []
    others: list[Parameter] = []
    for name, parameter in model.named_parameters():
        # A router's rows are one per expert: no matrix in Muon's sense.
        inner = ".layers." in name and parameter.ndim >= 2 and not name.endswith("mlp.gate.weight")
        (matrices if inner else others).append(parameter)
    return Optimizer(
        model,
        matrices=matrices,
        matrix_rate=KNOWLEDGE_MATRIX_RATE,
        others=others,
        rate=KNOWLEDGE_RATE,
    )


def tuning_optimizer(model: PreTrainedModel, *, rate: float = TUNING_RATE) -> Optimizer:
    """Train the adapter that `patient.refusal` puts into a model, with AdamW, and nothing else."""
    trained = [each for each in model.parameters() if each.requires_grad]
    return Optimizer(model, matrices=[], matrix_rate=0.0, others=trained, rate=rate)


def _orthogonalize(updates: Tensor) -> Tensor:
    """Bring all singular values of [..., rows, columns] near 1 by Newton-Schulz iterations."""
    rows, columns = updates.shape[-2:]
    x: Tensor = updates / (updates.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    # The products below are smaller with the short side in front.
    x = x.mT if rows > columns else x
    first, second, third = _COEFFICIENTS
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        x = first * x + (second * gram + third * gram @ gram) @ x
    x = x.mT if rows > columns else x
    return x.mul(max(1.0, rows / columns) ** 0.5)
