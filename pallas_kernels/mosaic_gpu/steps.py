"""What all kernels share: two warpgroups compute on steps, while a third walks the lists and loads what they read.

Sums do not care in which order their terms come, so a step computes on any blocks: each is brought by a copy of its own
into a slot of the step's buffer.
"""

import typing

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.plan import WARPGROUP_ROWS, WARPGROUPS, StepPlan, bits_per_word
from pallas_kernels.mosaic_gpu.untyped import plgpu
from pallas_kernels.mosaic_gpu.walk import Cursor, Entry, Walk

WGMMA, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


class Registers(typing.NamedTuple):
    """Of a thread that computes and of one that loads; there are 504 for two of the former and one of the latter."""

    compute: int
    load: int


USUAL = Registers(224, 56)


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


class Step(typing.NamedTuple):
    """One step of those that compute.

    Attributes:
      number: in order.
      stage: where what it needs is.
      mask_stage: where its masks are; None where nothing is masked.
    """

    number: typing.Any
    stage: typing.Any
    mask_stage: typing.Any


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
    mask_bits: typing.Any
    conditions: list[Condition]

    def __init__(self, plan: StepPlan, walk_of: typing.Callable[[typing.Any], Walk], head_passes: int = 1):
        """Args:
        walk_of: what is walked in a round.
        head_passes: of all of them, the steps without a mask come first.
        """
        self.plan, self.head_passes = plan, head_passes
        only = walk_of(0) if head_passes == 1 else None
        self.walk_of = walk_of if only is None else lambda number: only
        self.warpgroup = jax.lax.axis_index("warpgroup")
        self.rows = pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        self.full_steps = self._in_head_passes(lambda walk, steps: steps + walk.full_steps, jnp.int32(0))
        self.masked_steps = self._in_head_passes(lambda walk, steps: steps + walk.masked_steps, jnp.int32(0))

    def _in_head_passes(self, walked: typing.Callable[[Walk, typing.Any], typing.Any], carry):
        """`carry = walked(walk, carry)` in every round."""
        if self.head_passes == 1:
            return walked(self.walk_of(0), carry)
        return jax.lax.fori_loop(0, self.head_passes, lambda number, carry: walked(self.walk_of(number), carry), carry)

    def next(self, stage):
        """The stage of the next step. Counted: a remainder would take more registers than there are."""
        return jnp.where(stage == self.plan.num_stages - 1, 0, stage + 1)

    def compute(self) -> None:
        raise NotImplementedError

    # The warpgroup that loads.

    def load_rows(self) -> None:
        """What comes before the steps."""

    def store_rows(self) -> None:
        """What comes after them."""

    def load(self) -> None:
        def entries(walk: Walk, cursor: Cursor, entry_at) -> tuple[list[Entry], Cursor]:
            found = []
            for _ in range(self.plan.slots):
                found.append(entry_at(cursor))
                cursor = walk.after(cursor)
            return found, cursor

        def load_full(walk: Walk, steps):
            def load(step, cursor: Cursor) -> Cursor:
                found, cursor = entries(walk, cursor, walk.full_entry)
                self._load_step(self.streams, steps + step, found)
                return cursor

            jax.lax.fori_loop(0, walk.full_steps, load, walk.full_start())
            return steps + walk.full_steps

        def load_masked(walk: Walk, steps):
            def load(step, cursor: Cursor) -> Cursor:
                found, cursor = entries(walk, cursor, walk.masked_entry)
                self._load_step(self.streams, self.full_steps + steps + step, found)
                self._load_step([self.masks], steps + step, found)
                return cursor

            jax.lax.fori_loop(0, walk.masked_steps, load, walk.masked_start())
            return steps + walk.masked_steps

        self.load_rows()
        if self.plan.num_full_ranges:
            self._in_head_passes(load_full, jnp.int32(0))
        self._in_head_passes(load_masked, jnp.int32(0))
        self.store_rows()
        # Every arrival is waited for, so that no barrier is left in the middle of a phase.
        for number in range(self.plan.num_stages):
            self._wait_until_free(self.streams, self.full_steps + self.masked_steps + number)
            self._wait_until_free([self.masks], self.masked_steps + number)

    def _wait_until_free(self, streams: list[Stream], step) -> None:
        for stream in streams:
            plgpu.barrier_wait(stream.free.at[jax.lax.rem(step, self.plan.num_stages)])

    def _load_step(self, streams: list[Stream], step, entries: list[Entry]) -> None:
        stage = jax.lax.rem(step, self.plan.num_stages)
        for stream in streams:
            plgpu.barrier_wait(stream.free.at[stage])
            for part_of, buffer in stream.copies:
                each = buffer.shape[1] // self.plan.slots
                # Copies that mind the ends of arrays want addresses of 128 bytes, and 16 numbers take 64. Arrays of
                # one number a token have room for whole blocks.
                ends = plgpu.OOBFillMode.PROMISE_IN_BOUNDS if len(buffer.shape) == 2 else None
                for slot, entry in enumerate(entries):
                    there = buffer.at[stage, pl.ds(slot * each, each)]
                    plgpu.copy_gmem_to_smem(part_of(entry), there, stream.ready.at[stage], oob_mode=ends)

    # The warpgroups that compute.

    def free_all(self) -> None:
        """Nothing was loaded yet: every buffer can be."""
        for stream in (*self.streams, self.masks):
            for stage in range(self.plan.num_stages):
                plgpu.barrier_arrive(stream.free.at[stage])

    def fold(self, step: typing.Callable, carry: typing.Any) -> typing.Any:
        """`carry = step(where, carry)` for all steps, `where` being a `Step`."""
        stage = jnp.int32(0)
        self._of_rows = [plgpu.load(each.rows.at[self.rows], layout=ROW, optimized=False) for each in self.conditions]

        def full(number, state):
            stage, carry = state
            return self.next(stage), step(Step(number, stage, None), carry)

        def masked(number, state):
            stage, mask_stage, carry = state
            carry = step(Step(self.full_steps + number, stage, mask_stage), carry)
            return self.next(stage), self.next(mask_stage), carry

        if self.plan.num_full_ranges:
            stage, carry = jax.lax.fori_loop(0, self.full_steps, full, (stage, carry))
        return jax.lax.fori_loop(0, self.masked_steps, masked, (stage, jnp.int32(0), carry))[2]

    def allowed(self, stage) -> Array:
        """Which columns of a step the rows see, by the masks of a stage: bool [WARPGROUP_ROWS, tokens]."""
        plan = self.plan
        shape = (WARPGROUP_ROWS, plan.step_size)
        plgpu.barrier_wait(self.masks.ready.at[stage])
        found = []
        if self.mask_bits is not None:
            mask_bits = [
                plgpu.load(self.mask_bits.at[stage, index, self.rows], layout=ROW, optimized=False)
                for index in range(plan.slots * plan.mask_words)
            ]
            found.append(_bits(mask_bits, shape, bits_per_word(plan.slot)))
        for (columns, _, compare), row in zip(self.conditions, self._of_rows, strict=True):
            column = plgpu.load(columns.at[stage], layout=COLUMN, optimized=False)
            found.append(compare(spread(column, shape, 1), spread(row, shape, 0)))
        # What was read here is overwritten by copies: they go another way to shared memory.
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.masks.free.at[stage])
        allowed = found[0]
        for each in found[1:]:
            allowed = allowed & each
        return allowed


def run(tile: typing.Callable[[], Steps], registers: Registers) -> None:
    """What each warpgroup does. Each role makes the tile for itself: what both keep would cost both registers."""
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(registers.compute, action="increase")
        mine = tile()
        mine.free_all()
        mine.compute()

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(registers.load, action="decrease")
        tile().load()


def spread(array: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Of every row (axis 0) or column (axis 1), for all elements of a step."""
    return jax.lax.broadcast_in_dim(array, shape, [axis])


def _bits(mask_bits: list, shape: tuple[int, int], width: int) -> Array:
    """Bit `column % width` of word `column // width` of every row: bool `shape`."""
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
    word = spread(mask_bits[0], shape, 0)
    for index, other in enumerate(mask_bits[1:], 1):
        word = jnp.where(column // width == index, spread(other, shape, 0), word)
    # Of a column's number, bits 1 and 2 depend on the thread and the rest on the register: shifted by the first, a
    # word is tested against a constant for every register.
    word = word >> (column & 6)
    return (word & (1 << (column & (width - 1) & ~6))) != 0
