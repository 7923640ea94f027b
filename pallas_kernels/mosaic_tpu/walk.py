"""How tiles' entries fill steps: all of it scalar work, done while the matrix units are busy."""

import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.plan import Plan

AT_ONCE = 2
"""Steps that are computed in one go where there are as many left: what one waits for, the other hides."""


class Row(typing.NamedTuple):
    """The entries of one tile in one round, those without a mask first, numbered from 0 on.

    Attributes:
      total: entries.
      full: those without a mask.
      ends: the first one after each part but the last.
      offsets: from the number of an entry in each part to its position in the list.
      following: the next row that reads something, or the last such row.
    """

    total: typing.Any
    full: typing.Any
    ends: tuple
    offsets: tuple
    following: typing.Any

    def steps(self, plan: Plan):
        return jax.lax.div(self.total + plan.slots - 1, plan.slots)

    def groups_without_mask(self, plan: Plan):
        """Turns of AT_ONCE steps that need no mask; all others come after them, and have one."""
        return jax.lax.div(self.full, AT_ONCE * plan.slots)


class Cursor(typing.NamedTuple):
    """A step of all those that the rows of a head walk, one row after the other.

    Attributes:
      row: of the slices: a tile in a round.
      place: of the ring, where it is brought to.
    """

    row: typing.Any
    step: typing.Any
    place: typing.Any


def read_row(plan: Plan, ranges, first, number) -> Row:
    """One row.

    Args:
      ranges: reference, int32 [1, numbers]: see `numbers_of`.
      first: where the list begins among all lists.
    """
    at = number * plan.row_numbers
    total, full, ends, offsets = jnp.int32(0), jnp.int32(0), [], []
    for part in range(plan.num_ranges):
        start, stop = ranges[0, at + 2 * part], ranges[0, at + 2 * part + 1]
        offsets.append(start - first - total)
        total = total + jnp.maximum(stop - start, 0)
        ends.append(total)
        full = ends[-1] if part < plan.num_full_ranges else full
    return Row(total, full, tuple(ends[:-1]), tuple(offsets), ranges[0, at + 2 * plan.num_ranges])


def row_scalars(ranges: Array) -> Array:
    """What scalar memory holds of rows: int32 [b|1, heads, 1, numbers].

    Those of a row are the ends of its slices and the next row that reads something, for no step is made for the others;
    after the last one comes the last one again. Beyond all rows stands the first that reads something.

    Args:
      ranges: int32 [b|1, heads, rows, ranges, 2].
    """
    *outer, rows, _, _ = ranges.shape
    row = jnp.arange(rows, dtype=jnp.int32)
    reads = (ranges[..., 1] > ranges[..., 0]).any(-1)
    last = jnp.where(reads, row, 0).max(-1, keepdims=True)
    ahead = jax.lax.cummin(jnp.where(reads, row, rows), len(outer), reverse=True)
    following = jnp.minimum(jnp.concatenate([ahead[..., 1:], last], -1), last)
    numbers = jnp.concatenate([ranges.reshape(*outer, rows, -1), following[..., None]], -1)
    first = jnp.minimum(ahead[..., :1], last)
    return jnp.concatenate([numbers.reshape(*outer, -1), first], -1)[..., None, :]


def entry_of(plan: Plan, row: Row, entries, number):
    """An entry of a row; beyond the last one that one again, with the mask that hides all of it.

    Args:
      entries: reference, int32 [1, list_length].
    """
    if plan.in_steps:
        return entries[0, row.offsets[0] + number]
    last = jnp.minimum(number, jnp.maximum(row.total, 1) - 1)
    offset = row.offsets[0]
    for end, other in zip(row.ends, row.offsets[1:], strict=True):
        offset = jnp.where(last >= end, other, offset)
    entry = entries[0, last + offset]
    return jnp.where(number < row.total, entry, piece_of(plan, entry) | plan.nothing << plan.piece_bits)


def piece_of(plan: Plan, entry):
    """Which slot's tokens of the source an entry stands for."""
    return entry & ((1 << plan.piece_bits) - 1)
