"""Patterns of stripes, and the residues by which heads share out the stripes."""

import abc
import dataclasses
import typing

import numpy as np

from s2jax.patterns.bands import UNBOUNDED, Band, all_columns
from s2jax.patterns.base import DEFAULT_BLOCK_SIZE, BlockPattern
from s2jax.patterns.checks import check_block_size, check_count, check_flag
from s2jax.patterns.head_groups import HeadGroups
from s2jax.patterns.simple import lowest_distance

Residues = typing.Literal["kv_head", "query_head"]


class HeadResidues(BlockPattern):
    """Base of the families in which each head reads one block in `vert_stride`, other heads other blocks.

    Each head has one residue r(κ) for each stride; κ is its KV head, or itself if `residues` is "query_head".
    """

    vert_stride: int

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
        return (self.vert_stride,)

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
        """The residues r(κ) for each stride V, modulo it: the head reads the blocks j with (j + r) mod V = 0.

        r(κ) = κ · head_step + head_offset; without a step, ⌊κ · V / number of κ⌋ + head_offset. If a stride divides the
        next, say V and m·V, the next residue is the first plus V times a digit below m, which spreads the heads that
        share the first. So each head's far stripes are among its near ones, at any number of heads.
        """
        index, count = heads.kv_head(head), heads.num_kv_heads
        if self.residues == "query_head":
            index, count = head, heads.num_heads
        if self.homo_head:
            index = 0
        found: list[int] = []
        before, residue, rest = 1, 0, index  # residue + before · rest / count spreads heads over the strides so far
        for stride in self.strides:
            if stride % before:
                before, residue, rest = 1, 0, index
            digit, rest = divmod(rest * (stride // before), count)
            residue, before = residue + before * digit, stride
            spread = residue if self.head_step is None else index * self.head_step
            found.append((spread + self.head_offset) % stride)
        return tuple(found)


class Stripes(typing.NamedTuple):
    """Key blocks j that a query block i reads: low <= i - j < high and (j + residue) mod stride = 0."""

    low: int
    high: int
    stride: int
    residue: int


class Striped(HeadResidues):
    """Base of the families whose stripes stand at absolute positions."""

    @abc.abstractmethod
    def stripes(self, heads: HeadGroups, head: int) -> list[Stripes]:
        """The stripes that a head reads, unless it is dense."""

    def mask_fn(self, head, query_position, key_position, heads):
        j = key_position // self.block_size
        distance = query_position // self.block_size - j
        found = self.is_dense(heads, head)
        for low, high, stride, residue in self.stripes(heads, head):
            found = found | ((distance >= low) & (distance < high) & ((j + residue) % stride == 0))
        return found & (query_position - key_position >= lowest_distance(self.causal))

    def block_bands(self, heads, head, num_rows, num_columns):
        low, column = lowest_distance(self.causal), np.arange(num_columns)
        if self.is_dense(heads, head):
            return (Band(all_columns(num_columns, self.block_size), token_low=low),)
        return tuple(
            Band(np.where((column + each.residue) % each.stride == 0, self.block_size, 0).astype(np.int32)[None],
                 each.low, each.high, low)
            for each in self.stripes(heads, head)
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, repr=False)
class Strided(Striped):
    """Reads stripes alone: one block in `vert_stride`, (j + r(κ)) mod V = 0, and the query's own only if it is one.

    It serves compositions, such as `Strided(vert_stride=8) | Local(tokens=1000)`. Parameters as in `LocalStride`.
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

    def stripes(self, heads, head):
        return [Stripes(-UNBOUNDED, UNBOUNDED, self.vert_stride, *self.residues_of(heads, head))]
