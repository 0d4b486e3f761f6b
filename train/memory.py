"""How much memory training takes in each process, from shapes alone.

Weights, gradients and the optimizer's state are counted; activations are what PyTorch keeps for the backward pass of a
transformer block, as Korthikanti et al. 2022 (arXiv:2205.05198) count it, with attention that keeps no scores.
"""

from dataclasses import dataclass, fields
from typing import Final

from train.launch import Strategy

# A nf4 number takes half a byte, and its share of a doubly quantized scale per block of 64.
NF4_BYTES: Final = 0.5 + 0.127 / 8
# Of the adapter, of FSDP's and ZeRO's own copy of what is trained, and of what the fused head computes in.
FLOAT32: Final = 4
# trl's fused unembedding works on tiles of so many tokens and words (trl/kernels/chunked_logprob.py). Its Triton
# kernel holds the logits, their probabilities and their gradients; torch's own operations hold eight such tiles
# at once (measured on a CPU).
TILE: Final = (4096, 32768)
TILES_OF_TRITON: Final = 3
TILES_OF_TORCH: Final = 8
# Beside the logits of its answers an anchor holds them in float32, their log-softmax and its gradient.
ANCHORED: Final = 3


@dataclass(frozen=True)
class Shape:
    """What of a model and a recipe decides memory.

    Attributes:
        weights: numbers of the model.
        packed: of them, those that are kept in 4 bits.
        trained: numbers that are trained.
        adapter: whether these are an adapter's, beside the model's.
        width: bytes of one of the model's numbers.
        largest_block: numbers of the largest transformer block, or of an embedding if that is larger.
        tokens: of a forward pass over pairs.
        layers: transformer blocks.
        hidden: width of the residual stream.
        heads: width of all queries together.
        inner: width inside the MLP, of all experts that a token goes through.
        vocabulary: words.
        tiles: how many tiles of the unembedding are held at once.
        checkpointing: whether only each block's input is kept, and one block's insides.
        anchor_tokens: of the anchors' forward passes beside it.
        anchor_answers: of them, those whose logits are made in full.
        taught: bytes of what the anchors' teachers said; beside a GPU they are not in its memory.
        pulled: whether trained weights are pulled to where they began (`l2`).
        moments: numbers that the optimizer keeps per trained one.
        moment_bytes: bytes of each; 0 for as many as the trained number has.
    """

    weights: int
    packed: int
    trained: int
    adapter: bool
    width: int
    largest_block: int
    tokens: int
    layers: int
    hidden: int
    heads: int
    inner: int
    vocabulary: int
    tiles: int
    checkpointing: bool
    anchor_tokens: int = 0
    anchor_answers: int = 0
    taught: float = 0
    pulled: bool = False
    moments: int = 2
    moment_bytes: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes in each process.

    Attributes:
        weights: with what is gathered of them, and where they began if they are pulled there.
        gradients: of what is trained.
        optimizer: its state.
        activations: what the backward pass reads.
        teachers: what the anchors hold the model to.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    teachers: float

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(getattr(self, part.name) for part in fields(self)))


def training_memory(shape: Shape, strategy: Strategy) -> Memory:
    """What one process holds at the widest point of a training step."""
    trained_width = FLOAT32 if shape.adapter or strategy.shards_weights else shape.width
    weights = (shape.weights - shape.packed) * shape.width + shape.packed * NF4_BYTES
    if strategy.shards_weights and not shape.adapter:
        weights = shape.weights * FLOAT32  # kept wide, gathered narrow
    if shape.adapter:
        weights += shape.trained * FLOAT32
    if strategy.shards_weights:
        weights = weights / strategy.processes + shape.largest_block * shape.width
    # An adapter begins at nothing, and its product with itself is small.
    pulled = shape.trained if shape.pulled and not shape.adapter else 0
    weights += pulled * shape.width
    gradients = shape.trained * trained_width
    moments = shape.trained * shape.moments * (shape.moment_bytes or trained_width)
    if strategy.shards_optimizer and not strategy.shards_weights and trained_width < FLOAT32:
        moments += shape.trained * FLOAT32  # DeepSpeed's own copy of what is trained
    return Memory(
        weights,
        gradients / (strategy.processes if strategy.shards_gradients else 1),
        moments / (strategy.processes if strategy.shards_optimizer else 1),
        # How far they have come is squared, so it is kept for the backward pass.
        _activations(shape) + pulled * FLOAT32,
        shape.taught,
    )


def _activations(shape: Shape) -> float:
    # Per token: two norms with what they read and write, queries, keys, values and what attention writes (twice: as
    # heads and as a row), and of the MLP the gate before and after its nonlinearity, what it multiplies, the product.
    block = 4 * shape.hidden + 5 * shape.heads + 4 * shape.inner
    kept = block + shape.layers * shape.hidden if shape.checkpointing else block * shape.layers
    tiles = shape.tiles * min(shape.tokens, TILE[0]) * min(shape.vocabulary, TILE[1]) * FLOAT32
    anchored = shape.anchor_answers * shape.vocabulary * (shape.width + ANCHORED * FLOAT32)
    # The pairs' unembedding and the anchors' take turns, while what the blocks computed stays for the backward pass.
    return (shape.tokens + shape.anchor_tokens) * kept * shape.width + max(tiles, anchored)
