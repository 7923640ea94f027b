"""Statistics of a pattern at one length: density, coverage, the blocks that a KV cache keeps.

All are computed from the *profile* of a head: intervals of the distance i - j, and for each the key blocks that are
read there. With bands this takes O(n) time and memory per distinct head, so a million tokens are feasible.
"""

import functools
import itertools
import math
import os
import pathlib
import sys
import typing
import warnings
from collections.abc import Hashable, Iterator, Sequence

import jax
import numpy as np

import pallas_kernels
from s2jax.patterns.bands import Band, with_period
from s2jax.patterns.evaluation import evaluated, outside_traces
from s2jax.patterns.head_groups import HeadGroups
from s2jax.patterns.rule import Rule

PAIRS_AT_ONCE = 1 << 21
"""Pairs of blocks, or of tokens, evaluated together."""


_PACKAGES = pathlib.Path(jax.__file__).parents[1]
_OWN = pathlib.Path(__file__).parents[1], pathlib.Path(pallas_kernels.__file__).parent
LIBRARIES = tuple(f"{folder}{os.sep}" for folder in (*_OWN, _PACKAGES / "jax", _PACKAGES / "flax"))
"""Folders of code that warnings skip to find the caller's line."""


class PatternWarning(UserWarning):
    """A warning about a pattern that is valid, but hardly intended."""


class Slice(typing.NamedTuple):
    """Key block j is read by query block j + d at the distances low[m] <= d < high[m] if read[m, j]."""

    low: np.ndarray  # int [m], ascending; the intervals of all slices together are disjoint and without gaps
    high: np.ndarray  # int [m]
    read: np.ndarray  # bool [m, n]

    def occurs(self) -> np.ndarray:
        """True where some query block below n reads key block j at these distances: bool [m, n]."""
        j = np.arange(self.read.shape[1])
        return self.read & (j < len(j) - self.low[:, None]) & (j > -self.high[:, None])

    def num_pairs(self) -> int:
        """The number of pairs of blocks below n that are read."""
        if (self.high - self.low == 1).all():
            return int(np.count_nonzero(self.occurs()))
        j = np.arange(self.read.shape[1])
        first, stop = np.maximum(self.low[:, None], -j), np.minimum(self.high[:, None], len(j) - j)
        return int((np.maximum(stop - first, 0) * self.read).sum())


