"""Zeroing values that no query reads: on tensor cores their weight of zero would turn a NaN or Inf into a NaN."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from pallas_kernels import xla
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.schedule import BlockSchedule


def depends_on_arrays(problem: Problem, operands: Operands) -> bool:
    """Whether what is read is known at run time only."""
    return operands.query_segment_ids is not None or operands.query_offset is not None or problem.schedule is None


def without_unread(problem: Problem, operands: Operands, unread: Bool[Array, "k s"] | None, walks) -> Array:
    """The values [b, s, k, e], zero where no query of the KV head's group reads them.

    Where a schedule alone says what is read, this is known beforehand, and mostly there is nothing to do: blocks that
    nobody reads are not loaded anyway. Where segments, offsets or a selection have a say, it is computed when needed,
    that is if a value is not finite.

    Args:
      unread: what the schedule leaves unread within blocks that are loaded; None where it is nothing.
      walks: XLA's tables of the schedule, where more than it says what is read.
    """
    value = operands.value
    if not depends_on_arrays(problem, operands):
        return value if unread is None else jnp.where(unread.T[None, :, :, None], 0, value)
    return jax.lax.cond(
        jnp.isfinite(value).all(),
        lambda: value,
        lambda: jnp.where(_read(problem, operands, walks)[..., None], value, 0),
    )


def _read(problem: Problem, operands: Operands, walks) -> Bool[Array, "b s k"]:
    """Which keys some query reads: those whose values have a gradient when all logits are zero."""
    problem = dataclasses.replace(problem, scale=1.0, logits_soft_cap=None, tiles=None)
    query, key = (jnp.zeros((*array.shape[:3], 1), jnp.float32) for array in (operands.query, operands.key))
    operands = dataclasses.replace(operands, query=query, key=key, value=key, sinks=None, tables=walks)
    over_queries = dataclasses.replace(operands, tables=None if walks is None else walks[0])
    _, lse = xla.forward(problem, over_queries)
    gradients = xla.backward(problem, operands, jnp.ones_like(query), lse, jnp.zeros_like(lse))
    return gradients[2][..., 0] > 0


@functools.lru_cache(maxsize=64)
def unread_keys(schedule: BlockSchedule) -> Bool[np.ndarray, "k s"] | None:
    """Keys that no query of a KV head's group reads, though their block is read; None where there are none."""
    by_walker = np.stack([_read_by(schedule, walker) for walker in range(schedule.lists.num_walkers)])
    read = by_walker[schedule.head_index].reshape(schedule.num_kv_heads, -1, *by_walker.shape[1:]).any(1)
    tokens = read.reshape(len(read), -1)
    tokens[:, schedule.kv_length :] = True
    if (read.all(-1) | ~read.any(-1)).all():
        return None
    return ~tokens[:, : schedule.kv_length]


def _read_by(schedule: BlockSchedule, walker: int) -> Bool[np.ndarray, "columns block_size"]:
    """The keys that some query of a distinct head reads."""
    lists, size = schedule.lists, schedule.block_size
    # Blocks without a mask, in time that grows with the slices: where in the lists some slice is open.
    slices = lists.slices[walker, :, : lists.num_full].reshape(-1, 2)
    slices = slices[slices[:, 1] > slices[:, 0]]
    opened = np.zeros(len(lists.blocks) + 1, np.int64)
    np.add.at(opened, slices[:, 0], 1)
    np.add.at(opened, slices[:, 1], -1)
    read = np.zeros((schedule.num_columns, size), bool)
    read[lists.blocks[np.cumsum(opened)[:-1] > 0]] = True
    row, position = lists.entries(walker, slice(lists.num_full, None))
    block, mask = lists.blocks[position], lists.masks[position]
    # Of the first and the last row, not all queries exist.
    first = schedule.query_offset - schedule.first_row * size
    last = first + schedule.query_length - (lists.num_rows - 1) * size
    edge = (row == 0) | (row == lists.num_rows - 1)
    seen = schedule.token_masks.any(1)
    np.logical_or.at(read, block[~edge], seen[mask[~edge]])
    for each, where, kind in zip(row[edge], block[edge], mask[edge], strict=True):
        queries = slice(first if each == 0 else 0, last if each == lists.num_rows - 1 else size)
        read[where] |= schedule.token_masks[kind, queries].any(0)
    return read
