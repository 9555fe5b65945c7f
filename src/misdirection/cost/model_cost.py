"""The cost of one pass of a model, from its configuration alone: floating-point operations, bytes, seconds.

    forward    2 N t + 4 A t c + 2 V d h     t tokens, each of which attends to c columns; the head runs at h places
    backward   2 N' t + 8 A' t c + 2 V d h   through the activations of the adapted blocks only: the base is frozen, so
                                             that the other half of a backward pass, the weights' gradients, is not run
    LoRA       2 P t forward, 4 P t backward
    own        2 N'' t + 2 V d h more: the gradients of the blocks' own weights that are trained, and of the output
               matrix where all weights are
    recompute  the forward of the blocks that are passed backward once more, with gradient checkpointing

`N` are the weights of the blocks' matrices that a token passes (of a mixture the experts that it is sent to, never
all), `A` the sum over blocks of heads x head size, `V d` the output matrix, `P` the adapter's weights; N' and A' are
those of the blocks from the lowest trained one up, N'' those of the trained blocks. Embeddings are looked up, not
multiplied. Sources: 2 N a token, backward twice the forward, Kaplan et al. 2020 (2001.08361), section 2.1; attention,
4 A c a token, with the whole square of a causal mask counted, Chowdhery et al. 2022 (2204.02311), appendix B; half of
the backward for frozen weights, Hu et al. 2021 (2106.09685), section 4.2, where no gradient of the frozen weights is
kept; recomputation, Korthikanti et al. 2022 (2205.05198).

Peak memory of a stage is the sum of

    weights      all parameters x bytes of the dtype (all experts: any may be chosen)
    cache        rows x columns x 2 x key-value heads x head size x bytes, over blocks
    activations  inference: t (4 d + 3 I) bytes of one block, and h V (bytes + 8): logits and their float32 copies
                 training: t (6 d + 4 I + 2 K) bytes + 16 d t of every adapted block, and h V (bytes + 12); with
                 checkpointing of one block, and t d bytes of every adapted one; on a GPU the logits are then there at
                 512 places at a time, which is not counted
    optimiser    16 P: adapter, gradient and two moments of Adam in float32; of own weights likewise, beside the base

with `d` the width, `I` the inner width of the MLP (of the active experts), `K` the keys' and values' width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from misdirection.models.sizes import TRAINED_BYTES, Shape

Kind = Literal["forward", "training", "decoding"]


@dataclass(frozen=True)
class Pass:
    """One pass of a model, or several alike.

    Attributes:
        rows, columns: of the token ids, padding included.
        seen: columns in the cache before it.
        head: places at which the output matrix runs, over all rows.
        blocks: how many blocks run; None for all.
        back: how many blocks the backward pass goes through.
        recomputed: how many blocks run again in it.
        lora: weights of the adapters that act.
        trained: how many blocks have weights of their own that are trained.
        trains_head: whether embeddings and output matrix are trained, too.
        repeats: how many such passes.
        room: columns that the key-value cache is made for, where these are more than it holds.
        kind: what limits it: prompts and given text, training, or decoding token by token.
    """

    rows: int
    columns: int
    seen: float = 0
    head: int = 0
    blocks: int | None = None
    back: int = 0
    recomputed: int = 0
    lora: int = 0
    trained: int = 0
    trains_head: bool = False
    repeats: float = 1
    room: int = 0
    kind: Kind = "forward"

    @property
    def tokens(self) -> float:
        """Tokens, padding included."""
        return self.rows * self.columns * self.repeats

    def flops(self, shape: Shape) -> float:
        """Floating-point operations, a multiplication and an addition as two."""
        tokens, context = self.rows * self.columns, self.seen + self.columns
        run = shape.layers if self.blocks is None else self.blocks
        linear, square = 2 * shape.active / shape.layers, 4 * shape.attention / shape.layers * context
        block = run * (linear + square) + self.recomputed * (linear + square) + self.back * (linear + 2 * square)
        block += self.trained * linear
        head = ((4 if self.back else 2) + 2 * self.trains_head) * shape.head * self.head
        return self.repeats * (tokens * block + head) + self.adapter_flops

    @property
    def adapter_flops(self) -> float:
        """Those of the adapter's thin products, which run slower than others."""
        return (6 if self.back else 2) * self.lora * self.tokens

    def trained_weights(self, shape: Shape) -> float:
        """The weights that an optimiser has."""
        others = shape.parameters - shape.stored if self.trains_head else 0
        return self.lora + shape.stored / shape.layers * self.trained + others

    def bytes(self, shape: Shape) -> float:
        """Bytes that must be read from memory: weights once each way, and the keys and values before it."""
        run = (shape.layers if self.blocks is None else self.blocks) + self.recomputed + self.back
        tokens = self.rows * self.columns
        blocks = min(shape.stored, shape.active * tokens) * run / shape.layers
        weights = blocks + (shape.head * (2 if self.back else 1) if self.head else 0)
        return self.repeats * shape.bytes * (weights + self.rows * self.seen * shape.cached)


@dataclass(frozen=True)
class Memory:
    """Peak memory of a stage by what takes it, bytes."""

    weights: float = 0
    cache: float = 0
    activations: float = 0
    optimiser: float = 0

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.cache + self.activations + self.optimiser


def peak_memory(shape: Shape, passes: Sequence[Pass]) -> Memory:
    """The memory that the largest of some passes needs."""
    columns = max((each.rows * max(each.seen + each.columns, each.room) for each in passes if not each.back), default=0)
    trained = max((each.trained_weights(shape) for each in passes if each.kind == "training"), default=0)
    return Memory(
        weights=shape.parameters * shape.bytes,
        cache=columns * shape.cached * shape.bytes,
        activations=max((_activations(shape, each) for each in passes), default=0),
        optimiser=TRAINED_BYTES * trained,
    )


def _activations(shape: Shape, one: Pass) -> float:
    tokens = one.rows * one.columns
    if not one.back:
        return tokens * shape.token_bytes + one.head * shape.logit_bytes
    kept = shape.kept_bytes(one.back, checkpointed=one.recomputed > 0)
    return tokens * kept + one.head * shape.logit_bytes_back
