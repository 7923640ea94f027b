"""What the code of the TPU kernels depends on."""

import dataclasses
import math

import numpy as np

LOG2E = math.log2(math.e)
AT_ONCE = 2
"""Steps that are computed in one go where there are as many left: what one waits for, the other hides."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything about a kernel that is known while tracing and that its code depends on.

    Attributes:
      heads, queries: of a tile.
      step: tokens of a step.
      key_dim, value_dim: padded to lanes.
      block_size: of the lists.
      num_parts, num_full: of the slices.
      list_length: entries of a list.
      kv_length: in whole blocks.
    """

    batch: int
    head_tiles: int
    tiles: int
    heads: int
    queries: int
    group: int
    key_dim: int
    value_dim: int
    dtype: np.dtype
    step: int
    block_size: int
    block_bits: int
    num_parts: int
    num_full: int
    list_length: int
    kv_length: int
    soft_cap: float | None

    @property
    def rows(self) -> int:
        return self.heads * self.queries

    @property
    def slot(self) -> int:
        """Tokens that one copy brings: a block, or as much of it as a step holds."""
        return min(self.block_size, self.step)

    @property
    def slots(self) -> int:
        return self.step // self.slot

    @property
    def pieces_of_block(self) -> int:
        """Slots that a block fills."""
        return self.block_size // self.slot
