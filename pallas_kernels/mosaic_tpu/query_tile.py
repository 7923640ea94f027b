"""A tile of queries on a TPU, which walks lists of keys: the forward pass, and the gradient of the queries."""

import dataclasses
import math
import typing

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.arrange import Inputs
from pallas_kernels.mosaic_tpu.copies import Ring, after
from pallas_kernels.mosaic_tpu.masks import Conditions
from pallas_kernels.mosaic_tpu.plan import AT_ONCE, Plan
from pallas_kernels.mosaic_tpu.products import to_rows
from pallas_kernels.mosaic_tpu.tiles import LANES
from pallas_kernels.mosaic_tpu.walk import Cursor, Row, read_row
from pallas_kernels.platforms import interpreted
from pallas_kernels.sharding import varying_like


class Turn(typing.NamedTuple):
    """What is computed in one go.

    Attributes:
      places: of the ring, where its steps are.
      masked: whether there is something to mask.
      begin_next: starts the copies of as many steps further on; what is read of the ring is to be read before.
    """

    places: list
    masked: bool
    begin_next: typing.Callable[[], None]


def launch_query_tiles(name: str, plan: Plan, inputs: Inputs, results: dict, scratch: tuple, tile: typing.Callable):
    """Runs `tile(QueryTile, results, scratch)` for every tile of queries.

    Args:
      results: of each its shape [b, heads of tiles, ...], as a block of the grid.
      scratch: memory besides that of the walk.
    """
    rest = dataclasses.replace(inputs, lists=None, key_value=in_hbm(inputs.key_value))
    arrays, structure = jax.tree.flatten(rest)
    specs = jax.tree.leaves(_specs(plan, inputs), is_leaf=lambda each: isinstance(each, pl.BlockSpec))
    walk, walked = jax.tree.flatten(_walk_scratch(plan, inputs))

    def kernel(lists, *refs):
        refs = list(refs)
        here = jax.tree.unflatten(structure, refs[: len(arrays)])
        outs = refs[len(arrays) : len(arrays) + len(results)]
        rest = refs[len(arrays) + len(results) :]
        mine = jax.tree.unflatten(walked, rest[: len(walk)])
        tile(QueryTile(plan, here, lists, *mine), outs, rest[len(walk) :])

    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in results.values()]
    found = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(plan.batch, plan.head_tiles, plan.tiles),
            in_specs=specs,
            out_specs=[spec for _, _, spec in results.values()],
            scratch_shapes=[*walk, *scratch],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=vmem_limit(arrays, specs),
        ),
        name=name,
    )(inputs.lists, *arrays)
    return tuple(varying_like(array, inputs.query) for array in found)


def in_hbm(array: Array) -> Array:
    """Not where XLA else finds room for it: in vector memory, copies of it would be loops of loads and stores."""
    return array if interpreted() else pltpu.with_memory_space_constraint(array, pltpu.HBM)


def of_tile(shape: tuple[int, ...]) -> pl.BlockSpec:
    """Of [b, heads, tokens, features], a tile's heads and tokens; of [b, heads, tiles, 1, rows], a tile's rows."""
    if len(shape) == 4:
        return pl.BlockSpec((None, *shape[1:]), lambda b, h, t, _: (b, h, t, 0))
    return pl.BlockSpec((None, None, None, *shape[3:]), lambda b, h, t, _: (b, h, t, 0, 0))


def vmem_limit(arrays: list, specs: list) -> int:
    """Bytes of vector memory to ask for: what stays there all the time, and room for the rest."""
    whole = sum(
        2 * array.dtype.itemsize * math.prod(size or 1 for size in spec.block_shape)
        for array, spec in zip(arrays, specs, strict=True)
        if spec.block_shape is not None and spec.memory_space is None
    )
    return whole + ROOM


ROOM = 14 << 20
"""Bytes of vector memory for scratch and spilled registers."""


def _specs(plan: Plan, inputs: Inputs) -> Inputs:
    def list_of(b, h, t, lists):
        return lists[(b * plan.head_tiles if inputs.lists.shape[0] > plan.head_tiles else 0) + h], 0, 0

    def batch_of(array, b):
        return b if array.shape[0] > 1 else 0

    def given(array, spec: typing.Callable[[], pl.BlockSpec]):
        return None if array is None else spec()

    scalars, slices = pltpu.SMEM, inputs.slices
    of_queries = (plan.heads, plan.queries)
    rows = pl.BlockSpec((None, None, None, 1, plan.rows), lambda b, h, t, _: (b, h, t, 0, 0))
    ids = pl.BlockSpec((None, None, 1, plan.rows), lambda b, h, t, _: (b, t, 0, 0))
    return Inputs(
        lists=typing.cast(typing.Any, None),
        entries=pl.BlockSpec((None, 1, plan.list_length), list_of, memory_space=scalars),
        slices=pl.BlockSpec(
            (None, None, *slices.shape[2:]), lambda b, h, t, _: (batch_of(slices, b), h, 0, 0), memory_space=scalars
        ),
        words=given(inputs.words, lambda: pl.BlockSpec(inputs.words.shape, lambda b, h, t, _: (0, 0, 0))),
        query=pl.BlockSpec((None, *of_queries, plan.key_dim), lambda b, h, t, _: (b, h, t, 0)),
        key_value=pl.BlockSpec(memory_space=pl.ANY),
        sinks=given(inputs.sinks, lambda: pl.BlockSpec(memory_space=scalars)),
        query_segments=given(inputs.query_segments, lambda: ids),
        query_positions=given(inputs.query_positions, lambda: ids),
        kv_segments=given(
            inputs.kv_segments,
            lambda: pl.BlockSpec((None, *inputs.kv_segments.shape[1:]), lambda b, h, t, _: (b, 0, 0)),
        ),
        dout=given(
            inputs.dout, lambda: pl.BlockSpec((None, *of_queries, plan.value_dim), lambda b, h, t, _: (b, h, t, 0))
        ),
        lse=given(inputs.lse, lambda: rows),
        delta=given(inputs.delta, lambda: rows),
    )


