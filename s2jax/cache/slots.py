"""The assignment of blocks of keys to the slots of a KV cache.

A block lives, for one KV head, from when it is written until the last row of queries that reads it. Slots are given to
blocks as registers are to values (linear scan: Poletto and Sarkar, 1999). For intervals, that takes as many slots as
blocks live at once. Patterns of bounded reach repeat themselves, so that a block's slot is its number modulo the slots.
"""

import heapq

import numpy as np
from jaxtyping import Int32

from pallas_kernels.schedule import BlockSchedule
from s2jax.patterns import HeadGroups, Pattern
from s2jax.patterns.agreement import check_agreement
from s2jax.patterns.bands import UNBOUNDED, Band

TRIAL_BLOCKS = 64
"""Blocks of context from which the reach of a pattern is read off, or four times its reach."""

MANY_BLOCKS = 1 << 16
"""Blocks of context up to which a pattern that streams is checked to repeat itself."""


def assign_slots(last_rows: Int32[np.ndarray, "k blocks"]) -> Int32[np.ndarray, "k blocks"]:
    """The slot of every block, -1 for blocks that are never kept.

    Args:
      last_rows: the last row at which every block is kept, -1 where it never is.
    """
    slot_of = np.empty_like(last_rows)
    known: dict[bytes, np.ndarray] = {}
    for head, each in enumerate(last_rows):
        if each.tobytes() not in known:
            known[each.tobytes()] = _linear_scan(each)
        slot_of[head] = known[each.tobytes()]
    return slot_of


def _linear_scan(last_rows: Int32[np.ndarray, " blocks"]) -> Int32[np.ndarray, " blocks"]:
    """The lowest slot that is free when each block is written."""
    slot_of, free, taken, count = np.full(len(last_rows), -1, np.int32), [], [], 0
    for block in np.flatnonzero(last_rows >= 0).tolist():
        while taken and taken[0][0] < block:
            heapq.heappush(free, heapq.heappop(taken)[1])
        if free:
            slot = heapq.heappop(free)
        else:
            slot, count = count, count + 1
        slot_of[block] = slot
        heapq.heappush(taken, (int(last_rows[block]), slot))
    return slot_of


def last_readers(schedule: BlockSchedule) -> Int32[np.ndarray, "k blocks"]:
    """The last row that reads every block through any head of the group; -1 for none."""
    readers = schedule.transposed
    starts, stops = readers.ranges[..., 0], readers.ranges[..., 1]
    some = stops > starts
    blocks = np.append(readers.blocks, -1)  # not even a pattern that reads nothing leaves it empty
    found = np.where(some, blocks[np.where(some, stops - 1, -1)], -1).max(-1, initial=-1)
    groups = schedule.head_index.reshape(schedule.num_kv_heads, -1)
    return found[groups].max(1).astype(np.int32)


def reach_and_period(pattern: Pattern, heads: HeadGroups, block_size: int) -> tuple[int, int]:
    """The reach of a row in blocks, itself included, and the period in rows after which reads repeat.

    Raises:
      ValueError: the reach is unbounded, or the reads do not repeat.
    """
    blocks = TRIAL_BLOCKS
    while True:
        bands = _bands(pattern, heads, block_size, blocks)
        reach = max((_reach(band, block_size) for band in bands), default=1)
        if reach >= UNBOUNDED // block_size:
            raise _unbounded(pattern)
        if 4 * reach <= blocks:
            break
        blocks = 4 * reach
    periods = (period for period in range(1, blocks // 2) if all(_repeats(band, period) for band in bands))
    period = next(periods, None)
    if period is None:
        raise _unbounded(pattern)
    # The first blocks may repeat where later ones do not.
    tokens = MANY_BLOCKS * block_size
    check_agreement(pattern, heads, tokens - 2 * block_size, tokens, tokens)
    if not all(_repeats(band, period) for band in _bands(pattern, heads, block_size, max(blocks, MANY_BLOCKS))):
        raise _unbounded(pattern)
    return reach, period


def _bands(pattern: Pattern, heads: HeadGroups, block_size: int, blocks: int) -> list[Band]:
    """The bands of all heads over so many blocks."""
    found: list[Band] = []
    for head in range(heads.num_heads):
        bands = pattern.bands(heads, head, block_size, blocks, blocks)
        if bands is None:
            raise _unbounded(pattern)
        found += bands
    return found


def _unbounded(pattern: Pattern) -> ValueError:
    return ValueError(
        f"a cache for {pattern!r} needs max_length, the most tokens that it shall hold: only patterns that look back a "
        "bounded distance, alike everywhere, stream without end"
    )


def _reach(band: Band, block_size: int) -> int:
    return max(0, min(band.block_high, -(-(band.token_high + block_size - 1) // block_size)))


def _repeats(band: Band, period: int) -> bool:
    columns = band.columns
    return period % band.period == 0 and bool((columns[:, period:] == columns[:, :-period]).all())
