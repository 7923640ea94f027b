"""The pattern of stripes at relative positions, DKernel's default for bidirectional attention."""

import dataclasses

import numpy as np

from s2jax.patterns.bands import UNBOUNDED, Band, all_columns
from s2jax.patterns.base import DEFAULT_BLOCK_SIZE
from s2jax.patterns.checks import Window, check_count, check_window, window_sides
from s2jax.patterns.simple import lowest_distance
from s2jax.patterns.striped import HeadResidues, Residues

LONGEST_TABLE = 128
"""Rows of a band's table that are worth their memory; beyond, there is one band for each distance."""


@dataclasses.dataclass(frozen=True, repr=False)
class RelativeStride(HeadResidues):
    """Reads a local window, and beyond it one *distance* in `vert_stride`: stripes along the diagonal.

    With i, j, V and κ as in `LocalStride`, and a window of (left, right) blocks that both count the own one, a head
    reads the window and

        (i - j - left + 1 + r(κ)) mod V = 0   on the left,   (j - i - right + 1 + r(κ)) mod V = 0   on the right

    and, if `causal`, no token after its own. With `homo_head=True`, where all heads read the same distances, this is
    DKernel's `vert_position_type="relative"`, its default for bidirectional patterns. Such stripes save nothing in a KV
    cache: every block is read again by later queries.

    Attributes:
      local_blocks: blocks in the window, at least 1, or a pair (left, right) if not causal.
      block_size, vert_stride, head_step, head_offset, homo_head, num_dense_heads, residues: as in `LocalStride`.
      causal: True: no query reads a token after its own. Unlike elsewhere, False by default.
    """

    block_size: int = DEFAULT_BLOCK_SIZE
    local_blocks: Window = 16
    vert_stride: int = 8
    head_step: int | None = None
    head_offset: int = 0
    homo_head: bool = False
    num_dense_heads: int = 0
    residues: Residues = "kv_head"
    causal: bool = False

    def __post_init__(self):
        check_window("local_blocks", self.local_blocks, self.causal)
        for side in self.local_blocks if isinstance(self.local_blocks, tuple) else (self.local_blocks,):
            check_count("local_blocks", side, at_least=1)
        check_count("vert_stride", self.vert_stride, at_least=1)
        self.check_head_parameters()

    def mask_fn(self, head, query_position, key_position, heads):
        distance = query_position // self.block_size - key_position // self.block_size
        left, right = window_sides(self.local_blocks, self.causal)
        (residue,) = self.residues_of(heads, head)
        near = (distance < left) & (-distance < right)
        beyond = np.where(distance >= left, distance - left, -distance - right) + 1
        stripe = (beyond + residue) % self.vert_stride == 0
        allowed = query_position - key_position >= lowest_distance(self.causal)
        return (near | stripe | self.is_dense(heads, head)) & allowed

    def block_bands(self, heads, head, num_rows, num_columns):
        everything = Band(all_columns(num_columns, self.block_size), token_low=lowest_distance(self.causal))
        if self.is_dense(heads, head):
            return (everything,)
        left, right = window_sides(self.local_blocks, self.causal)
        (residue,) = self.residues_of(heads, head)
        window = dataclasses.replace(everything, block_low=1 - right, block_high=left)
        # Distances from the window's edge on that are read: the first, and from there every vert_stride-th.
        first = (-1 - residue) % self.vert_stride
        found = [window, *self._diagonals(everything, left + first, num_rows, 1)]
        if not self.causal:
            found += self._diagonals(everything, right + first, num_columns, -1)
        return tuple(found)

    def _diagonals(self, everything: Band, start: int, stop: int, sign: int) -> list[Band]:
        """Bands of the distances `start`, `start + vert_stride`, … below `stop`, times the sign."""
        if self.vert_stride > LONGEST_TABLE:
            distances = [sign * each for each in range(start, stop, self.vert_stride)]
            return [dataclasses.replace(everything, block_low=each, block_high=each + 1) for each in distances]
        distance = np.arange(self.vert_stride)[:, None] - np.arange(everything.columns.shape[1])
        read = (sign * distance - start) % self.vert_stride == 0
        columns = np.where(read, self.block_size, 0).astype(np.int32)
        low, high = (start, UNBOUNDED) if sign > 0 else (-UNBOUNDED, 1 - start)
        return [dataclasses.replace(everything, columns=columns, block_low=low, block_high=high)]
