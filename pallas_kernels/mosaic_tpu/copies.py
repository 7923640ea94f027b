"""The ring of what is copied from the chip's memory while something else is computed."""

import typing

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.plan import Plan
from pallas_kernels.mosaic_tpu.walk import AT_ONCE, Row, entry_of, piece_of

PLACES = 2 * AT_ONCE
"""Steps that the ring holds: those that are computed, and as many that are copied meanwhile."""


class Slot(typing.NamedTuple):
    """What a slot of a step holds: the kind of its mask, and its first token."""

    mask_id: typing.Any
    token: typing.Any


class Ring(typing.NamedTuple):
    """A buffer of PLACES steps.

    Attributes:
      buffer: [PLACES · slots · heads of a step, slot, features].
      entries: int32 [PLACES · slots] in scalar memory, of what every slot of the buffer holds.
      ready: semaphores [PLACES].
    """

    buffer: typing.Any
    entries: typing.Any
    ready: typing.Any

    @classmethod
    def scratch(cls, plan: Plan) -> "Ring":
        numbers = pltpu.SMEM((PLACES * plan.slots,), jnp.int32)
        shape = PLACES * plan.slots * plan.step_heads, plan.slot, plan.key_dim + plan.value_dim
        return cls(pltpu.VMEM(shape, plan.dtype), numbers, pltpu.SemaphoreType.DMA((PLACES,)))

    def begin(self, plan: Plan, lists, row: Row, step, place, source, head, first_piece) -> None:
        """Starts the copies of a step of a row.

        Args:
          lists: reference of the entries, int32 [1, list_length].
          source: reference [heads, pieces, slot, features].
          head: the first of the source.
          first_piece: which the source's first one is; None for 0.
        """
        first = step * plan.slots
        for slot in range(plan.slots):
            entry, at = entry_of(plan, row, lists, first + slot), place * plan.slots + slot
            piece = piece_of(plan, entry)
            if first_piece is not None:
                # A head that reads nothing may name what is not there.
                piece = jnp.clip(piece - first_piece, 0, source.shape[1] - 1)
                entry = piece | (entry & -1 << plan.piece_bits)
            self.entries[at] = entry
            here = source.at[pl.ds(head, plan.step_heads), piece]
            there = self.buffer.at[pl.ds(at * plan.step_heads, plan.step_heads)]
            pltpu.make_async_copy(here, there, self.ready.at[place]).start()

    def wait(self, plan: Plan, place) -> None:
        each = plan.slots * plan.step_heads
        here = self.buffer.at[pl.ds(place * each, each)]
        pltpu.make_async_copy(here, here, self.ready.at[place]).wait()

    def read(self, plan: Plan, place) -> tuple[Array, Array]:
        """The two halves of a step: [step, key_dim] and [step, value_dim]."""
        each = plan.slots * plan.step_heads
        here = self.buffer.at[pl.ds(place * each, each)]
        first, second = here[:, :, : plan.key_dim], here[:, :, plan.key_dim :]
        return first.reshape(plan.step_size, plan.key_dim), second.reshape(plan.step_size, plan.value_dim)

    def slots(self, plan: Plan, place) -> list[Slot]:
        """What the slots of a step hold."""
        entries = [self.entries[place * plan.slots + slot] for slot in range(plan.slots)]
        return [
            Slot(jax.lax.shift_right_logical(entry, plan.piece_bits), piece_of(plan, entry) * plan.slot)
            for entry in entries
        ]


def after(place, steps: int = 1):
    """So many places on."""
    return place + steps & PLACES - 1