def _walk_scratch(plan: Plan, inputs: Inputs) -> tuple:
    """The ring, which step is copied next, and the rows' segments and positions."""
    rows = pltpu.VMEM((plan.rows, LANES), jnp.int32)
    return (
        Ring.scratch(plan, plan.key_dim + plan.value_dim),
        pltpu.SMEM((3,), jnp.int32),
        None if inputs.query_segments is None else rows,
        None if inputs.query_positions is None else rows,
    )


class QueryTile:
    """One point of the grid."""

    def __init__(self, plan: Plan, inputs: typing.Any, lists, ring: Ring, cursor, segments, positions):
        self.plan, self.inputs, self.ring, self.cursor = plan, inputs, ring, cursor
        batch, self.head, tile = (pl.program_id(axis) for axis in range(3))
        at = self.head + (batch * plan.head_tiles if lists.shape[0] > plan.head_tiles else 0)
        self.list_start = lists[at] * plan.list_length
        self.row = self._row(tile)
        self.is_first, self.is_last = tile == 0, tile == plan.tiles - 1
        num_kv_heads = plan.head_tiles * plan.heads // plan.group
        kv_head = jax.lax.div(self.head * plan.heads, plan.group)
        self.first = (batch * num_kv_heads + kv_head) * plan.kv_length
        self.conditions = Conditions(inputs.words, segments, positions, inputs.kv_segments)

    def _row(self, tile) -> Row:
        return read_row(self.plan, self.inputs.slices, self.list_start, tile)

    def fold(self, compute: typing.Callable[[Turn], None]) -> None:
        """`compute(turn)` for all of them. While one is computed, the next one's copies run, be it another tile's."""
        plan, ring, row = self.plan, self.ring, self.row
        for ref, given in (
            (self.conditions.query_segments, self.inputs.query_segments),
            (self.conditions.query_positions, self.inputs.query_positions),
        ):
            if ref is not None:
                ref[...] = to_rows(given[...])

        @pl.when(self.is_first)
        def _():
            cursor = Cursor(jnp.int32(0), jnp.int32(0), jnp.int32(0))
            for _ in range(AT_ONCE):
                cursor = self._begin(cursor)
            for index, number in enumerate(cursor):
                self.cursor[index] = number

        def turns(masked: bool, steps: int):
            def body(_, cursor: Cursor) -> Cursor:
                places = [after(cursor.place, AT_ONCE + step) for step in range(steps)]
                for place in places:
                    ring.wait(plan, place)
                reached = []

                def begin_next():
                    following = cursor
                    for _ in range(steps):
                        following = self._begin(following)
                    reached.append(following)

                compute(Turn(places, masked, begin_next))
                return reached[0]

            return body

        cursor = Cursor(*(self.cursor[index] for index in range(3)))
        steps, plain = row.steps(plan), row.turns_without_mask(plan)
        whole = jax.lax.div(steps, AT_ONCE)
        if plan.num_full:
            cursor = jax.lax.fori_loop(0, plain, turns(False, AT_ONCE), cursor)
        cursor = jax.lax.fori_loop(plain, whole, turns(True, AT_ONCE), cursor)
        cursor = jax.lax.fori_loop(whole * AT_ONCE, steps, turns(True, 1), cursor)
        for index, number in enumerate(cursor):
            self.cursor[index] = number

        @pl.when(self.is_last)
        def _():
            # What was copied beyond the end.
            for step in range(AT_ONCE):
                ring.wait(plan, after(cursor.place, AT_ONCE + step))

    def _begin(self, cursor: Cursor) -> Cursor:
        """Starts a step's copies; gives back the step after it. After the last tile comes the last one again."""
        plan, row = self.plan, self._row(cursor.tile)
        self.ring.begin(plan, self.inputs.entries, row, cursor.step, cursor.place, self.inputs.key_value, self.first)
        ends = cursor.step + 1 >= row.steps(plan)
        tile = jnp.where(ends, jnp.minimum(cursor.tile + 1, plan.tiles - 1), cursor.tile)
        return Cursor(tile, jnp.where(ends, 0, cursor.step + 1), after(cursor.place))
