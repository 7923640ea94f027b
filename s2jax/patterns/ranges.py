"""The pattern of strides that grow with the distance."""

import dataclasses
import itertools

from s2jax.patterns.bands import UNBOUNDED
from s2jax.patterns.base import DEFAULT_BLOCK_SIZE
from s2jax.patterns.checks import check_count
from s2jax.patterns.striped import Residues, Striped, Stripes

Range = tuple[int | None, int]
"""(distance in blocks at which the range ends, or None for no end; stride)."""


@dataclasses.dataclass(frozen=True, repr=False)
class Ranges(Striped):
    """A stride for each range of distances.

    `Ranges(((2, 1), (None, 3)))` reads every block at distances i - j below 2, and one in three beyond. Within the
    range (bound, V), which begins at the bound before, a head reads the blocks with (j + r(κ)) mod V = 0. Blocks beyond
    the last bound are not read. If each stride divides the next, a block once dropped is never read again
    (`is_kv_efficient`), as r(κ) then is one residue, taken modulo every stride (`Striped.residues_of`). If not causal,
    the distance is |i - j|.

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

    def stripes(self, heads, head):
        found = []
        bounds = itertools.pairwise(self._bounds())
        for (low, high), stride, residue in zip(bounds, self.strides, self.residues_of(heads, head), strict=True):
            found.append(Stripes(low, high, stride, residue))
            if not self.causal:
                found.append(Stripes(1 - high if high < UNBOUNDED else -UNBOUNDED, 1 - low, stride, residue))
        return found
