"""Which keys of a step the rows of a tile see: bits of the schedule's masks, segments, positions."""

import typing

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.plan import Plan
from pallas_kernels.mosaic_tpu.tables import EMPTY, WORD
from pallas_kernels.mosaic_tpu.tiles import LANES

SUBLANES = 8
NOWHERE = 2**31 - 1
"""The position of a key that is not there: behind every query."""


class Slot(typing.NamedTuple):
    """What a slot of a step holds: the kind of its mask, and its first token."""

    kind: typing.Any
    token: typing.Any


class Conditions(typing.NamedTuple):
    """What masks are made of; what is absent is None.

    Attributes:
      words: reference, int32 [kinds, words, keys].
      query_segments, query_positions: reference, int32 [rows, LANES], each row's in all lanes.
      kv_segments: reference, int32 [s / LANES, LANES].
    """

    words: typing.Any
    query_segments: typing.Any
    query_positions: typing.Any
    kv_segments: typing.Any


def allowed(plan: Plan, conditions: Conditions, slots: list[Slot]) -> Array:
    """Which of a step's keys the rows of a tile see: bool [rows, step]."""
    found = []
    if conditions.words is not None:
        found.append(_bits(plan, conditions.words, slots))
    if conditions.kv_segments is not None:
        ids = _over_lanes(plan, slots, lambda slot, lane: _segment_ids(plan, conditions.kv_segments, slot, lane))
        found.append(over_step(plan, conditions.query_segments[...]) == ids[:1])
    if conditions.query_positions is not None:
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, max(plan.slot, LANES)), 1)
        in_slot = lane & (plan.slot - 1)

        def position(slot: Slot, _) -> Array:
            return jnp.where(slot.kind == EMPTY, NOWHERE, slot.token + in_slot)

        positions = _over_lanes(plan, slots, position)
        found.append(positions <= over_step(plan, conditions.query_positions[...]))
    allowed = found[0]
    for each in found[1:]:
        allowed = allowed & each
    return allowed


def over_step(plan: Plan, array: Array) -> Array:
    """[rows, LANES], the same in all lanes, for all keys of a step."""
    return jnp.tile(array, (1, plan.step // LANES))


def _over_lanes(plan: Plan, slots: list[Slot], read: typing.Callable[[Slot, int], Array]) -> Array:
    """What every slot has for each of its keys, one slot beside the other: [rows, step].

    Args:
      read: a slot's own [rows, keys], and where there are more lanes than it has keys, those from a given lane on.
    """
    each = max(1, LANES // plan.slot)
    groups = []
    for first in range(0, len(slots), each):
        found = read(slots[first], 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1)
        for index in range(1, each):
            found = jnp.where(lane < index * plan.slot, found, read(slots[first + index], index * plan.slot))
        groups.append(found)
    return jnp.concatenate(groups, 1)


def _bits(plan: Plan, table, slots: list[Slot]) -> Array:
    width, piece = min(plan.queries, WORD), plan.pieces_of_block

    def read(slot: Slot, _) -> Array:
        if piece == 1:
            return table[slot.kind]
        part = jax.lax.rem(jax.lax.div(slot.token, plan.slot), piece)
        return table[slot.kind, :, pl.ds(pl.multiple_of(part * plan.slot, plan.slot), plan.slot)]

    words = _over_lanes(plan, slots, read)
    bit = jnp.left_shift(1, jax.lax.broadcasted_iota(jnp.int32, (width, plan.step), 0))
    seen = [jnp.broadcast_to(words[index : index + 1], bit.shape) & bit != 0 for index in range(plan.queries // width)]
    return jnp.concatenate(seen * plan.heads, 0)


def _segment_ids(plan: Plan, table, slot: Slot, lane: int) -> Array:
    """[SUBLANES, keys], all rows alike; the slot's own from a lane on."""
    row = jax.lax.div(slot.token, LANES)
    if plan.slot >= LANES:
        found = [table[pl.ds(row + index, 1)] for index in range(plan.slot // LANES)]
        return jnp.broadcast_to(jnp.concatenate(found, 1), (SUBLANES, plan.slot))
    found = jnp.broadcast_to(table[pl.ds(row, 1)], (SUBLANES, LANES))
    return pltpu.roll(found, jax.lax.rem(lane + LANES - jax.lax.rem(slot.token, LANES), LANES), 1)