def num_blocks(pattern: Rule, length: int) -> int:
    return -(-length // pattern.schedule_block_size())


def profile(
    pattern: Rule, heads: HeadGroups, group: Sequence[int], length: int, start: int | None = None
) -> Iterator[Slice]:
    """The key blocks that the heads of a group read together, at distances from `start` on, or at all distances."""
    n = num_blocks(pattern, length)
    start = 1 - n if start is None else start
    bands = _bands(pattern, heads, group, length)
    if bands is None:
        return _profile_of_mask(_group_mask(pattern, heads, group, length), start)
    return _profile_of_bands([cut for band in bands for cut in _cuts(band, pattern, length)], start, n)


def _bands(pattern: Rule, heads: HeadGroups, group: Sequence[int], length: int) -> list[Band] | None:
    size, n = pattern.schedule_block_size(), num_blocks(pattern, length)
    found: list[Band] = []
    for head in distinct(pattern, heads, group).values():
        bands = pattern.bands(heads, head, size, n, n)
        if bands is None:
            return None
        found += bands
    return found


def distinct(pattern: Rule, heads: HeadGroups, group: Sequence[int]) -> dict[Hashable, int]:
    """The first of the heads that read the same, by their key."""
    found: dict[Hashable, int] = {}
    for head in group:
        found.setdefault(pattern.head_key(heads, head), head)
    return found


Cut = tuple[int, int, np.ndarray]
"""Distances from low to below high, and bool [period, n]: the key blocks of which some token is read there."""


def _cuts(band: Band, pattern: Rule, length: int) -> list[Cut]:
    """A band with its token interval turned into whole blocks; it depends on how many tokens of the block are read."""
    size = pattern.schedule_block_size()
    remaining = length - np.arange(band.columns.shape[1]) * size
    limits = np.minimum(band.columns, remaining)
    found = []
    for limit in np.unique(limits[limits > 0]).tolist():
        # Of q - k, the pair of blocks has all of d·size - (limit - 1) … d·size + size - 1.
        low = max(band.block_low, band.token_low // size)
        high = min(band.block_high, -(-(band.token_high + limit - 1) // size))
        if low < high:
            found.append((low, high, _shortest_period(limits == limit)))
    return found


def _shortest_period(table: np.ndarray) -> np.ndarray:
    return table[:1] if (table == table[:1]).all() else table


def _profile_of_bands(cuts: list[Cut], start: int, n: int) -> Iterator[Slice]:
    ends = {start, n} | {end for low, high, _ in cuts for end in (low, high) if start < end < n}
    for low, high in itertools.pairwise(sorted(ends)):
        active = [table for a, b, table in cuts if a <= low and high <= b]
        period = math.lcm(*(len(table) for table in active))
        if period == 1:
            read = np.any([table[0] for table in active], axis=0) if active else np.zeros(n, bool)
            yield Slice(np.array([low]), np.array([high]), read[None])
            continue
        table = np.any([with_period(table, period) for table in active], axis=0)
        column = np.arange(n)
        # Seen from key block j, the row at distance d has the phase j + d.
        by_distance = table[(np.arange(period)[:, None] + column) % period, column]
        for distance in _chunks(low, high, max(1, PAIRS_AT_ONCE // n)):
            yield Slice(distance, distance + 1, by_distance[distance % period])


def _profile_of_mask(mask: np.ndarray, start: int) -> Iterator[Slice]:
    """The diagonals of bool [n, n]."""
    n = len(mask)
    padded = np.zeros((3 * n, n), bool)
    padded[n : 2 * n] = mask
    down, right = padded.strides
    for distance in _chunks(start, n, max(1, PAIRS_AT_ONCE // n)):
        origin = padded[n + distance[0] :]
        read = np.lib.stride_tricks.as_strided(origin, (len(distance), n), (down, down + right), writeable=False)
        yield Slice(distance, distance + 1, read)


def _chunks(start: int, stop: int, step: int) -> Iterator[np.ndarray]:
    return (np.arange(low, min(low + step, stop)) for low in range(start, stop, step))


def rows_read(pattern: Rule, heads: HeadGroups, head: int, rows: np.ndarray, length: int) -> np.ndarray:
    """The block mask of some query blocks, evaluated token by token where needed: bool [rows, n]."""
    size, n = pattern.schedule_block_size(), num_blocks(pattern, length)
    states = pattern.block_states(heads, head, size, rows, n)
    read = states == 2
    row, column = np.nonzero(states == 1)
    if pattern.bands(heads, head, size, 1, 1) is not None:
        # The last query and the first key decide most pairs; the others are evaluated on every token.
        corner = pattern.mask_fn(head, np.minimum(rows[row] * size + size, length) - 1, column * size, heads)
        read[row, column] = corner
        row, column = row[~corner], column[~corner]
    read[row, column] = tiles_read(pattern, heads, head, rows[row], column, length, length)
    return read


def tiles_read(
    pattern: Rule, heads: HeadGroups, head: int, rows: np.ndarray, columns: np.ndarray, query_stop: int, kv_stop: int
) -> np.ndarray:
    """True for pairs of blocks of which any token is read: bool [pairs]."""
    size = pattern.schedule_block_size()
    read = np.zeros(len(rows), bool)
    for part in _chunks(0, len(rows), max(1, PAIRS_AT_ONCE // size**2)):
        tiles = pattern.token_tiles(heads, head, size, rows[part], columns[part], query_stop, kv_stop)
        read[part] = tiles.any((1, 2))
    return read


@functools.lru_cache(maxsize=32)
def _rule_mask(pattern: Rule, heads: HeadGroups, head: int, length: int) -> np.ndarray:
    """The block mask of a head without a closed form: bool [n, n], read-only."""
    n = num_blocks(pattern, length)
    chunks = _chunks(0, n, max(1, PAIRS_AT_ONCE // n))
    mask = np.concatenate([rows_read(pattern, heads, head, rows, length) for rows in chunks])
    mask.flags.writeable = False
    return mask


def _group_mask(pattern: Rule, heads: HeadGroups, group: Sequence[int], length: int) -> np.ndarray:
    each = distinct(pattern, heads, group).values()
    return functools.reduce(np.logical_or, (_rule_mask(pattern, heads, head, length) for head in each))


def block_mask(pattern: Rule, heads: HeadGroups, length: int) -> np.ndarray:
    n = num_blocks(pattern, length)
    found = np.zeros((heads.num_heads, n, n), bool)
    first = distinct(pattern, heads, range(heads.num_heads))
    for head in range(heads.num_heads):
        same = first[pattern.head_key(heads, head)]
        if same < head:
            found[head] = found[same]
        elif _bands(pattern, heads, [head], length) is None:
            found[head] = _group_mask(pattern, heads, [head], length)
        else:
            _draw(profile(pattern, heads, [head], length), found[head])
    return found


def _draw(slices: Iterator[Slice], mask: np.ndarray) -> None:
    """Writes a profile into bool [n, n]."""
    n = len(mask)
    for low, high, read in slices:
        for a, b, columns in zip(low.tolist(), high.tolist(), read, strict=True):
            if b - a == 1:
                rows = np.arange(max(0, a), min(n, n + a))
                mask[rows, rows - a] = columns[rows - a]
            elif columns.any():
                for row in range(max(0, a), n):
                    here = slice(max(0, row - b + 1), max(0, row - a + 1))
                    mask[row, here] = columns[here]


def density(pattern: Rule, heads: HeadGroups, length: int) -> float:
    n = num_blocks(pattern, length)
    keys = [pattern.head_key(heads, head) for head in range(heads.num_heads)]
    read = {
        key: sum(each.num_pairs() for each in profile(pattern, heads, [head], length))
        for key, head in distinct(pattern, heads, range(heads.num_heads)).items()
    }
    everything = n * (n + 1) // 2 if pattern.causal else n * n
    return sum(read[key] for key in keys) / (heads.num_heads * everything)


def _of_groups(pattern: Rule, heads: HeadGroups, statistic: typing.Callable[[Sequence[int]], typing.Any]) -> list:
    """A statistic of every KV head's group, computed once for equal groups."""
    known: dict[frozenset, typing.Any] = {}
    found = []
    for kv_head in range(heads.num_kv_heads):
        group = heads.group_of(kv_head)
        key = frozenset(pattern.head_key(heads, head) for head in group)
        if key not in known:
            known[key] = statistic(group)
        found.append(known[key])
    return found


def is_kv_efficient(pattern: Rule, heads: HeadGroups, length: int) -> bool:
    return all(_of_groups(pattern, heads, lambda group: _never_read_again(pattern, heads, group, length)))


def _never_read_again(pattern: Rule, heads: HeadGroups, group: Sequence[int], length: int) -> bool:
    n = num_blocks(pattern, length)
    begun, dropped = np.full(n, pattern.causal), np.zeros(n, bool)
    for each in profile(pattern, heads, group, length, 0 if pattern.causal else None):
        read = each.occurs()
        begun_by = np.logical_or.accumulate(np.vstack([begun, read]), axis=0)
        dropped_by = np.logical_or.accumulate(np.vstack([dropped, begun_by[1:] & ~read]), axis=0)
        if (read & dropped_by[:-1]).any():
            return False
        begun, dropped = begun_by[-1], dropped_by[-1]
    return True


def kv_blocks_kept(pattern: Rule, heads: HeadGroups, length: int) -> np.ndarray:
    return np.array(_of_groups(pattern, heads, lambda group: _most_kept(pattern, heads, group, length)), np.int64)


def _most_kept(pattern: Rule, heads: HeadGroups, group: Sequence[int], length: int) -> int:
    n = num_blocks(pattern, length)
    block, last = np.arange(n), np.full(n, -1)
    for each in profile(pattern, heads, group, length):
        occurs = each.occurs()
        farthest = len(occurs) - 1 - occurs[::-1].argmax(0)  # distances ascend: later slices overwrite nearer readers
        last = np.where(occurs.any(0), np.minimum(block + each.high[farthest], n) - 1, last)
    kept = last >= 0
    begins = block[kept] if pattern.causal else np.zeros(kept.sum(), int)
    change = np.bincount(begins, minlength=n + 1) - np.bincount(last[kept] + 1, minlength=n + 1)
    return int(np.cumsum(change).max())


def _window(pattern: Rule, heads: HeadGroups, head: int, length: int) -> int:
    """The number of distances from 0 on that the head reads in full."""
    n = num_blocks(pattern, length)
    for each in profile(pattern, heads, [head], length, start=0):
        for low, columns in zip(each.low.tolist(), each.read, strict=True):
            if not columns[: n - low].all():
                return low
    return n


def _reads_own_blocks(pattern: Rule, heads: HeadGroups, head: int, length: int, queries: tuple[int, int]) -> bool:
    size, (start, stop) = pattern.schedule_block_size(), queries
    stop = min(stop, length)
    block = np.arange(start // size, -(-stop // size))
    for query, key in ((size - 1, 0), (0, 0), (size - 1, size - 1)):  # mostly enough
        query = np.clip(block * size + query, start, stop - 1)
        block = block[~evaluated(pattern, heads, head, query, np.minimum(block * size + key, length - 1))]
    parts = (block[part] for part in _chunks(0, len(block), max(1, PAIRS_AT_ONCE // size**2)))
    return all(tiles_read(pattern, heads, head, some, some, stop, length).all() for some in parts)


def _far_context(pattern: Rule, heads: HeadGroups, length: int) -> np.ndarray:
    """The blocks beyond the window that the last query block reads through some head: bool [blocks beyond]."""
    n = num_blocks(pattern, length)
    representatives = list(distinct(pattern, heads, range(heads.num_heads)).values())
    window = min(_window(pattern, heads, head, length) for head in representatives)
    last = np.array([n - 1])
    read = np.any([rows_read(pattern, heads, head, last, length)[0] for head in representatives], axis=0)
    return read[: n - window]


def coverage(pattern: Rule, heads: HeadGroups, length: int) -> float:
    far = _far_context(pattern, heads, length)
    return float(far.mean()) if far.size else 1.0


def warn_if_incomplete(
    pattern: Rule, heads: HeadGroups, length: int, queries: tuple[int, int] = (0, sys.maxsize)
) -> None:
    """Warns about context that a pattern leaves out, for the queries from `queries[0]` to below `queries[1]`."""
    for message in shortcomings(pattern, heads, length, queries):
        warnings.warn(message, PatternWarning, skip_file_prefixes=LIBRARIES)


@outside_traces
def shortcomings(pattern: Rule, heads: HeadGroups, length: int, queries: tuple[int, int]) -> list[str]:
    """Messages about context that a pattern leaves out, hardly on purpose."""
    representatives = distinct(pattern, heads, range(heads.num_heads)).values()
    blind = (head for head in representatives if not _reads_own_blocks(pattern, heads, head, length, queries))
    found = [
        f"{pattern!r}: through head {head}, some queries do not read their own block. "
        "Add a window to it: `pattern | Local(1)`."
        for head in itertools.islice(blind, 1)
    ]
    far = _far_context(pattern, heads, length) if pattern.is_strided() else np.zeros(0, bool)
    # A pattern of bounded reach leaves out the context beyond on purpose.
    reached = far[int(np.argmax(far)) :] if far.any() else far
    if far.any() and not reached.all():
        found.append(
            f"{pattern!r}: the {heads.num_heads} heads ({heads.num_kv_heads} KV heads) together read "
            f"{reached.mean():.0%} of the context beyond the window, and miss the rest. Take a stride of at most the "
            'number of KV heads with head_step=None, residues="query_head", or a dense head (num_dense_heads=1).'
        )
    return found
