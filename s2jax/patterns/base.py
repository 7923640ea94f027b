"""Pattern: the base class of all patterns, with `|`, `&` and statistics."""

import abc
import dataclasses
import functools
import typing
from collections.abc import Hashable, Iterable

import numpy as np
from jaxtyping import Bool, Int

from s2jax.patterns import statistics
from s2jax.patterns.agreement import checked_heads
from s2jax.patterns.bands import Band, block_states, intersect_all, refine
from s2jax.patterns.evaluation import evaluated, outside_traces, tile_positions
from s2jax.patterns.head_groups import HeadGroups

DEFAULT_BLOCK_SIZE = 64
"""Tokens in a block for patterns that have no blocks of their own, such as `Dense`."""

OPTIONS = {"head_step", "head_offset", "homo_head", "num_dense_heads", "residues", "causal"}
"""Parameters that `repr` shows only where they differ from their defaults."""


class Pattern(abc.ABC):
    """The keys that each query reads, for each head. A small frozen, hashable value.

    `mask_fn` is the definition, token by token. `bands` is its closed form, from which schedules and statistics are
    computed; if it returns None, `mask_fn` is evaluated on every token. A closed form that differs from `mask_fn`
    raises ValueError when the pattern is compiled, as far as a sample shows it: all pairs of small inputs, a few
    thousand pairs of large ones.

    A custom family is a frozen dataclass with these methods; `BlockPattern` is the easier base for rules over blocks.
    """

    causal: bool

    @abc.abstractmethod
    def mask_fn(self, head: int, query_position: np.ndarray, key_position: np.ndarray, heads: HeadGroups) -> np.ndarray:
        """True where query head `head` at `query_position` reads `key_position`. The definition of the pattern.

        Args:
          head: number of the query head.
          query_position: integers, absolute positions, which broadcast with those of the keys.
          key_position: integers.
          heads: counts of query and KV heads.

        Returns:
          bool, of the shape to which the positions broadcast.
        """

    @abc.abstractmethod
    def bands(
        self, heads: HeadGroups, head: int, block_size: int, num_rows: int, num_columns: int
    ) -> tuple[Band, ...] | None:
        """The closed form over blocks of `block_size` tokens, `num_rows` by `num_columns`; None if there is none."""

    @property
    def nbytes(self) -> int:
        """Bytes of the masks that the pattern holds."""
        return 0

    def own_block_size(self) -> int | None:
        """The block size of the definition, or None if it has no blocks."""
        return None

    def schedule_block_size(self) -> int:
        """The block size in which the pattern is compiled and its blocks are counted."""
        return self.own_block_size() or DEFAULT_BLOCK_SIZE

    def head_key(self, heads: HeadGroups, head: int) -> Hashable:
        """A key that is equal for heads that read the same, which are then compiled once."""
        return head

    def is_strided(self) -> bool:
        """True if heads share out the context by stripes, so that together they may miss some of it."""
        return False

    def check(self, heads: HeadGroups, query_length: int, kv_length: int, query_offset: int) -> None:  # noqa: B027 (most fit all)
        """Raises ValueError if the pattern does not fit these heads or lengths."""

    def block_states(
        self, heads: HeadGroups, head: int, block_size: int, rows: np.ndarray, num_columns: int
    ) -> np.ndarray:
        """The states of pairs of blocks, at any block size that divides the pattern's own, without using `mask_fn`.

        Args:
          heads: counts of query and KV heads.
          head: number of the query head.
          block_size: tokens in a block.
          rows: int [rows], absolute query blocks.
          num_columns: count of key blocks.

        Returns:
          uint8 [rows, num_columns]: 0 = unread, 1 = perhaps partly read, 2 = wholly read. All are 1 without a closed
          form, and `mask_fn` decides token by token.
        """
        found = self.bands(heads, head, block_size, int(rows.max(initial=0)) + 1, num_columns)
        if found is None:
            return np.ones((len(rows), num_columns), np.uint8)
        return block_states(found, block_size, rows, num_columns)

    def token_tiles(
        self, heads: HeadGroups, head: int, block_size: int, rows: np.ndarray, columns: np.ndarray, query_stop: int,
        kv_stop: int,
    ) -> Bool[np.ndarray, "n block_size block_size"]:  # fmt: skip
        """The token masks of pairs of blocks, by `mask_fn`.

        Args:
          heads: counts of query and KV heads.
          head: number of the query head.
          block_size: tokens in a block.
          rows: int [n], absolute query blocks.
          columns: int [n], absolute key blocks.
          query_stop: end of the queries. Padding beyond has the last query's position.
          kv_stop: end of the keys. Padding beyond has the last key's position.

        Returns:
          bool [n, block_size, block_size], query by key.
        """
        query, key = tile_positions(block_size, rows, columns, query_stop, kv_stop)
        return evaluated(self, heads, head, query, key)

    @outside_traces
    def token_mask(
        self, num_heads: int, num_kv_heads: int, query_length: int, kv_length: int, query_offset: int = 0
    ) -> Bool[np.ndarray, "h t s"]:
        """The token mask of the pattern: bool [h, t, s], True where the query head reads. For tests and small lengths.

        Raises:
          ValueError: the pattern does not fit these heads or lengths.
        """
        heads = HeadGroups(num_heads, num_kv_heads)
        self.check(heads, query_length, kv_length, query_offset)
        query_position = query_offset + np.arange(query_length)[:, None]
        key_position = np.arange(kv_length)[None, :]
        return np.stack([evaluated(self, heads, head, query_position, key_position) for head in range(num_heads)])

    # Statistics at one length, from the closed form if there is one.

    @outside_traces
    def block_mask(self, num_heads: int, num_kv_heads: int, length: int) -> Bool[np.ndarray, "h n n"]:
        """The block mask: bool [h, n, n], n = ⌈length / block size⌉, True for blocks of which any token is read."""
        return statistics.block_mask(self, checked_heads(self, num_heads, num_kv_heads, length), length)

    @outside_traces
    def density(self, num_heads: int, num_kv_heads: int, length: int) -> float:
        """The number of blocks read, over the h·n·(n+1)/2 of a causal dense pattern (all h·n² if bidirectional)."""
        return statistics.density(self, checked_heads(self, num_heads, num_kv_heads, length), length)

    @outside_traces
    def coverage(self, num_heads: int, num_kv_heads: int, length: int) -> float:
        """The share of the far context that the heads together read.

        That is the share of key blocks beyond the window that the last query block reads through at least one head.
        The window is common to all heads: the blocks at distances 0, 1, … up to the first distance at which some head
        leaves out some block. The result is 1.0 if the window is everything.
        """
        return statistics.coverage(self, checked_heads(self, num_heads, num_kv_heads, length), length)

    @outside_traces
    def is_kv_efficient(self, num_heads: int, num_kv_heads: int, length: int) -> bool:
        """True if a block once dropped is never read again, so that no KV head keeps a block that is not read.

        For every KV head and key block, the query blocks that read it through any head of the group are then without a
        gap and, if causal, begin with the block's own.
        """
        return statistics.is_kv_efficient(self, checked_heads(self, num_heads, num_kv_heads, length), length)

    @outside_traces
    def kv_blocks_kept(self, num_heads: int, num_kv_heads: int, length: int) -> Int[np.ndarray, "k"]:
        """The most blocks that each KV head must hold at once while `length` tokens are decoded: int [k].

        A block is held from its own query block (in a bidirectional pattern: from the first) to the last query block
        that reads it through any head of the group.
        """
        return statistics.kv_blocks_kept(self, checked_heads(self, num_heads, num_kv_heads, length), length)

    def warn_if_incomplete(self, num_heads: int, num_kv_heads: int, length: int) -> None:
        """Warns if striped heads together miss some of the context, or if queries do not read their own block."""
        statistics.warn_if_incomplete(self, checked_heads(self, num_heads, num_kv_heads, length), length)

    # Functions, bool arrays and text compose with patterns, on either side.

    __array_ufunc__ = None  # numpy's arrays leave `array | pattern` to the pattern

    def __or__(self, other: typing.Any) -> "Pattern":
        return _compose(Union, self, other, "|")

    def __ror__(self, other: typing.Any) -> "Pattern":
        return _compose(Union, other, self, "|")

    def __and__(self, other: typing.Any) -> "Pattern":
        return _compose(Intersection, self, other, "&")

    def __rand__(self, other: typing.Any) -> "Pattern":
        return _compose(Intersection, other, self, "&")

    def __repr__(self) -> str:
        fields = dataclasses.fields(typing.cast(typing.Any, self))
        values = ((field, getattr(self, field.name)) for field in fields)
        shown = [
            f"{field.name}={value!r}"
            for field, value in values
            if value is not None and not (field.name in OPTIONS and value == field.default)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


class BlockPattern(Pattern):
    """Base of patterns over blocks: query blocks read key blocks, then token-causal or not."""

    block_size: int

    @abc.abstractmethod
    def block_bands(self, heads: HeadGroups, head: int, num_rows: int, num_columns: int) -> tuple[Band, ...] | None:
        """The closed form over blocks of the pattern's own size; None if there is none."""

    def own_block_size(self) -> int | None:
        return self.block_size

    def bands(self, heads, head, block_size, num_rows, num_columns):
        ratio = self._ratio(block_size)
        coarse = self.block_bands(heads, head, -(-num_rows // ratio), -(-num_columns // ratio))
        if coarse is None or ratio == 1:
            return coarse
        return tuple(fine for band in coarse for fine in refine(band, ratio, block_size, num_columns))

    def _ratio(self, block_size: int) -> int:
        if self.block_size % block_size:
            raise ValueError(f"{self!r} does not split into blocks of {block_size} tokens")
        return self.block_size // block_size


def _compose(kind: type["_Composition"], first: typing.Any, second: typing.Any, symbol: str) -> Pattern:
    from s2jax.patterns.coercion import as_pattern  # makes families out of other things, and so knows of them

    try:
        return join(kind, [as_pattern(first), as_pattern(second)])
    except ValueError as error:
        raise TypeError(f"`{symbol}` joins two patterns: {error}") from None


def join(kind: type["_Composition"], patterns: Iterable[Pattern]) -> Pattern:
    """The union or intersection of at least one pattern.

    Flat operands, each once, make equal compositions compare and hash equal, however they were bracketed.
    """
    parts = dict.fromkeys(part for each in patterns for part in (each.parts if isinstance(each, kind) else (each,)))
    return kind(tuple(parts)) if len(parts) > 1 else next(iter(parts))


@dataclasses.dataclass(frozen=True, repr=False)
class _Composition(Pattern):
    parts: tuple[Pattern, ...]
    symbol: typing.ClassVar[str]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def own_block_size(self) -> int | None:
        sizes = [size for part in self.parts if (size := part.own_block_size()) is not None]
        return min(sizes, default=None)

    def head_key(self, heads, head):
        return tuple(part.head_key(heads, head) for part in self.parts)

    def is_strided(self) -> bool:
        return any(part.is_strided() for part in self.parts)

    def check(self, heads, query_length, kv_length, query_offset):
        for part in self.parts:
            part.check(heads, query_length, kv_length, query_offset)

    def _part_states(self, *arguments) -> list[np.ndarray]:
        return [part.block_states(*arguments) for part in self.parts]

    def _part_tiles(self, *arguments) -> list[np.ndarray]:
        return [part.token_tiles(*arguments) for part in self.parts]

    def _part_bands(self, *arguments) -> list[tuple[Band, ...]] | None:
        found = []
        for part in self.parts:
            bands = part.bands(*arguments)
            if bands is None:
                return None
            found.append(bands)
        return found

    def __repr__(self) -> str:
        parts = (f"({part!r})" if isinstance(part, _Composition) else repr(part) for part in self.parts)
        return f" {self.symbol} ".join(parts)


class Union(_Composition):
    """Reads the keys that any of the parts reads; written `a | b`."""

    symbol = "|"

    @property
    def causal(self) -> bool:
        return all(part.causal for part in self.parts)

    def mask_fn(self, head, query_position, key_position, heads):
        return functools.reduce(
            np.logical_or, (part.mask_fn(head, query_position, key_position, heads) for part in self.parts)
        )

    def bands(self, heads, head, block_size, num_rows, num_columns):
        found = self._part_bands(heads, head, block_size, num_rows, num_columns)
        return None if found is None else tuple(band for bands in found for band in bands)

    def block_states(self, heads, head, block_size, rows, num_columns):
        return functools.reduce(np.maximum, self._part_states(heads, head, block_size, rows, num_columns))

    def token_tiles(self, heads, head, block_size, rows, columns, query_stop, kv_stop):
        tiles = self._part_tiles(heads, head, block_size, rows, columns, query_stop, kv_stop)
        return functools.reduce(np.logical_or, tiles)


class Intersection(_Composition):
    """Reads the keys that all of the parts read; written `a & b`."""

    symbol = "&"

    @property
    def causal(self) -> bool:
        return any(part.causal for part in self.parts)

    def mask_fn(self, head, query_position, key_position, heads):
        return functools.reduce(
            np.logical_and, (part.mask_fn(head, query_position, key_position, heads) for part in self.parts)
        )

    def bands(self, heads, head, block_size, num_rows, num_columns):
        found = self._part_bands(heads, head, block_size, num_rows, num_columns)
        if found is None:
            return None
        met: tuple[Band, ...] | None = found[0]
        for bands in found[1:]:
            met = None if met is None else intersect_all(met, bands)
        return met

    def block_states(self, heads, head, block_size, rows, num_columns):
        return functools.reduce(np.minimum, self._part_states(heads, head, block_size, rows, num_columns))

    def token_tiles(self, heads, head, block_size, rows, columns, query_stop, kv_stop):
        tiles = self._part_tiles(heads, head, block_size, rows, columns, query_stop, kv_stop)
        return functools.reduce(np.logical_and, tiles)
