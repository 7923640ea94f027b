"""Zeroing of keys and values that no query reads: a weight of zero times a NaN or Inf would be a NaN."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from pallas_kernels.problem import Operands, Problem
from pallas_kernels.schedule import BlockLists, BlockSchedule
from pallas_kernels.xla import XLA
from pallas_kernels.xla.block_lists import TileLists


def depends_on_arrays(problem: Problem, operands: Operands) -> bool:
    """True if the set of unread keys depends on run-time arrays: offsets, segments or a selection."""
    if operands.query_offset is not None or not isinstance(operands.schedule, BlockSchedule):
        return True
    if operands.query_segment_ids is None:
        return False
    # In self-attention over packed documents the query at a key's own position reads it, wherever documents begin.
    return not (problem.same_segments and reads_own_position(operands.schedule))


@functools.lru_cache(maxsize=64)
def reads_own_position(schedule: BlockSchedule) -> bool:
    """True if queries are at the keys' positions, and each reads the key at its own, for every head."""
    lists, size = schedule.lists, schedule.block_size
    if schedule.query_offset or schedule.query_length != schedule.kv_length:
        return False
    diagonals = np.diagonal(schedule.token_masks, axis1=1, axis2=2)
    whole = diagonals.all(-1)
    # The last row may have fewer queries.
    last = lists.num_rows - 1
    whole_at_end = diagonals[:, : schedule.query_length - last * size].all(-1)
    for unique_head in range(lists.num_unique_heads):
        row, position = lists.entries(unique_head, slice(lists.num_full_ranges, None))
        kind = lists.mask_ids[position]
        reads = np.where(row == last, whole_at_end[kind], whole[kind]) & (lists.blocks[position] == row)
        others = np.setdiff1d(np.arange(lists.num_rows), row[reads])
        if not _holds(lists, lists.ranges[unique_head, others, : lists.num_full_ranges], others[:, None]).any(-1).all():
            return False
    return True


def _holds(lists: BlockLists, ranges: np.ndarray, block: np.ndarray) -> Bool[np.ndarray, "rows ranges"]:
    """True where a range holds the block of its row."""
    (low, high), last = (ranges[..., 0], ranges[..., 1]), len(lists.blocks) - 1
    # Blocks ascend within a range: a binary search for the first one that is not before it.
    for _ in range(len(lists.blocks).bit_length()):
        middle = (low + high) // 2
        before = (low < high) & (lists.blocks[np.minimum(middle, last)] < block)
        low, high = np.where(before, middle + 1, low), np.where(before, high, np.minimum(middle, high))
    return (low < ranges[..., 1]) & (lists.blocks[np.minimum(low, last)] == block)


def zero_unread_keys[T](
    problem: Problem,
    operands: Operands,
    names: tuple[str, ...],
    unread: Bool[Array, "k s"] | None,
    key_tables: TileLists | None,
    run: typing.Callable[[Operands], T],
) -> T:
    """`run(operands)` on keys or values [b, s, k, f] that are zero where no query of the KV head's group reads them.

    If the schedule alone decides what is read, this is known beforehand, and mostly there is nothing to do: unread
    blocks are not loaded anyway. If segments, offsets or a selection matter, the unread keys are computed at run time,
    and only if some number is not finite. The branch is around `run`: around the arrays, it would copy them.

    Args:
      names: the arrays among the operands.
      unread: keys that the schedule leaves unread within blocks that are loaded; None if there are none.
      key_tables: XLA's tables of the pass over keys, for a schedule whose unread keys depend on arrays.
    """
    arrays = {name: getattr(operands, name) for name in names}
    if not depends_on_arrays(problem, operands):
        return run(dataclasses.replace(operands, **_zeroed(arrays, None if unread is None else ~unread.T[None])))
    # Both branches compute the same, traced once.
    run = jax.jit(run)
    finite = functools.reduce(jnp.logical_and, [jnp.isfinite(array).all() for array in arrays.values()])

    def on_zeroed(operands: Operands) -> T:
        over_keys = dataclasses.replace(operands, sinks=None, tables=key_tables)
        read = XLA.read_keys(dataclasses.replace(problem, config=None), over_keys)
        return run(dataclasses.replace(operands, **_zeroed(arrays, read)))

    return jax.lax.cond(finite, run, on_zeroed, operands)


def _zeroed(arrays: dict[str, Array], read: Bool[Array, "#b s k"] | None) -> dict[str, Array]:
    return arrays if read is None else {name: jnp.where(read[..., None], each, 0) for name, each in arrays.items()}


@functools.lru_cache(maxsize=64)
def unread_keys(schedule: BlockSchedule) -> Bool[np.ndarray, "k s"] | None:
    """Keys that no query of a KV head's group reads, though their block is read; None if there are none."""
    by_unique_head = np.stack(
        [_read_by(schedule, unique_head) for unique_head in range(schedule.lists.num_unique_heads)]
    )
    read = by_unique_head[schedule.head_index].reshape(schedule.num_kv_heads, -1, *by_unique_head.shape[1:]).any(1)
    tokens = read.reshape(len(read), -1)
    tokens[:, schedule.kv_length :] = True
    if (read.all(-1) | ~read.any(-1)).all():
        return None
    return ~tokens[:, : schedule.kv_length]


def _read_by(schedule: BlockSchedule, unique_head: int) -> Bool[np.ndarray, "columns block_size"]:
    """The keys that some query of a distinct head reads."""
    lists, size = schedule.lists, schedule.block_size
    # Full entries, in time proportional to the ranges: positions of the lists within some range.
    ranges = lists.ranges[unique_head, :, : lists.num_full_ranges].reshape(-1, 2)
    ranges = ranges[ranges[:, 1] > ranges[:, 0]]
    opened = np.zeros(len(lists.blocks) + 1, np.int64)
    np.add.at(opened, ranges[:, 0], 1)
    np.add.at(opened, ranges[:, 1], -1)
    read = np.zeros((schedule.num_columns, size), bool)
    read[lists.blocks[np.cumsum(opened)[:-1] > 0]] = True
    row, position = lists.entries(unique_head, slice(lists.num_full_ranges, None))
    block, mask = lists.blocks[position], lists.mask_ids[position]
    # The first and the last row may have fewer queries.
    first = schedule.query_offset - schedule.first_row * size
    last = first + schedule.query_length - (lists.num_rows - 1) * size
    edge = (row == 0) | (row == lists.num_rows - 1)
    seen = schedule.token_masks.any(1)
    np.logical_or.at(read, block[~edge], seen[mask[~edge]])
    for each, where, kind in zip(row[edge], block[edge], mask[edge], strict=True):
        queries = slice(first if each == 0 else 0, last if each == lists.num_rows - 1 else size)
        read[where] |= schedule.token_masks[kind, queries].any(0)
    return read
