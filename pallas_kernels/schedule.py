"""What every kernel walks: rows of blocks that read slices of shared lists of blocks."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int32

WHOLE, NOTHING = 0, 1
"""The first two token masks of every schedule: all tokens by all tokens, and none."""


@dataclasses.dataclass(frozen=True, eq=False)
class BlockLists:
    """Rows, each of which walks a few slices of shared lists, one after the other.

    In a strided pattern row i reads a prefix of its head's list of stripes, and a slice of the list of all blocks that
    is its window. So the lists are O(n) for every head, where one list per row would be O(n² · density).

    Attributes:
      blocks: int32 [entries], the lists, concatenated; ascending inside a list.
      masks: int32 [entries], which token mask applies to the entry; 0 = none, all tokens are read.
      slices: int32 [walkers, rows, parts, 2], start and stop in `blocks`. The parts of a row share no block.
      offsets: int32 [lists + 1], where in `blocks` each list begins and the last one ends.
      num_full: the first so many parts of every row hold entries without a mask only.
    """

    blocks: Int32[np.ndarray, " entries"]
    masks: Int32[np.ndarray, " entries"]
    offsets: Int32[np.ndarray, " lists+1"]
    slices: Int32[np.ndarray, "walkers rows parts 2"]
    num_full: int

    @property
    def num_walkers(self) -> int:
        return self.slices.shape[0]

    @property
    def num_rows(self) -> int:
        return self.slices.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.blocks, self.masks, self.offsets, self.slices))

    def counts(self) -> Int32[np.ndarray, "walkers rows 2"]:
        """How many entries without and with a mask every row walks."""
        lengths = self.slices[..., 1] - self.slices[..., 0]
        full, partial = lengths[..., : self.num_full], lengths[..., self.num_full :]
        return np.stack([full.sum(-1), partial.sum(-1)], -1).astype(np.int32)

    def entries(self, walker: int, part: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """All (row, position in the lists) pairs of a walker, rows ascending."""
        starts, stops = self.slices[walker, :, part, 0], self.slices[walker, :, part, 1]
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

    def add(self, blocks: np.ndarray, masks: np.ndarray | None = None) -> int:
        """Where the list begins."""
        blocks = np.asarray(blocks, np.int32)
        masks = np.zeros(len(blocks), np.int32) if masks is None else np.asarray(masks, np.int32)
        key = (blocks.tobytes(), masks.tobytes())
        if key not in self._offsets:
            self._offsets[key] = self.add_many(blocks, masks, np.array([len(blocks)]))
        return self._offsets[key]

    def add_many(self, blocks: np.ndarray, masks: np.ndarray, lengths: np.ndarray) -> int:
        """Where the first of several lists begins, which stand one after the other and are shared with nobody."""
        self._pieces.append((blocks.astype(np.int32), masks.astype(np.int32)))
        self._lengths.append(lengths)
        offset, self._total = self._total, self._total + len(blocks)
        return offset

    def lists(self, slices: np.ndarray, num_full: int) -> BlockLists:
        """The lists, walked by the given slices."""
        blocks, masks = (np.concatenate(arrays) for arrays in zip(*self._pieces, strict=True))
        offsets = np.append(0, np.cumsum(np.concatenate(self._lengths))).astype(np.int32)
        return BlockLists(blocks, masks, offsets, slices.astype(np.int32, copy=False), num_full)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockSchedule:
    """A pattern for given heads and lengths, compiled; free of any kernel's tiles.

    Row r of `lists` is the query block `first_row + r`, in absolute positions: where `query_offset` is no multiple of
    the block size, the first row holds fewer queries. `first_row` is 0 where the offset is only known at run time.

    Attributes:
      lists: what the rows of every distinct head read; a walker is a distinct head.
      head_index: int32 [heads], the walker of every query head.
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
    token_masks: Bool[np.ndarray, "masks block_size block_size"]
    differ_among: Callable[[tuple[int, ...]], bool] | None = dataclasses.field(default=None, repr=False)

    def heads_differ(self, shards: tuple[int, ...]) -> bool:
        """True if a part of the heads must know which it is: heads differ, here or among so many times as many."""
        if self.differ_among is not None:
            return self.differ_among(shards)
        return bool((self.head_index != self.head_index[:1]).any())

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
        """Whether the query heads of every group read the same blocks."""
        groups = self.head_index.reshape(self.num_kv_heads, -1)
        return bool((groups == groups[:, :1]).all())

    @functools.cached_property
    def transposed(self) -> BlockLists:
        """The same reading seen from the keys: a row is a key block, its entries are the rows that read it."""
        return transpose(self.lists, self.num_columns)

    def token_mask(self) -> Bool[np.ndarray, "h t s"]:
        """The schedule written out, query by key: bool [h, t, s]. For tests and small shapes."""
        size, walkers, rows = self.block_size, self.lists.num_walkers, self.lists.num_rows
        dense = np.zeros((walkers, rows, self.num_columns, size, size), bool)
        for walker in range(walkers):
            row, position = self.lists.entries(walker)
            dense[walker, row, self.lists.blocks[position]] = self.token_masks[self.lists.masks[position]]
        tokens = dense.swapaxes(2, 3).reshape(walkers, rows * size, self.num_columns * size)
        first = self.query_offset - self.first_row * size
        return tokens[self.head_index, first : first + self.query_length, : self.kv_length]


def transpose(lists: BlockLists, num_columns: int) -> BlockLists:
    """Turns lists of what rows read into lists of who reads the columns.

    Where the rows that share a list enter and leave its positions in order, as they do in strided patterns, the readers
    of a position are an interval of them: so a column needs a slice of a list of rows and stays O(1). Everything else,
    and all masked entries, is written out.
    """
    table = ListTable()
    intervals = np.zeros((lists.num_walkers, num_columns, lists.num_full, 2), np.int32)
    written = []
    for walker in range(lists.num_walkers):
        pieces = [lists.entries(walker, slice(lists.num_full, None))]
        for part in range(lists.num_full):
            pieces += _column_intervals(lists, walker, part, table, intervals[walker, :, part])
        written.append(tuple(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))
    full, partial = (_flat_columns(table, lists, written, num_columns, kind) for kind in (True, False))
    if not (full[..., 1] > full[..., 0]).any():
        full = full[:, :, :0]
    return table.lists(np.concatenate([intervals, full, partial], 2), intervals.shape[2] + full.shape[2])


def _column_intervals(lists: BlockLists, walker: int, part: int, table: ListTable, intervals: np.ndarray):
    """Fills in the intervals of readers where readers come in order; gives back the entries where they do not."""
    starts, stops = lists.slices[walker, :, part].T
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
    """One part more for every column: the entries that were written out, sorted by column, masked or not."""
    slices = np.zeros((lists.num_walkers, num_columns, 1, 2), np.int32)
    for walker, (rows, positions) in enumerate(written):
        chosen = (lists.masks[positions] == WHOLE) == full
        rows, positions = rows[chosen], positions[chosen]
        columns = lists.blocks[positions]
        order = np.lexsort((rows, columns))
        offset = table.add(rows[order], lists.masks[positions][order])
        ends = np.searchsorted(columns[order], np.arange(num_columns + 1))
        slices[walker, :, 0] = offset + np.stack([ends[:-1], ends[1:]], -1)
    return slices
