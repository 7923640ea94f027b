"""Compiled patterns: rows of query blocks, each of which reads ranges of shared lists of key blocks."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Bool, Int32

WHOLE, NOTHING = 0, 1
"""The first two token masks of every schedule: all tokens by all tokens, and none."""


@dataclasses.dataclass(frozen=True, eq=False)
class BlockLists:
    """Rows, each of which reads a few ranges of shared lists.

    In a strided pattern row i reads a prefix of its head's list of stripes, and its window, a range of the list of all
    blocks. So the lists are O(n) for every head, where one list per row would be O(n² · density).

    Attributes:
      blocks: int32 [entries], the lists, concatenated; ascending inside a list.
      mask_ids: int32 [entries], which token mask applies to the entry; 0 = none, all tokens are read.
      ranges: int32 [unique_heads, rows, ranges, 2], start and stop in `blocks`. The ranges of a row are disjoint.
      offsets: int32 [lists + 1], where in `blocks` each list begins and the last one ends.
      num_full_ranges: the first `num_full_ranges` of every row hold full entries, which have no mask.
    """

    blocks: Int32[np.ndarray, " entries"]
    mask_ids: Int32[np.ndarray, " entries"]
    offsets: Int32[np.ndarray, " lists+1"]
    ranges: Int32[np.ndarray, "unique_heads rows ranges 2"]
    num_full_ranges: int

    @property
    def num_unique_heads(self) -> int:
        return self.ranges.shape[0]

    @property
    def num_rows(self) -> int:
        return self.ranges.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.blocks, self.mask_ids, self.offsets, self.ranges))

    def counts(self) -> Int32[np.ndarray, "unique_heads rows 2"]:
        """Numbers of full and of partial entries of every row."""
        lengths = self.ranges[..., 1] - self.ranges[..., 0]
        full, partial = lengths[..., : self.num_full_ranges], lengths[..., self.num_full_ranges :]
        return np.stack([full.sum(-1), partial.sum(-1)], -1).astype(np.int32)

    def entries(self, unique_head: int, part: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """All (row, position in the lists) pairs of a unique head, rows ascending."""
        starts, stops = self.ranges[unique_head, :, part, 0], self.ranges[unique_head, :, part, 1]
        rows = np.broadcast_to(np.arange(self.num_rows)[:, None], starts.shape)
        return expand(rows.reshape(-1), starts.reshape(-1), stops.reshape(-1))


def expand(labels: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every position of every interval, with its interval's label."""
    lengths = np.maximum(stops - starts, 0)
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
    return np.repeat(labels, lengths), positions


