"""What a step's columns have, and which of them the rows of a tile see: bits of masks, segments, positions."""

import typing

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.copies import Slot
from pallas_kernels.mosaic_tpu.plan import Plan
from pallas_kernels.mosaic_tpu.tables import WORD_BITS
from pallas_kernels.mosaic_tpu.tiles import LANES

SUBLANES = 8
NOWHERE = 2**31 - 1
"""The position of a key that is not there: behind every query."""


class Conditions(typing.NamedTuple):
    """What masks are made of, in references; what is absent is None.

    Attributes:
      mask_bits: int32 [masks, words, columns].
      row_segments, row_positions: int32 [rows, LANES], each row's in all lanes.
      segments: int32 [tokens / LANES, LANES], of columns.
      first: position of the columns' first token.
    """

    mask_bits: typing.Any
    row_segments: typing.Any
    row_positions: typing.Any
    segments: typing.Any
    first: typing.Any


def allowed(plan: Plan, conditions: Conditions, slots: list[Slot]) -> Array:
    """Which columns of a step the rows of a tile see: bool [rows, step]."""
    found = []
    if conditions.mask_bits is not None:
        found.append(_bits(plan, conditions.mask_bits, slots))
    if plan.member_size is not None:
        found.append(_members(plan, slots))
    if conditions.segments is not None:
        ids = over_lanes(plan, slots, lambda slot, _, lane: lane_row(plan, conditions.segments, slot, lane))
        found.append(widen(conditions.row_segments[...], plan.step_size) == ids[:1])
    if conditions.row_positions is not None:
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, max(plan.slot, LANES)), 1)
        in_slot = (lane & (plan.slot - 1)) + conditions.first

        def position(slot: Slot, *_) -> Array:
            here = slot.token + in_slot
            return jnp.where(slot.mask_id == plan.nothing, NOWHERE, here) if plan.ascending else here

        columns = over_lanes(plan, slots, position)
        rows = widen(conditions.row_positions[...], plan.step_size)
        found.append(columns <= rows if plan.ascending else columns >= rows)
    allowed = found[0]
    for each in found[1:]:
        allowed = allowed & each
    return allowed


def widen(array: Array, columns: int) -> Array:
    """[rows, LANES], the same in all lanes, for more of them."""
    return jnp.tile(array, (1, columns // LANES))


def over_lanes(plan: Plan, slots: list[Slot], read: typing.Callable[[Slot, int, int], Array]) -> Array:
    """What every slot has for each of its columns, one beside the other, all heads' for each: [rows, step].

    Args:
      read: of a slot, one of its heads and a lane, the head's own [rows, columns]; where they are fewer than there are
        lanes, from that lane on.
    """
    pieces = [(slot, head) for slot in slots for head in range(plan.step_heads)]
    each, groups = max(1, LANES // plan.slot), []
    for first in range(0, len(pieces), each):
        found = read(*pieces[first], 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1)
        for index in range(1, each):
            at = index * plan.slot
            found = jnp.where(lane < at, found, read(*pieces[first + index], at))
        groups.append(found)
    return jnp.concatenate(groups, 1)


def lane_row(plan: Plan, table, slot: Slot, lane: int) -> Array:
    """A slot's part of a table [tokens / LANES, LANES]: [SUBLANES, columns], all rows alike, from a lane on."""
    row = jax.lax.div(slot.token, LANES)
    if plan.slot >= LANES:
        found = [table[pl.ds(row + index, 1)] for index in range(plan.slot // LANES)]
        return jnp.broadcast_to(jnp.concatenate(found, 1), (SUBLANES, plan.slot))
    found = jnp.broadcast_to(table[pl.ds(row, 1)], (SUBLANES, LANES))
    return pltpu.roll(found, jax.lax.rem(lane + LANES - jax.lax.rem(slot.token, LANES), LANES), 1)


def _bits(plan: Plan, table, slots: list[Slot]) -> Array:
    width = min(plan.row_tokens, WORD_BITS)
    mask_bits = over_lanes(plan, slots, lambda slot, *_: table[slot.mask_id])
    bit = jnp.left_shift(1, jax.lax.broadcasted_iota(jnp.int32, (width, plan.step_size), 0))
    seen = [
        jnp.broadcast_to(mask_bits[index : index + 1], bit.shape) & bit != 0
        for index in range(plan.row_tokens // width)
    ]
    return jnp.concatenate(seen * plan.row_heads, 0)


def _members(plan: Plan, slots: list[Slot]) -> Array:
    """Of entries that have a bit for each block of rows."""
    assert plan.member_size is not None  # else there are no such bits
    shape = SUBLANES, max(plan.slot, LANES)
    mask_ids = over_lanes(plan, slots, lambda slot, *_: jnp.full(shape, slot.mask_id, jnp.int32))
    member = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, plan.step_size), 0) >> (plan.member_size.bit_length() - 1)
    return jnp.broadcast_to(mask_ids[:1], member.shape) >> member & 1 != 0
