"""Strides that grow with the distance."""

import dataclasses
import itertools

import numpy as np

from s2jax.patterns.bands import UNBOUNDED
from s2jax.patterns.base import DEFAULT_BLOCK_SIZE
from s2jax.patterns.checks import check_count
from s2jax.patterns.simple import lowest_distance
from s2jax.patterns.striped import Residues, Striped

Range = tuple[int | None, int]
"""(distance in blocks at which the range ends, or None for no end; stride)."""


@dataclasses.dataclass(frozen=True, repr=False)
class Ranges(Striped):
    """A stride for each range of distances.

    `Ranges(((2, 1), (None, 3)))` reads every block at distances i - j below 2, and one in three beyond.

    Within the range (bound, V), whose distances lie from the bound before to below its own, a head reads the blocks
    with (j + r(κ)) mod V = 0. What lies beyond the last bound is not read. If each stride divides the next, a block
    once dropped is never read again (`is_kv_efficient`), as r(κ) then is one residue, taken modulo every stride
    (`Striped.residues_of`). Bidirectional, |i - j| takes the place of i - j.

    `LocalStride(b, L, V)` is `Ranges(((L, 1), (None, V)), b)`.

    Attributes:
      ranges: pairs of (bound, stride), bounds ascending; None, no bound, may stand in the last.
      block_size, head_step, head_offset, homo_head, num_dense_heads, residues, causal: as in `LocalStride`.
    """

    ranges: tuple[Range, ...]
    block_size: int = DEFAULT_BLOCK_SIZE
    head_step: int | None = None
    head_offset: int = 0
    homo_head: bool = False
    num_dense_heads: int = 0
    residues: Residues = "kv_head"
    causal: bool = True

    def __post_init__(self):
        listed = self.ranges if isinstance(self.ranges, (list, tuple)) else ()
        pairs = tuple(tuple(pair) if isinstance(pair, (list, tuple)) else (pair,) for pair in listed)
        expected = "ranges must be pairs of (bound, stride), the bounds ascending, None only as the last bound"
        if not pairs or any(len(pair) != 2 for pair in pairs) or any(bound is None for bound, *_ in pairs[:-1]):
            raise ValueError(f"{expected}; got {self.ranges!r}")
        object.__setattr__(self, "ranges", pairs)
        for bound, stride in self.ranges:
            check_count("the stride of a range", stride, at_least=1)
            if bound is not None:
                check_count("the bound of a range", bound, at_least=1)
        if any(low >= high for low, high in itertools.pairwise(self._bounds())):
            raise ValueError(f"{expected}; got {self.ranges!r}")
        self.check_head_parameters()

    def _bounds(self) -> list[int]:
        return [0, *(UNBOUNDED if bound is None else bound for bound, _ in self.ranges)]

    @property
    def strides(self):
        return tuple(stride for _, stride in self.ranges)

    def _parts(self, heads, head):
        """(low, high, stride, residue) of each range."""
        bounds = itertools.pairwise(self._bounds())
        residues = self.residues_of(heads, head)
        return [
            (low, high, stride, residue)
            for (low, high), stride, residue in zip(bounds, self.strides, residues, strict=True)
        ]

    def mask_fn(self, head, query_position, key_position, heads):
        i, j = query_position // self.block_size, key_position // self.block_size
        distance = i - j if self.causal else abs(i - j)
        allowed = query_position - key_position >= lowest_distance(self.causal)
        found = np.asarray(self.is_dense(heads, head))
        for low, high, stride, residue in self._parts(heads, head):
            found = found | ((distance >= low) & (distance < high) & ((j + residue) % stride == 0))
        return found & allowed

    def block_bands(self, heads, head, num_rows, num_columns):
        everything = self.everything(num_columns)
        if self.is_dense(heads, head):
            return (everything,)
        found = []
        for low, high, stride, residue in self._parts(heads, head):
            columns = self.stripes(stride, residue, num_columns)
            found.append(dataclasses.replace(everything, columns=columns, block_low=low, block_high=high))
            if not self.causal:
                low, high = 1 - high if high < UNBOUNDED else -UNBOUNDED, 1 - low
                found.append(dataclasses.replace(everything, columns=columns, block_low=low, block_high=high))
        return tuple(found)