class ListTable:
    """Collects lists of blocks; equal lists are stored once."""

    def __init__(self):
        self._pieces = [(np.zeros(0, np.int32), np.zeros(0, np.int32))]
        self._lengths = [np.zeros(0, np.int64)]
        self._offsets: dict[tuple[bytes, bytes], int] = {}
        self._total = 0

    def add(self, blocks: np.ndarray, mask_ids: np.ndarray | None = None) -> int:
        """Adds a list; returns the position of its first entry."""
        blocks = np.asarray(blocks, np.int32)
        mask_ids = np.zeros(len(blocks), np.int32) if mask_ids is None else np.asarray(mask_ids, np.int32)
        key = (blocks.tobytes(), mask_ids.tobytes())
        if key not in self._offsets:
            self._offsets[key] = self.add_many(blocks, mask_ids, np.array([len(blocks)]))
        return self._offsets[key]

    def add_many(self, blocks: np.ndarray, mask_ids: np.ndarray, lengths: np.ndarray) -> int:
        """Adds several lists, which are not shared; returns the position of the first entry."""
        self._pieces.append((blocks.astype(np.int32), mask_ids.astype(np.int32)))
        self._lengths.append(lengths)
        offset, self._total = self._total, self._total + len(blocks)
        return offset

    def lists(self, ranges: np.ndarray, num_full_ranges: int) -> BlockLists:
        """The lists, read by the given ranges."""
        blocks, mask_ids = (np.concatenate(arrays) for arrays in zip(*self._pieces, strict=True))
        offsets = np.append(0, np.cumsum(np.concatenate(self._lengths))).astype(np.int32)
        return BlockLists(blocks, mask_ids, offsets, ranges.astype(np.int32, copy=False), num_full_ranges)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class BlockSchedule:
    """A pattern for given heads and lengths, compiled; free of any kernel's tiles.

    Row r of `lists` is the query block `first_row + r`, in absolute positions. If `query_offset` is no multiple of the
    block size, the first row holds fewer queries. If the offset is only known at run time, `first_row` is 0.

    Attributes:
      lists: the blocks that the rows of every unique head read. Heads that read the same blocks are one unique head.
      head_index: int32 [heads], the unique head of every query head.
      token_masks: bool [masks, block_size, block_size], query by key, each mask once; the first two are all and none.
      differ_among: `differ_among(shards)` is True if heads of the pattern read differently, also among so many times as
        many heads; None where there is no pattern.
    """

    block_size: int
    num_heads: int
    num_kv_heads: int
    query_length: int
    kv_length: int
    query_offset: int
    lists: BlockLists
    head_index: Int32[np.ndarray, " h"]
    token_masks: Bool[np.ndarray, "mask_ids block_size block_size"]
    differ_among: Callable[[tuple[int, ...]], bool] | None = dataclasses.field(default=None, repr=False)

    def heads_differ(self, shards: tuple[int, ...]) -> bool:
        """True if a shard of the heads must know its place: heads differ, here or among so many times as many."""
        if self.differ_among is not None:
            return self.differ_among(shards)
        return bool((self.head_index != self.head_index[:1]).any())

    @property
    def query_block(self) -> int:
        """Queries in a row, as in a `BlockSelection`."""
        return self.block_size

    @property
    def first_row(self) -> int:
        return self.query_offset // self.block_size

    @property
    def num_columns(self) -> int:
        return -(-self.kv_length // self.block_size)

    @property
    def nbytes(self) -> int:
        return self.lists.nbytes + self.head_index.nbytes + self.token_masks.nbytes

    @property
    def shares_groups(self) -> bool:
        """True if the query heads of every group read the same blocks."""
        groups = self.head_index.reshape(self.num_kv_heads, -1)
        return bool((groups == groups[:, :1]).all())

    @functools.cached_property
    def transposed(self) -> BlockLists:
        """The transposed lists: a row is a key block, its entries are the rows of queries that read it."""
        return transpose(self.lists, self.num_columns)

    def token_mask(self) -> Bool[np.ndarray, "h t s"]:
        """The schedule written out, query by key: bool [h, t, s]. For tests and small shapes."""
        size, unique_heads, rows = self.block_size, self.lists.num_unique_heads, self.lists.num_rows
        dense = np.zeros((unique_heads, rows, self.num_columns, size, size), bool)
        for unique_head in range(unique_heads):
            row, position = self.lists.entries(unique_head)
            dense[unique_head, row, self.lists.blocks[position]] = self.token_masks[self.lists.mask_ids[position]]
        tokens = dense.swapaxes(2, 3).reshape(unique_heads, rows * size, self.num_columns * size)
        first = self.query_offset - self.first_row * size
        return tokens[self.head_index, first : first + self.query_length, : self.kv_length]


def transpose(lists: BlockLists, num_columns: int) -> BlockLists:
    """Lists of the rows that read each column.

    In strided patterns the rows that share a list enter and leave its positions in order, so the readers of a position
    are an interval: a column needs one range of a list of rows and stays O(1). Everything else, and all partial
    entries, is written out.
    """
    table = ListTable()
    intervals = np.zeros((lists.num_unique_heads, num_columns, lists.num_full_ranges, 2), np.int32)
    written = []
    for unique_head in range(lists.num_unique_heads):
        pieces = [lists.entries(unique_head, slice(lists.num_full_ranges, None))]
        for part in range(lists.num_full_ranges):
            pieces += _column_intervals(lists, unique_head, part, table, intervals[unique_head, :, part])
        written.append(tuple(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))
    full, partial = (_flat_columns(table, lists, written, num_columns, kind) for kind in (True, False))
    if not (full[..., 1] > full[..., 0]).any():
        full = full[:, :, :0]
    return table.lists(np.concatenate([intervals, full, partial], 2), intervals.shape[2] + full.shape[2])


def _column_intervals(lists: BlockLists, unique_head: int, part: int, table: ListTable, intervals: np.ndarray):
    """Fills in the intervals of readers that come in order; returns the entries of the others."""
    starts, stops = lists.ranges[unique_head, :, part].T
    rows = np.flatnonzero(stops > starts)
    which = np.searchsorted(lists.offsets, starts[rows], side="right") - 1
    used, readers = np.unique(which, return_counts=True)
    alone = np.isin(which, used[readers == 1])
    rest = [expand(rows[alone], starts[rows[alone]], stops[rows[alone]])]
    for each in used[readers > 1]:
        group = rows[which == each]
        low, high = starts[group], stops[group]
        positions = np.arange(low.min(), high.max())
        columns = lists.blocks[positions]
        in_order = (np.diff(low) >= 0).all() and (np.diff(high) >= 0).all()
        if not in_order or intervals[columns].any():
            rest.append(expand(group, low, high))
            continue
        offset = table.add(group)
        intervals[columns, 0] = offset + np.searchsorted(high, positions, side="right")
        intervals[columns, 1] = offset + np.searchsorted(low, positions, side="right")
    return rest


def _flat_columns(table: ListTable, lists: BlockLists, written, num_columns: int, full: bool) -> np.ndarray:
    """One more range for every column: the entries that were written out, full or partial, sorted by column."""
    ranges = np.zeros((lists.num_unique_heads, num_columns, 1, 2), np.int32)
    for unique_head, (rows, positions) in enumerate(written):
        chosen = (lists.mask_ids[positions] == WHOLE) == full
        rows, positions = rows[chosen], positions[chosen]
        columns = lists.blocks[positions]
        order = np.lexsort((rows, columns))
        offset = table.add(rows[order], lists.mask_ids[positions][order])
        ends = np.searchsorted(columns[order], np.arange(num_columns + 1))
        ranges[unique_head, :, 0] = offset + np.stack([ends[:-1], ends[1:]], -1)
    return ranges
