"""What the code of the kernels depends on."""

import dataclasses
import math

import numpy as np

from pallas_kernels.mosaic_gpu.untyped import plgpu

WARPGROUPS, WARPGROUP_ROWS = 2, 64
ROWS = WARPGROUPS * WARPGROUP_ROWS
WORD_BITS = 32
"""Bits of a word of a mask."""

LOG2E = math.log2(math.e)


def bits_per_word(slot: int) -> int:
    """How many bits of a word are used for slots of so many tokens: no word is of two slots."""
    return min(slot, WORD_BITS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Everything about a kernel that is known while tracing and that its code depends on.

    Attributes:
      step_size: tokens of a step.
      num_stages: steps that are loaded ahead.
      block_size: of the lists.
      num_parts, num_full: of the slices, as in `BlockLists`.
      scale: of the logits; above 0.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: np.dtype
    step_size: int
    num_stages: int
    block_size: int
    num_ranges: int
    num_full_ranges: int
    scale: float
    soft_cap: float | None

    @property
    def slot(self) -> int:
        """Tokens that one copy brings: a block, or as much of it as a step holds."""
        return min(self.block_size, self.step_size)

    @property
    def slots(self) -> int:
        return self.step_size // self.slot

    @property
    def pieces_of_block(self) -> int:
        """Slots that a block fills."""
        return self.block_size // self.slot

    @property
    def mask_words(self) -> int:
        """Words of mask bits for every row of a slot."""
        return self.slot // bits_per_word(self.slot)

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def transforms(self, features: int, summed: int | None = None) -> tuple:
        """How rows of so many features lie in shared memory: in the widest swizzle that divides them.

        Args:
          summed: where a product sums over rows, so many at a time: the swizzle has to divide that too.
        """
        lengths = [length * self.dtype.itemsize for length in (features, summed or features)]
        swizzle = next(size for size in (128, 64, 32) if not any(length % size for length in lengths))
        tiling = plgpu.TilingTransform((8, swizzle // self.dtype.itemsize))
        return tiling, plgpu.SwizzleTransform(swizzle)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(StepPlan):
    """Of the kernels whose rows are queries and whose steps are keys.

    Attributes:
      block_q: tokens of a tile, which has as many heads as make ROWS rows of them.
      num_tiles: how many there are for every head.
    """

    block_q: int
    num_tiles: int

    @property
    def heads_per_tile(self) -> int:
        """Query heads in a tile."""
        return ROWS // self.block_q

    @property
    def piece(self) -> int:
        """Consecutive queries of one head in a warpgroup."""
        return min(self.block_q, WARPGROUP_ROWS)

    @property
    def pieces(self) -> int:
        return WARPGROUP_ROWS // self.piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVPlan(StepPlan):
    """Of the kernel whose rows are keys and whose steps are queries.

    Attributes:
      packs: how many tiles there are for every KV head.
      key_block: keys that stand together in a pack; `block_size` is that of the queries.
      head_passes: 1 where the heads of a group read the same, else as many as there are heads, each with its own lists.
      gradients: of "key" and "value", those that are summed in one go.
    """

    kv_tiles: int
    key_block: int
    head_passes: int
    gradients: tuple[str, ...] = ("key", "value")

    @property
    def group_heads(self) -> int:
        """How many heads walk the same lists."""
        return self.group // self.head_passes

    @property
    def piece(self) -> int:
        """Consecutive keys in a warpgroup."""
        return min(self.key_block, WARPGROUP_ROWS)

    @property
    def pieces(self) -> int:
        return WARPGROUP_ROWS // self.piece
