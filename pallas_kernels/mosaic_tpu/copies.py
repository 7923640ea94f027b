"""The ring of what is copied from the chip's memory while something else is computed."""

import typing

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu.masks import Slot
from pallas_kernels.mosaic_tpu.plan import AT_ONCE, Plan
from pallas_kernels.mosaic_tpu.walk import entry_of

PLACES = 2 * AT_ONCE
"""Steps that the ring holds: those that are computed, and as many that are copied meanwhile."""


class Ring(typing.NamedTuple):
    """A buffer of PLACES steps.

    Attributes:
      buffer: [PLACES · step, features].
      entries, tokens: int32 [PLACES · slots] in scalar memory, what every slot of the buffer holds: its entry, and its
        first token.
      ready: semaphores [PLACES].
    """

    buffer: typing.Any
    entries: typing.Any
    tokens: typing.Any
    ready: typing.Any

    @classmethod
    def scratch(cls, plan: Plan, features: int) -> "Ring":
        numbers = pltpu.SMEM((PLACES * plan.slots,), jnp.int32)
        buffer = pltpu.VMEM((PLACES * plan.step, features), plan.dtype)
        return cls(buffer, numbers, numbers, pltpu.SemaphoreType.DMA((PLACES,)))

    def begin(self, plan: Plan, lists, row, step, place, source, first) -> None:
        """Starts the copies of a step of a row.

        Args:
          lists: reference of the entries, int32 [1, list_length].
          place: of the ring.
          source: reference [rows, features].
          first: the row of the source where the tokens begin.
        """
        for slot in range(plan.slots):
            entry, piece = entry_of(plan, row, lists, step * plan.slots + slot)
            at, token = place * plan.slots + slot, piece * plan.slot
            self.entries[at], self.tokens[at] = entry, token
            here = source.at[pl.ds(pl.multiple_of(first + token, plan.slot), plan.slot)]
            there = self.buffer.at[pl.ds(pl.multiple_of(at * plan.slot, plan.slot), plan.slot)]
            pltpu.make_async_copy(here, there, self.ready.at[place]).start()

    def wait(self, plan: Plan, place) -> None:
        here = self.part(plan, place)
        pltpu.make_async_copy(here, here, self.ready.at[place]).wait()

    def part(self, plan: Plan, place):
        """A reference of a step."""
        return self.buffer.at[pl.ds(pl.multiple_of(place * plan.step, plan.step), plan.step)]

    def slots(self, plan: Plan, place) -> list[Slot]:
        """What the slots of a step hold."""
        each = [place * plan.slots + slot for slot in range(plan.slots)]
        return [Slot(jax.lax.shift_right_logical(self.entries[at], plan.block_bits), self.tokens[at]) for at in each]


def after(place, steps: int = 1):
    """So many places on."""
    return place + steps & PLACES - 1
