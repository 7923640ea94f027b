"""What all kernels share: two warpgroups compute on steps, while a third walks the lists and loads what they read.

Sums do not care in which order their terms come, so a step computes on any blocks: each is brought by a copy of its own
into a slot of the step's buffer.
"""

import typing

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.plan import WARPGROUP_ROWS, WARPGROUPS, WORD, StepPlan
from pallas_kernels.mosaic_gpu.untyped import plgpu
from pallas_kernels.mosaic_gpu.walk import Entry, Walk

WGMMA, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
COMPUTE_REGISTERS, LOAD_REGISTERS = 224, 56


class Stream(typing.NamedTuple):
    """Arrays that every step needs a part of, waited for and given back together.

    Attributes:
      copies: (function of an entry that gives the part in global memory, buffer [stages, tokens, ...]).
      ready: barrier of every stage that says that the copies came.
      free: barrier of every stage that says that both warpgroups are done with them.
    """

    copies: list[tuple[typing.Callable[[Entry], typing.Any], typing.Any]]
    ready: typing.Any
    free: typing.Any


class Condition(typing.NamedTuple):
    """What a masked step compares: buffer [stages, tokens] of the columns, int32 [ROWS] of the rows, and how."""

    columns: typing.Any
    rows: typing.Any
    compare: typing.Callable[[Array, Array], Array]


class Steps:
    """One block of threads, which computes a tile of 128 rows.

    Attributes:
      streams: what every step loads.
      masks: what a masked step loads besides; its `words` are bits, one for each column.
      words: buffer [stages, slots · words, ROWS], or None.
      conditions: compared besides.
    """

    streams: list[Stream]
    masks: Stream
    words: typing.Any
    conditions: list[Condition]

    def __init__(self, plan: StepPlan, walk: Walk):
        self.plan, self.walk = plan, walk
        self.warpgroup = jax.lax.axis_index("warpgroup")
        self.rows = pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

    def compute(self) -> None:
        raise NotImplementedError

    # The warpgroup that loads.

    def load_rows(self) -> None:
        """What comes before the steps."""

    def store_rows(self) -> None:
        """What comes after them."""

    def load(self) -> None:
        walk, slots = self.walk, range(self.plan.slots)
        self.load_rows()

        if self.plan.num_full:

            @pl.loop(0, walk.full_steps)
            def _(step):
                self._load_step(self.streams, step, [walk.full_entry(step, slot) for slot in slots])

        @pl.loop(0, walk.masked_steps)
        def _(masked_step):
            entries = [walk.masked_entry(masked_step, slot) for slot in slots]
            self._load_step(self.streams, walk.full_steps + masked_step, entries)
            self._load_step([self.masks], masked_step, entries)

        self.store_rows()
        # Every arrival is waited for, so that no barrier is left in the middle of a phase.
        for stream in (*self.streams, self.masks):
            for stage in range(self.plan.stages):
                plgpu.barrier_wait(stream.free.at[stage])

    def _load_step(self, streams: list[Stream], step, entries: list[Entry]) -> None:
        stage = jax.lax.rem(step, self.plan.stages)
        for stream in streams:
            plgpu.barrier_wait(stream.free.at[stage])
            for part_of, buffer in stream.copies:
                each = buffer.shape[1] // self.plan.slots
                for slot, entry in enumerate(entries):
                    there = buffer.at[stage, pl.ds(slot * each, each)]
                    plgpu.copy_gmem_to_smem(part_of(entry), there, stream.ready.at[stage])

    # The warpgroups that compute.

    def free_all(self) -> None:
        """Nothing was loaded yet: every buffer can be."""
        for stream in (*self.streams, self.masks):
            for stage in range(self.plan.stages):
                plgpu.barrier_arrive(stream.free.at[stage])

    def fold(self, step: typing.Callable, carry: typing.Any) -> typing.Any:
        """`carry = step(number, masked_step, carry)` for all steps; `masked_step` is None where nothing is masked."""
        walk = self.walk
        if self.plan.num_full:
            carry = jax.lax.fori_loop(0, walk.full_steps, lambda number, carry: step(number, None, carry), carry)
        return jax.lax.fori_loop(
            0, walk.masked_steps, lambda number, carry: step(walk.full_steps + number, number, carry), carry
        )

    def allowed(self, masked_step) -> Array:
        """Which columns of a step the rows see: bool [WARPGROUP_ROWS, tokens]."""
        plan = self.plan
        stage = jax.lax.rem(masked_step, plan.stages)
        shape = (WARPGROUP_ROWS, plan.step)
        plgpu.barrier_wait(self.masks.ready.at[stage])
        found = []
        if self.words is not None:
            words = [
                plgpu.load(self.words.at[stage, index, self.rows], layout=ROW, optimized=False)
                for index in range(plan.slots * plan.words)
            ]
            found.append(_bits(words, shape, min(plan.slot, WORD)))
        for columns, rows, compare in self.conditions:
            column = plgpu.load(columns.at[stage], layout=COLUMN, optimized=False)
            row = plgpu.load(rows.at[self.rows], layout=ROW, optimized=False)
            found.append(compare(spread(column, shape, 1), spread(row, shape, 0)))
        # What was read here is overwritten by copies: they go another way to shared memory.
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.masks.free.at[stage])
        allowed = found[0]
        for each in found[1:]:
            allowed = allowed & each
        return allowed


def run(tile: typing.Callable[[], Steps]) -> None:
    """What each warpgroup does. Each role makes the tile for itself: what both keep would cost both registers."""
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        mine = tile()
        mine.free_all()
        mine.compute()

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
        tile().load()


def spread(array: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Of every row (axis 0) or column (axis 1), for all elements of a step."""
    return jax.lax.broadcast_in_dim(array, shape, [axis])


def _bits(words: list, shape: tuple[int, int], width: int) -> Array:
    """Bit `column % width` of word `column // width` of every row: bool `shape`."""
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
    word = spread(words[0], shape, 0)
    for index, other in enumerate(words[1:], 1):
        word = jnp.where(column // width == index, spread(other, shape, 0), word)
    # Of a column's number, bits 1 and 2 depend on the thread and the rest on the register: shifted by the first, a
    # word is tested against a constant for every register.
    word = word >> (column & 6)
    return (word & (1 << (column & (width - 1) & ~6))) != 0
