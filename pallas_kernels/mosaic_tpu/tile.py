"""A tile of rows that walks lists of blocks, whatever it makes of them."""

import typing

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.copies import Ring, after
from pallas_kernels.mosaic_tpu.masks import Conditions, allowed
from pallas_kernels.mosaic_tpu.plan import Plan
from pallas_kernels.mosaic_tpu.products import to_rows
from pallas_kernels.mosaic_tpu.tiles import LANES
from pallas_kernels.mosaic_tpu.walk import AT_ONCE, Cursor, Row, read_row


class StepGroup(typing.NamedTuple):
    """What is computed in one go.

    Attributes:
      round: of the tile.
      places: of the ring, where its steps are.
      masked: whether there is something to mask.
      begin_next: starts the copies of as many steps further on; what is read of the ring is to be read before.
    """

    head_pass: int
    places: list
    masked: bool
    begin_next: typing.Callable[[], None]


class Scratch(typing.NamedTuple):
    """Memory of the walk.

    Attributes:
      cursor: int32 [3] in scalar memory, the step that is copied next.
      row_segments, row_positions: int32 [rows, LANES].
      own: what the kernel has besides.
    """

    ring: Ring
    cursor: typing.Any
    row_segments: typing.Any
    row_positions: typing.Any
    own: typing.Any


def scratch_of(plan: Plan, inputs: typing.Any, own: typing.Any) -> Scratch:
    rows = pltpu.VMEM((plan.rows, LANES), jnp.int32)
    return Scratch(
        Ring.scratch(plan),
        pltpu.SMEM((3,), jnp.int32),
        None if inputs.row_segments is None else rows,
        None if inputs.row_positions is None else rows,
        own,
    )


class Tile:
    """One point of the grid.

    Attributes:
      inputs: references; those of `Inputs` that the walk needs are entries, slices, words, source, and the segments
        and positions of rows and columns.
      head: of the tile, the first of those in it.
    """

    def __init__(self, plan: Plan, inputs: typing.Any, lists, scratch: Scratch):
        self.plan, self.inputs, self.ring, self.cursor = plan, inputs, scratch.ring, scratch.cursor
        batch, self.head_tile, self.tile = (pl.program_id(axis) for axis in range(3))
        at = self.head_tile + (batch * plan.head_tiles if lists.shape[0] > plan.head_tiles else 0)
        self.list_start = lists[at] * plan.list_length
        self.is_first, self.is_last = self.tile == 0, self.tile == plan.num_tiles - 1
        self.scratch = scratch
        self.source_head = self._source_head(batch)
        self.first_piece = None if inputs.first_piece is None else inputs.first_piece[batch]
        first = 0 if inputs.first_position is None else inputs.first_position[batch]
        self.conditions = Conditions(
            inputs.mask_bits, scratch.row_segments, scratch.row_positions, inputs.column_segments, first
        )

    def _source_head(self, batch):
        """The head of the source that the first round walks."""
        raise NotImplementedError

    def _row(self, number) -> Row:
        return read_row(self.plan, self.inputs.ranges, self.list_start, number)

    def allowed(self, place) -> Array:
        """Which columns of a step the rows see: bool [rows, step]."""
        return allowed(self.plan, self.conditions, self.ring.slots(self.plan, place))

    def begin(self) -> None:
        """Before anything else."""
        for ref, given in (
            (self.scratch.row_segments, self.inputs.row_segments),
            (self.scratch.row_positions, self.inputs.row_positions),
        ):
            if ref is not None:
                ref[...] = to_rows(given[...])

        @pl.when(self.is_first)
        def _():
            first = self.inputs.ranges[0, self.plan.num_tiles * self.plan.head_passes * self.plan.row_numbers]
            cursor = Cursor(first, jnp.int32(0), jnp.int32(0))
            self._store(jax.lax.fori_loop(0, AT_ONCE, lambda _, cursor: self._begin_step(cursor), cursor))

    def fold(self, compute: typing.Callable[[StepGroup], None]) -> None:
        """`compute(turn)` for all of them. While one is computed, the next one's copies run, be it another tile's."""
        for number in range(self.plan.head_passes):
            self._fold_round(number, compute)

        @pl.when(self.is_last)
        def _():
            # What was copied beyond the end.
            place = self.cursor[2]
            for step in range(AT_ONCE):
                self.ring.wait(self.plan, after(place, AT_ONCE + step))

    def _fold_round(self, number: int, compute: typing.Callable[[StepGroup], None]) -> None:
        plan, ring = self.plan, self.ring
        row = self._row(self.tile * plan.head_passes + number)

        def step_groups(masked: bool, steps: int):
            def body(_, cursor: Cursor) -> Cursor:
                places = [after(cursor.place, AT_ONCE + step) for step in range(steps)]
                for place in places:
                    ring.wait(plan, place)
                reached = []

                def begin_next():
                    following = cursor
                    for _ in range(steps):
                        following = self._begin_step(following)
                    reached.append(following)

                compute(StepGroup(number, places, masked, begin_next))
                return reached[0]

            return body

        cursor = Cursor(*(self.cursor[index] for index in range(3)))
        steps, plain = row.steps(plan), row.groups_without_mask(plan)
        whole = jax.lax.div(steps, AT_ONCE)
        if plan.num_full_ranges:
            cursor = jax.lax.fori_loop(0, plain, step_groups(False, AT_ONCE), cursor)
        cursor = jax.lax.fori_loop(plain, whole, step_groups(True, AT_ONCE), cursor)
        cursor = jax.lax.fori_loop(whole * AT_ONCE, steps, step_groups(True, 1), cursor)
        self._store(cursor)

    def _store(self, cursor: Cursor) -> None:
        for index, number in enumerate(cursor):
            self.cursor[index] = number

    def _begin_step(self, cursor: Cursor) -> Cursor:
        """Starts a step's copies; gives back the step after it."""
        plan, row = self.plan, self._row(cursor.row)
        head = self.source_head
        if plan.head_passes > 1:
            head = head + jax.lax.rem(cursor.row, plan.head_passes) * plan.step_heads
        self.ring.begin(
            plan, self.inputs.entries, row, cursor.step, cursor.place, self.inputs.source, head, self.first_piece
        )
        ends = cursor.step + 1 >= row.steps(plan)
        return Cursor(
            jnp.where(ends, row.following, cursor.row), jnp.where(ends, 0, cursor.step + 1), after(cursor.place)
        )
