"""What the code of the TPU kernels depends on."""

import dataclasses
import math

import numpy as np

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything about a kernel that is known while tracing and that its code depends on.

    The rows of a tile are queries of one or more heads, and its steps are keys; or, in the kernel of the keys'
    gradients, the rows are keys and the steps are queries of one or more heads.

    Attributes:
      head_tiles: how many times the tiles are walked, once for all heads in a tile.
      num_tiles: how many there are each time.
      head_passes: how many times each tile is walked, each time by lists of its own.
      row_heads, row_tokens: of a tile.
      key_dim, value_dim: padded to lanes.
      step_size: rows of what a step multiplies the tile with.
      step_heads: heads that a step has of every token.
      slot: tokens that one copy brings.
      piece_bits: of an entry, which the number of the slot's tokens takes.
      nothing: what stands above them in an entry that is masked altogether.
      num_parts, num_full: of the slices.
      list_length: entries of a list.
      in_steps: whether the entries of a row fill whole steps, one after the other.
      scale: of the logits.
      ascending: whether a row sees what comes before it: where rows are queries.
      member_size: where an entry has a bit for each of the row's blocks of keys, how many tokens those have.
    """

    batch: int
    head_tiles: int
    num_tiles: int
    head_passes: int
    row_heads: int
    row_tokens: int
    group: int
    key_dim: int
    value_dim: int
    dtype: np.dtype
    step_size: int
    step_heads: int
    slot: int
    piece_bits: int
    nothing: int
    num_ranges: int
    num_full_ranges: int
    list_length: int
    in_steps: bool
    scale: float
    soft_cap: float | None
    ascending: bool
    member_size: int | None = None

    @property
    def rows(self) -> int:
        return self.row_heads * self.row_tokens

    @property
    def slots(self) -> int:
        return self.step_size // (self.slot * self.step_heads)

    @property
    def row_numbers(self) -> int:
        """What scalar memory holds of every row: the ends of its slices, and the next row that reads something."""
        return 2 * self.num_ranges + 1
