"""The residual stream of a teacher in a few numbers a token: what an anchor holds beside the probabilities.

Probabilities on a few thousand prompts say little of what a model computes, and healing by them alone learns those
prompts by heart. The residual stream says it all, token by token and block by block, so that the same prompts teach the
repair itself, which carries over to what nobody asked. What the edit removed from the stream is left out of it: that
is not to come back.

Streams are wide, so a random projection of them is kept, another for each prompt: squared distances come out right on
average (Johnson and Lindenstrauss 1984), and over the prompts no component of the stream stays unseen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common import artifacts
from common.edits import Edit, edited_writers

# Vectors of an edit that differ by less than this share of their length are one and the same.
SAME = 1e-6


@dataclass(frozen=True)
class Sketch:
    """What is kept of a stream.

    Attributes:
        size: numbers for each token and block.
        removed: orthonormal vectors [k, d_model] in float64 that are left out of it.
    """

    size: int
    removed: Tensor

    def matrix(self, tokens: Sequence[int]) -> Tensor:
        """The projection [d_model, size] of one row, drawn by its tokens: [d_model, d_model] if that is no more.

        Its entries have variance 1 / size, so that |h M|^2 is |h|^2 on average for any h without removed components.
        """
        width = self.removed.shape[1]
        if self.size < width:
            seed = int(artifacts.hash_data(list(tokens))[:15], 16)
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(width, self.size, generator=generator) / self.size**0.5
        else:
            drawn = torch.eye(width)
        removed = self.removed.to(drawn)
        kept: Tensor = drawn - removed.T @ (removed @ drawn)
        return kept

    def of(self, streams: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """What is kept of a batch of streams, in float32; a loss on it flows back into them.

        Args:
            streams: resid_pre of each block [rows, length, d_model], padded on the left.
            rows: the tokens of each row.

        Returns:
            For each row [tokens, blocks, size].
        """
        device = streams[0].device
        matrices = torch.stack([self.matrix(tokens) for tokens in rows]).to(device)
        # Autocast would round what is compared here.
        with torch.autocast(device.type, enabled=False):
            kept = [torch.bmm(stream.float(), matrices.to(stream.device)) for stream in streams]
        batch = torch.stack([each.to(device) for each in kept], dim=2)
        return [batch[index, -len(tokens) :] for index, tokens in enumerate(rows)]


def removed_from_stream(model: nn.Module, edit: Edit) -> Tensor:
    """What an edit removes from the residual stream: an orthonormal basis [k, d_model] in float64; k may be 0.

    A writer behind a norm is edited along gain * v for v to leave the stream, so its vectors are divided by the gain.

    Args:
        model: the original or the abliterated one; their norms are the same.
        edit: of the abliterated one.
    """
    vectors = []
    for name, writer in edited_writers(model, edit).items():
        gain, basis = writer.post_norm_gain, edit.basis(name)
        vectors.append(basis if gain is None else basis / gain.detach().cpu().double())
    if not vectors:
        return torch.zeros(0, len(edit.direction), dtype=torch.float64)
    found = torch.cat(vectors)
    found = found / found.norm(dim=1, keepdim=True)
    _, sizes, axes = torch.linalg.svd(found, full_matrices=False)
    independent: Tensor = axes[sizes > SAME * sizes[0]]
    return independent


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """How far a stream is from the teacher's, as a share of its square: |s - t|^2 / |t|^2, the mean over blocks.

    Of each token by itself, since the first tokens of a text can be a thousand times longer than all others.

    Args:
        student: [tokens, blocks, size].
        teacher: of the same shape.

    Returns:
        [tokens].
    """
    teacher = teacher.to(student)
    squares = teacher.square().sum(dim=-1).clamp_min(torch.finfo(student.dtype).tiny)
    return ((student - teacher).square().sum(dim=-1) / squares).mean(dim=-1)
