"""Compiles a pattern, for given heads and lengths, into the schedule that the kernels read."""

import functools
import hashlib
import itertools
import math
import typing

import numpy as np

from pallas_kernels.caching import bounded_cache
from pallas_kernels.head_place import refuse_unknown_heads, unknown_heads
from pallas_kernels.schedule import NOTHING, WHOLE, BlockLists, BlockSchedule, ListTable
from s2jax.patterns import HeadGroups, Pattern, PatternLike, as_pattern, statistics
from s2jax.patterns.agreement import CACHED_BYTES, check_agreement
from s2jax.patterns.bands import Band, with_period
from s2jax.patterns.checks import check_length
from s2jax.patterns.evaluation import outside_traces

PAIRS_AT_ONCE = 1 << 22
"""Pairs of blocks, or of tokens, evaluated together if a pattern has no closed form."""


class Entries(typing.NamedTuple):
    """Query blocks (ascending), key blocks and token mask ids, each int [entries]."""

    rows: np.ndarray
    columns: np.ndarray
    masks: np.ndarray


def compile_schedule(
    pattern: PatternLike, *, num_heads: int, num_kv_heads: int, query_length: int, kv_length: int, query_offset: int = 0
) -> BlockSchedule:
    """Compiles a pattern for given heads and lengths. Cached, so that all layers of a model share one schedule.

    Args:
      pattern: a pattern, or what `as_pattern` makes a pattern of.
      num_heads: count of query heads.
      num_kv_heads: count of KV heads.
      query_length: count of queries.
      kv_length: count of keys.
      query_offset: absolute position of the first query among the keys.

    Returns:
      A `BlockSchedule`. It takes O(length) memory per distinct head if the pattern has a closed form (`Pattern.bands`).

    Raises:
      ValueError: the pattern does not fit these heads or lengths, or its closed form contradicts its rule.
    """
    heads = HeadGroups(num_heads, num_kv_heads)
    check_length("query_length", query_length, at_least=1)
    check_length("kv_length", kv_length, at_least=1)
    check_length("query_offset", query_offset, at_least=0)
    pattern, lengths = as_pattern(pattern), (int(query_length), int(kv_length), int(query_offset))
    pattern.check(heads, *lengths)  # also that functions have not changed since the pattern was made
    return _compiled(pattern, heads, *lengths)


def forget_schedules() -> None:
    """Empties the cache of `compile_schedule`, for measurements."""
    _compiled.cache_clear()
    check_agreement.cache_clear()


@bounded_cache(256, CACHED_BYTES)
def _compiled(
    pattern: Pattern, heads: HeadGroups, query_length: int, kv_length: int, query_offset: int
) -> BlockSchedule:
    check_agreement(pattern, heads, query_offset, query_offset + query_length, kv_length)
    statistics.warn_if_incomplete(pattern, heads, kv_length, (query_offset, query_offset + query_length))
    return _schedule(pattern, heads, query_length, kv_length, query_offset)


@outside_traces
def _schedule(
    pattern: Pattern, heads: HeadGroups, query_length: int, kv_length: int, query_offset: int
) -> BlockSchedule:
    compiler = _Compiler(pattern.schedule_block_size(), query_offset, query_offset + query_length, kv_length)
    unique_heads: dict[typing.Hashable, int] = {}
    head_index, parts = [], []
    for head in range(heads.num_heads):
        key = pattern.head_key(heads, head)
        if key not in unique_heads:
            bands = pattern.bands(heads, head, compiler.block_size, int(compiler.rows[-1]) + 1, compiler.num_columns)
            if bands is not None:
                unique_heads[key] = len(parts)
                parts.append(compiler.closed_form(bands))
            else:
                entries = compiler.entries(pattern, heads, head)
                # Heads whose entries are equal share a unique head, too.
                unique_heads[key] = unique_heads.setdefault(_digest(entries), len(parts))
                if unique_heads[key] == len(parts):
                    parts.append(compiler.list_per_row(*entries))
        head_index.append(unique_heads[key])
    return BlockSchedule(
        compiler.block_size, heads.num_heads, heads.num_kv_heads, query_length, kv_length, query_offset,
        compiler.lists(parts), np.asarray(head_index, np.int32), compiler.token_masks(),
        functools.partial(heads_differ, pattern, heads, query_length, kv_length, query_offset),
    )  # fmt: skip


def check_heads_known(
    pattern: Pattern,
    axes: dict[str, int],
    num_heads: int,
    num_kv_heads: int,
    query_length: int,
    kv_length: int,
    query_offset: int = 0,
) -> None:
    """Raises ValueError if a caller may have split the heads without saying so, and the pattern would then differ.

    Args:
      pattern: the pattern.
      axes: the axes that heads may be split over, see `possible_head_axes`.
      num_heads: see `compile_schedule`, as for the others.
      num_kv_heads: count of KV heads of the call.
      query_length: count of queries.
      kv_length: count of keys.
      query_offset: position of the first query.
    """
    if not axes or num_kv_heads < 1 or num_heads % num_kv_heads:
        return
    given = pattern, HeadGroups(num_heads, num_kv_heads), query_length, kv_length, query_offset
    try:
        pattern.check(*given[1:])
    except ValueError as error:
        raise ValueError(f"{error}; {unknown_heads(axes, repr(pattern))}") from None
    refuse_unknown_heads(axes, functools.partial(heads_differ, *given), repr(pattern))


