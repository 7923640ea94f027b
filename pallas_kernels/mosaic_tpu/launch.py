"""Calling a TPU kernel: where its arrays are, and the memory that it has."""

import dataclasses
import math
import typing

import jax
import jax.experimental.pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.plan import Plan
from pallas_kernels.platforms import interpreted

ROOM, ROOM_OF_PAIR = 6 << 20, 32
"""Bytes of vector memory besides blocks of arrays, and for every pair of a row and a column, most of it for spills."""


@dataclasses.dataclass(frozen=True)
class Specs:
    """Of the arrays of a call, which block of each a point of the grid (batch, head of tiles, tile) is given."""

    plan: Plan
    lists: Array

    def list(self, array: Array) -> pl.BlockSpec:
        """[lists, 1, entries]: the list of the head."""
        whole = self.lists.shape[0] > self.plan.head_tiles

        def at(b, h, _, lists):
            return lists[b * self.plan.head_tiles + h if whole else h], 0, 0

        return pl.BlockSpec((None, *array.shape[1:]), at, memory_space=pltpu.SMEM)

    def scalars_of_head(self, array: Array) -> pl.BlockSpec:
        """[b|1, heads of tiles, 1, numbers]."""
        many = array.shape[0] > 1
        return pl.BlockSpec(
            (None, None, *array.shape[2:]), lambda b, h, *_: (b if many else 0, h, 0, 0), memory_space=pltpu.SMEM
        )

    def scalars(self, _: Array) -> pl.BlockSpec:
        return pl.BlockSpec(memory_space=pltpu.SMEM)

    def whole(self, array: Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim, pipeline_mode=pl.Buffered(1))

    def source(self, _: Array) -> pl.BlockSpec:
        return pl.BlockSpec(memory_space=pl.ANY)

    def of_batch(self, array: Array) -> pl.BlockSpec:
        """[b, ...]."""
        zeros = (0,) * (array.ndim - 1)
        return pl.BlockSpec((None, *array.shape[1:]), lambda b, *_: (b, *zeros), pipeline_mode=pl.Buffered(1))

    def of_head(self, array: Array) -> pl.BlockSpec:
        """[b, heads of tiles · heads, ...]: those of one head of tiles."""
        heads, zeros = array.shape[1] // self.plan.head_tiles, (0,) * (array.ndim - 2)
        return pl.BlockSpec(
            (None, heads, *array.shape[2:]), lambda b, h, *_: (b, h, *zeros), pipeline_mode=pl.Buffered(1)
        )

    def tokens(self, array: typing.Any) -> pl.BlockSpec:
        """[b, heads, tokens, features]: a tile's heads and tokens."""
        plan = self.plan
        return pl.BlockSpec((None, plan.row_heads, plan.row_tokens, array.shape[3]), lambda b, h, t, *_: (b, h, t, 0))

    def rows(self, array: typing.Any) -> pl.BlockSpec:
        """[b, heads of tiles, tiles, 1, rows]: a tile's rows."""
        return pl.BlockSpec((None, None, None, *array.shape[3:]), lambda b, h, t, *_: (b, h, t, 0, 0))

    def rows_of_all_heads(self, array: Array) -> pl.BlockSpec:
        """[b|1, tiles, 1, rows]: a tile's rows, the same for all heads."""
        many = array.shape[0] > 1
        return pl.BlockSpec((None, None, *array.shape[2:]), lambda b, h, t, *_: (b if many else 0, t, 0, 0))


def launch(
    name: str, plan: Plan, inputs: typing.Any, specs: typing.Any, results: tuple, scratch: typing.Any,
    run: typing.Callable,
) -> tuple[Array, ...]:  # fmt: skip
    """Runs `run(inputs, lists, results, scratch)` with references, for every tile of every head and sequence.

    Args:
      inputs: with `lists`, scalars that are there before anything else, and `source`, which stays where it is.
      specs: of all inputs but the lists.
      results: the shape of each and the block that a tile writes.
    """
    lists = inputs.lists
    inputs = dataclasses.replace(inputs, lists=None, source=in_hbm(inputs.source))
    arrays, structure = jax.tree.flatten(inputs)
    blocks = jax.tree.leaves(specs, is_leaf=lambda each: isinstance(each, pl.BlockSpec))
    memory, kinds = jax.tree.flatten(scratch)

    def kernel(lists, *refs):
        ends = len(arrays), len(arrays) + len(results)
        here, there = jax.tree.unflatten(structure, refs[: ends[0]]), jax.tree.unflatten(kinds, refs[ends[1] :])
        run(here, lists, refs[ends[0] : ends[1]], there)

    varying = jax.typeof(inputs.source).manual_axis_type
    found = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(plan.batch, plan.head_tiles, plan.num_tiles),
            in_specs=blocks,
            out_specs=[spec for _, spec in results],
            scratch_shapes=memory,
        ),
        out_shape=[shape.update(manual_axis_type=varying) for shape, _ in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=ROOM + ROOM_OF_PAIR * plan.rows * plan.step_size + sum(map(_resident, arrays, blocks)),
        ),
        name=f"s2jax_{name}",
    )(lists, *arrays)
    return tuple(found)


def in_hbm(array: Array) -> Array:
    """Not where XLA else finds room for it: in vector memory, copies of it would be loops of loads and stores."""
    return array if interpreted() else pltpu.with_memory_space_constraint(array, pltpu.HBM)


def _resident(array: Array, spec: pl.BlockSpec) -> int:
    """Bytes of vector memory that the block of an array takes."""
    if spec.block_shape is None or spec.memory_space is not None:
        return 0
    sizes: list[int] = [size if isinstance(size, int) else 1 for size in spec.block_shape]
    *blocks, rows, lanes = sizes
    tiles = -(-rows // 8) * 8 * -(-lanes // 128) * 128
    return tiles * math.prod(blocks) * array.dtype.itemsize * (1 if spec.pipeline_mode is not None else 2)
