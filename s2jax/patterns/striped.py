"""The base class of strided patterns, whose heads share out the stripes."""

import dataclasses
import typing

import numpy as np

from s2jax.patterns.bands import UNBOUNDED, Band, all_columns
from s2jax.patterns.base import DEFAULT_BLOCK_SIZE, BlockPattern
from s2jax.patterns.checks import check_block_size, check_count, check_flag
from s2jax.patterns.head_groups import HeadGroups
from s2jax.patterns.simple import lowest_distance

Residues = typing.Literal["kv_head", "query_head"]


class Striped(BlockPattern):
    """A family in which a head reads one block in `stride`, and another head another one.

    Each head has one residue r(κ) for each stride; κ is its KV head, or itself if `residues` is "query_head".
    """

    head_step: int | None
    head_offset: int
    homo_head: bool
    num_dense_heads: int
    residues: Residues

    def check_head_parameters(self) -> None:
        """Raises ValueError for parameters out of range."""
        check_block_size(self.block_size)
        check_count("num_dense_heads", self.num_dense_heads, at_least=0)
        check_count("head_offset", self.head_offset, at_least=0)
        if self.head_step is not None:
            check_count("head_step", self.head_step, at_least=0)
        check_flag("homo_head", self.homo_head)
        check_flag("causal", self.causal)
        if self.residues not in typing.get_args(Residues):
            raise ValueError(f'residues must be "kv_head" or "query_head", got {self.residues!r}')

    @property
    def strides(self) -> tuple[int, ...]:
        """The strides, from near to far."""
        raise NotImplementedError

    def check(self, heads, query_length, kv_length, query_offset):
        if self.num_dense_heads > heads.num_kv_heads:
            raise ValueError(
                f"num_dense_heads counts KV heads: expected at most {heads.num_kv_heads}, got {self.num_dense_heads}"
            )

    def is_strided(self) -> bool:
        return max(self.strides) > 1

    def is_dense(self, heads: HeadGroups, head: int) -> bool:
        return heads.kv_head(head) >= heads.num_kv_heads - self.num_dense_heads

    def head_key(self, heads, head):
        return "dense" if self.is_dense(heads, head) else self.residues_of(heads, head)

    def residues_of(self, heads: HeadGroups, head: int) -> tuple[int, ...]:
        """r(κ) for each stride V, modulo it: the head reads the blocks j with (j + r) mod V = 0.

        r(κ) = κ · head_step + head_offset; without a step, ⌊κ · V / number of κ⌋ + head_offset. Where a stride divides
        the next, say V and m·V, the next residue is the first plus V times a digit below m, which spreads the heads
        that share the first: so each head's far stripes are among its near ones, at any number of heads.
        """
        index, count = heads.kv_head(head), heads.num_kv_heads
        if self.residues == "query_head":
            index, count = head, heads.num_heads
        if self.homo_head:
            index = 0
        found: list[int] = []
        before, residue, rest = 1, 0, index  # residue + before · rest / count spreads the heads over the strides so far
        for stride in self.strides:
            if stride % before:
                before, residue, rest = 1, 0, index
            digit, rest = divmod(rest * (stride // before), count)
            residue, before = residue + before * digit, stride
            spread = residue if self.head_step is None else index * self.head_step
            found.append((spread + self.head_offset) % stride)
        return tuple(found)

    def stripes(self, stride: int, residue: int, num_columns: int) -> np.ndarray:
        """Columns of a band that reads one block in `stride`: int32 [1, num_columns]."""
        inside = (np.arange(num_columns) + residue) % stride == 0
        return np.where(inside, self.block_size, 0).astype(np.int32)[None]

    def everything(self, num_columns: int, block_low: int = -UNBOUNDED, block_high: int = UNBOUNDED) -> Band:
        """The band of all blocks at these distances, causal or not."""
        columns = all_columns(num_columns, self.block_size)
        return Band(columns, block_low, block_high, lowest_distance(self.causal))


@dataclasses.dataclass(frozen=True, repr=False)
class Strided(Striped):
    """Stripes alone: a head reads one block in `vert_stride`, (j + r(κ)) mod V = 0, and not even its own otherwise.

    For compositions, such as `Strided(vert_stride=8) | Local(tokens=1000)`. Parameters as in `LocalStride`.
    """

    block_size: int = DEFAULT_BLOCK_SIZE
    vert_stride: int = 8
    head_step: int | None = None
    head_offset: int = 0
    homo_head: bool = False
    num_dense_heads: int = 0
    residues: Residues = "kv_head"
    causal: bool = True

    def __post_init__(self):
        check_count("vert_stride", self.vert_stride, at_least=1)
        self.check_head_parameters()

    @property
    def strides(self):
        return (self.vert_stride,)

    def mask_fn(self, head, query_position, key_position, heads):
        allowed = query_position - key_position >= lowest_distance(self.causal)
        (residue,) = self.residues_of(heads, head)
        stripe = (key_position // self.block_size + residue) % self.vert_stride == 0
        return (stripe | self.is_dense(heads, head)) & allowed

    def block_bands(self, heads, head, num_rows, num_columns):
        everything = self.everything(num_columns)
        if self.is_dense(heads, head):
            return (everything,)
        (residue,) = self.residues_of(heads, head)
        return (dataclasses.replace(everything, columns=self.stripes(self.vert_stride, residue, num_columns)),)