def heads_differ(
    pattern: Pattern, heads: HeadGroups, query_length: int, kv_length: int, query_offset: int, shards: tuple[int, ...]
) -> bool:
    """True if heads read differently, or would if they were a part of as many heads times one of `shards`.

    A pattern that fits no other number of heads, such as `PerHead`, is compiled for exactly these.
    """
    keys = {pattern.head_key(heads, head) for head in range(heads.num_heads)}
    fits_more = False
    for times in shards:
        more = HeadGroups(heads.num_heads * times, heads.num_kv_heads * times)
        try:
            pattern.check(more, query_length, kv_length, query_offset)
        except ValueError:
            continue
        fits_more = True
        keys |= {pattern.head_key(more, head) for head in range(more.num_heads)}
    return fits_more and len(keys) > 1


def _digest(entries: list[Entries]) -> tuple[str, bytes]:
    found = hashlib.blake2b(digest_size=16)
    for array in itertools.chain.from_iterable(entries):
        found.update(len(array).to_bytes(8))
        found.update(np.ascontiguousarray(array))
    return "entries", found.digest()


class _Compiler:
    """Collects the lists, ranges and token masks of one schedule."""

    def __init__(self, block_size: int, query_start: int, query_stop: int, kv_stop: int):
        self.block_size, self.query_stop, self.kv_stop = block_size, query_stop, kv_stop
        self.rows = np.arange(query_start // block_size, -(-query_stop // block_size))
        self.num_columns = -(-kv_stop // block_size)
        self._table = ListTable()
        self._masks: dict[bytes, int] = {}
        self.mask_id(np.ones((block_size, block_size), bool))
        self.mask_id(np.zeros((block_size, block_size), bool))

    def mask_id(self, mask: np.ndarray) -> int:
        return self._masks.setdefault(np.packbits(mask).tobytes(), len(self._masks))

    def token_masks(self) -> np.ndarray:
        size = self.block_size
        packed = np.stack([np.frombuffer(key, np.uint8) for key in self._masks])
        return np.unpackbits(packed, axis=1, count=size * size).reshape(-1, size, size).astype(bool)

    def lists(self, parts: list[tuple[list, list]]) -> BlockLists:
        """The ranges of all unique heads side by side; a head with fewer ranges gets empty ones."""
        widths = [max(1, *(len(each[half]) for each in parts)) for half in (0, 1)]
        ranges = np.zeros((len(parts), len(self.rows), sum(widths), 2), np.int32)
        for unique_head, (full, partial) in enumerate(parts):
            for index, each in enumerate(full):
                ranges[unique_head, :, index] = each
            for index, each in enumerate(partial):
                ranges[unique_head, :, widths[0] + index] = each
        return self._table.lists(ranges, widths[0])

    # The closed form: distances are cut where any band begins or ends; in between, a head reads a set of columns.

    def closed_form(self, bands: tuple[Band, ...]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Full and partial ranges, each int32 [rows, 2], of a head that reads the union of the bands."""
        full: list[tuple[int, int, np.ndarray]] = []  # distances from, to; columns
        partial = []
        for low, high in self._distances(bands):
            active = [band for band in bands if _meets(self._some(band), low, high)]
            if not active:
                continue
            columns, rest = self._columns(active, low, high)
            if full and full[-1][1] == low and np.array_equal(full[-1][2], columns):
                full[-1] = (full[-1][0], high, columns)
            elif columns.any():
                full.append((low, high, columns))
            if rest.any():
                partial.append(self._ranges(low, high, rest > 0, rest))
        return [self._ranges(*each) for each in full], partial

    def _some(self, band: Band) -> tuple[int, int]:
        """The interval of distances at which some pair of tokens lies in the band's token interval."""
        size = self.block_size
        return (
            max(band.block_low, -(-(band.token_low - size + 1) // size)),
            min(band.block_high, -(-(band.token_high + size - 1) // size)),
        )

    def _whole(self, band: Band) -> tuple[int, int]:
        """The interval of distances at which every pair of tokens lies in it."""
        size = self.block_size
        return max(band.block_low, -(-(band.token_low + size - 1) // size)), min(
            band.block_high, band.token_high // size
        )

    def _distances(self, bands: tuple[Band, ...]) -> list[tuple[int, int]]:
        """Intervals of distance in which no band changes; single distances where a token interval cuts blocks."""
        least, most = int(self.rows[0]) - self.num_columns + 1, int(self.rows[-1]) + 1
        cuts = {least, most}
        for band in bands:
            some, whole = self._some(band), self._whole(band)
            cuts.update(some, whole, range(some[0], min(whole[0], some[1])), range(max(whole[1], some[0]), some[1]))
        ends = sorted(cut for cut in cuts if least <= cut <= most)
        return list(itertools.pairwise(ends))

    def _columns(self, active: list[Band], low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Columns that are read whole, bool [period, blocks], and the mask ids of partial columns, else 0."""
        period = math.lcm(*(band.period for band in active))
        limits = np.stack([with_period(band.columns, period) for band in active], -1)
        whole = np.array([_inside(self._whole(band), low, high) for band in active])
        full = ((limits >= self.block_size) & whole).any(-1)
        rest = (limits > 0).any(-1) & ~full
        ids = np.zeros(full.shape, np.int32)
        if rest.any():
            distinct, which = np.unique(limits[rest], axis=0, return_inverse=True)
            distance = None if whole.all() else low
            masks = (self._token_mask(active, each, distance) for each in distinct)
            ids[rest] = np.array([self.mask_id(mask) for mask in masks], np.int32)[which.reshape(-1)]
            full |= rest & (ids == WHOLE)  # bands that are whole only together
            ids[ids == NOTHING] = WHOLE
        return full, ids

    def _token_mask(self, active: list[Band], limits: np.ndarray, distance: int | None) -> np.ndarray:
        token = np.arange(self.block_size)
        mask = np.zeros((self.block_size, self.block_size), bool)
        for band, limit in zip(active, limits, strict=True):
            allowed = np.broadcast_to(token[None, :] < limit, mask.shape)
            if distance is not None:
                apart = distance * self.block_size + token[:, None] - token[None, :]
                allowed = allowed & (apart >= band.token_low) & (apart < band.token_high)
            mask |= allowed
        return mask

    def _ranges(self, low: int, high: int, columns: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
        """The range of every row in the list of its columns, at distances from low to high: int32 [rows, 2]."""
        ranges = np.zeros((len(self.rows), 2), np.int32)
        for phase in range(len(columns)):
            blocks = np.flatnonzero(columns[phase])
            mine = self.rows % len(columns) == phase
            offset = self._table.add(blocks, None if ids is None else ids[phase, blocks])
            row = self.rows[mine]
            ranges[mine, 0] = offset + np.searchsorted(blocks, row - high + 1)
            ranges[mine, 1] = offset + np.searchsorted(blocks, row - low + 1)
        return ranges

    # Everything else: one list per row.

    def entries(self, pattern: Pattern, heads: HeadGroups, head: int) -> list[Entries]:
        """Entries that a head reads whole and in part, from the pattern's block states and `mask_fn` alone."""
        groups = max(1, len(self.rows) * self.num_columns // PAIRS_AT_ONCE)
        found = [self._entries_of(pattern, heads, head, rows) for rows in np.array_split(self.rows, groups)]
        joined = [
            Entries(*(np.concatenate(arrays) for arrays in zip(*half, strict=True)))
            for half in zip(*found, strict=True)
        ]
        for rows, columns, _ in joined if pattern.causal else ():
            if (later := columns > rows).any():
                at = int(np.argmax(later))
                raise ValueError(
                    f"{pattern!r} says that it is causal, but through head {head} query block {rows[at]} reads the "
                    f"later key block {columns[at]} (blocks of {self.block_size} tokens)"
                )
        return joined

    def _entries_of(self, pattern: Pattern, heads: HeadGroups, head: int, rows: np.ndarray) -> list[Entries]:
        states = pattern.block_states(heads, head, self.block_size, rows, self.num_columns)
        row, column = np.nonzero(states)
        partial = np.flatnonzero(states[row, column] != 2)
        row, ids = rows[row], np.zeros(len(row), np.int32)
        step = max(1, PAIRS_AT_ONCE // self.block_size**2)
        for start in range(0, len(partial), step):
            some = partial[start : start + step]
            ids[some] = self._mask_ids(pattern, heads, head, row[some], column[some])
        return [Entries(row[each], column[each], ids[each]) for each in (ids == WHOLE, ids > NOTHING)]

    def _mask_ids(
        self, pattern: Pattern, heads: HeadGroups, head: int, rows: np.ndarray, columns: np.ndarray
    ) -> np.ndarray:
        masks = pattern.token_tiles(heads, head, self.block_size, rows, columns, self.query_stop, self.kv_stop)
        packed = np.packbits(masks.reshape(len(rows), -1), axis=1)
        return np.array([self._masks.setdefault(mask.tobytes(), len(self._masks)) for mask in packed], np.int32)

    def list_per_row(self, *entries: Entries) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Full and partial ranges, each int32 [rows, 2]."""
        ranges = []
        for rows, columns, ids in entries:
            ends = np.searchsorted(rows, np.append(self.rows, self.rows[-1] + 1))
            offset = self._table.add_many(columns, ids, np.diff(ends))
            ranges.append([offset + np.stack([ends[:-1], ends[1:]], -1)])
        return ranges[0], ranges[1]


def _meets(interval: tuple[int, int], low: int, high: int) -> bool:
    return interval[0] < high and low < interval[1]


def _inside(interval: tuple[int, int], low: int, high: int) -> bool:
    return interval[0] <= low and high <= interval[1]
