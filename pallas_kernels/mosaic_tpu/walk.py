"""How tiles' entries fill steps: all of it scalar work, done while the matrix units are busy."""

import typing

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_tpu.plan import Plan

AT_ONCE = 2
"""Steps that are computed in one go where there are as many left: what one waits for, the other hides."""


class Row(typing.NamedTuple):
    """The entries of one tile in one round, those without a mask first; numbered from 0 on, in pieces of a slot each.

    Attributes:
      total: pieces.
      full: pieces without a mask.
      ends: the first piece after each part but the last.
      offsets: from a number of an entry in each part to its position in the list.
    """

    total: typing.Any
    full: typing.Any
    ends: tuple
    offsets: tuple

    def steps(self, plan: Plan):
        """At least one, of which all is masked where there is nothing."""
        return jnp.maximum(jax.lax.div(self.total + plan.slots - 1, plan.slots), 1)

    def turns_without_mask(self, plan: Plan):
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


def read_row(plan: Plan, slices, first, number) -> Row:
    """One row.

    Args:
      slices: reference, int32 [1, rows · parts · 2].
      first: where the list begins among all lists.
    """
    at = number * (2 * plan.num_parts)
    total, full, ends, offsets = jnp.int32(0), jnp.int32(0), [], []
    for part in range(plan.num_parts):
        start, stop = slices[0, at + 2 * part], slices[0, at + 2 * part + 1]
        offsets.append(start - first - total)
        total = total + jnp.maximum(stop - start, 0)
        ends.append(total * plan.pieces_of_block)
        full = ends[-1] if part < plan.num_full else full
    return Row(ends[-1], full, tuple(ends[:-1]), tuple(offsets))


def entry_of(plan: Plan, row: Row, entries, piece):
    """What the list holds for a piece, with the mask that hides all of it beyond the last one.

    Args:
      entries: reference, int32 [1, list_length].

    Returns:
      The entry, and the piece's number among all pieces of tokens.
    """
    last = jnp.minimum(piece, row.total - 1)
    offset = row.offsets[0]
    for end, other in zip(row.ends, row.offsets[1:], strict=True):
        offset = jnp.where(last >= end, other, offset)
    of_block = plan.pieces_of_block
    position = jax.lax.div(last, of_block) + offset if of_block > 1 else last + offset
    found = entries[0, jnp.clip(position, 0, plan.list_length - 1)]
    block = found & ((1 << plan.block_bits) - 1)
    entry = jnp.where(piece < row.total, found, block | plan.nothing << plan.block_bits)
    where = block * of_block + jax.lax.rem(jnp.maximum(last, 0), of_block) if of_block > 1 else block
    return entry, where
