"""Inputs of the TPU kernels, their BlockSpecs, and the `pallas_call`."""

import math
import typing
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.modes import interpreted
from pallas_kernels.mosaic_tpu.config import LANES, SUBLANES, KernelSpec

VMEM_BYTES, VMEM_BYTES_PER_LOGIT = 6 << 20, 32
"""VMEM beyond the blocks of inputs and outputs: fixed, and per logit of a step. Most of the latter is for spills."""


class KernelInputs(typing.NamedTuple):
    """Inputs of a kernel: arrays outside of it, refs inside; None if absent.

    The rows of the logits are those of the tile, `q_or_k`; the columns are those of a step of `streamed`.

    Attributes:
      list_ids: int32 [head tiles] or [b · head tiles], the list of every head tile.
      entries: int32 [lists, 1, entries], each a chunk number and, `chunk_bits` higher, a mask id.
      pass_scalars: int32 [b|1, head tiles, 1, scalars], see `pipeline.pass_scalars`.
      mask_bits: int32 [masks, words, columns]; bit i of word w says if row 32w + i sees the column.
      streamed: [b · heads, chunks, chunk_size, features], keys and values side by side in the forward and dq kernels,
        queries and douts in the dk/dv kernel; each padded to lanes.
      q_or_k: [b, heads, tokens, d], queries in the forward and dq kernels, keys in the dk/dv kernel.
      dout_or_v: [b, heads, tokens, e], douts in the dq kernel, values in the dk/dv kernel.
      sinks: float32 [h].
      row_segment_ids: int32 [b, tiles, 1, rows], or per head [b, head tiles, tiles, 1, rows] in the dk/dv kernel.
      row_positions: int32 [b|1, tiles, 1, rows].
      column_segment_ids: int32 [b, tokens / LANES, LANES].
      first_chunk: int32 [b], the number of the first chunk in `streamed`; None for 0.
      first_position: int32 [b], the position of the first token in `streamed`; None for 0.
      lse: float32, in base 2, inf for padding: [b, head tiles, tiles, 1, rows] in the dq kernel,
        [b, h, tokens / LANES, LANES] in the dk/dv kernel.
      delta: float32, in the layout of `lse`.
    """

    list_ids: typing.Any
    entries: typing.Any
    pass_scalars: typing.Any
    mask_bits: typing.Any
    streamed: typing.Any
    q_or_k: typing.Any
    dout_or_v: typing.Any = None
    sinks: typing.Any = None
    row_segment_ids: typing.Any = None
    row_positions: typing.Any = None
    column_segment_ids: typing.Any = None
    first_chunk: typing.Any = None
    first_position: typing.Any = None
    lse: typing.Any = None
    delta: typing.Any = None


def launch(
    name: str,
    spec: KernelSpec,
    inputs: KernelInputs,
    compute_tile: Callable[[KernelSpec, KernelInputs, tuple, typing.Any], None],
    outputs: tuple[tuple[jax.ShapeDtypeStruct, pl.BlockSpec], ...],
    scratch: typing.Any,
) -> tuple[Array, ...]:
    """Calls `compute_tile(spec, inputs, outputs, scratch)`, with refs, at every grid point (sequence, head tile, tile).

    Args:
      name: of the kernel in profiles, after `s2jax_`.
      outputs: the shape of each output, and the block of it that a tile writes.
      scratch: a pytree of scratch shapes.
    """
    inputs = inputs._replace(streamed=_pin_to_hbm(inputs.streamed))
    # The list ids are prefetched to SMEM, because the block of `entries` depends on them.
    arrays, inputs_tree = jax.tree.flatten(inputs._replace(list_ids=None))
    specs = jax.tree.leaves(_input_specs(spec, inputs), is_leaf=lambda each: isinstance(each, pl.BlockSpec))
    scratch_shapes, scratch_tree = jax.tree.flatten(scratch)

    def kernel(list_ids, *refs):
        ends = len(arrays), len(arrays) + len(outputs)
        input_refs = jax.tree.unflatten(inputs_tree, refs[: ends[0]])._replace(list_ids=list_ids)
        compute_tile(spec, input_refs, refs[ends[0] : ends[1]], jax.tree.unflatten(scratch_tree, refs[ends[1] :]))

    varying = jax.typeof(inputs.streamed).manual_axis_type
    vmem_bytes = VMEM_BYTES + VMEM_BYTES_PER_LOGIT * spec.tile_rows * spec.step_size
    found = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(spec.batch, spec.num_head_tiles, spec.num_tiles),
            in_specs=specs,
            out_specs=[block for _, block in outputs],
            scratch_shapes=scratch_shapes,
        ),
        out_shape=[shape.update(manual_axis_type=varying) for shape, _ in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=vmem_bytes + sum(map(_block_bytes, arrays, specs)),
        ),
        name=f"s2jax_{name}",
    )(inputs.list_ids, *arrays)
    return tuple(found)


def tokens_spec(spec: KernelSpec, array: typing.Any) -> pl.BlockSpec:
    """BlockSpec of [b, heads, tokens, features]: a tile's heads and tokens."""
    return pl.BlockSpec((None, spec.tile_heads, spec.tile_tokens, array.shape[3]), lambda b, h, t, *_: (b, h, t, 0))


def rows_spec(array: typing.Any) -> pl.BlockSpec:
    """BlockSpec of [b, head tiles, tiles, 1, rows]: a tile's rows."""
    return pl.BlockSpec((None, None, None, *array.shape[3:]), lambda b, h, t, *_: (b, h, t, 0, 0))


def _input_specs(spec: KernelSpec, inputs: KernelInputs) -> KernelInputs:
    """The BlockSpecs of all inputs but the list ids, as `KernelInputs`."""
    separate_lists = inputs.list_ids.shape[0] > spec.num_head_tiles
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)

    def head_list(array):  # [lists, 1, entries]
        def index(b, h, _, list_ids):
            return list_ids[b * spec.num_head_tiles + h if separate_lists else h], 0, 0

        return pl.BlockSpec((None, *array.shape[1:]), index, memory_space=pltpu.SMEM)

    def head_scalars(array):  # [b|1, head tiles, 1, scalars]
        batched = array.shape[0] > 1
        return pl.BlockSpec(
            (None, None, *array.shape[2:]), lambda b, h, *_: (b if batched else 0, h, 0, 0), memory_space=pltpu.SMEM
        )

    def whole(array):
        return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim, pipeline_mode=pl.Buffered(1))

    def sequence(array):  # [b, ...]
        zeros = (0,) * (array.ndim - 1)
        return pl.BlockSpec((None, *array.shape[1:]), lambda b, *_: (b, *zeros), pipeline_mode=pl.Buffered(1))

    def head_tile(array):  # [b, head tiles · heads, ...]
        heads, zeros = array.shape[1] // spec.num_head_tiles, (0,) * (array.ndim - 2)
        return pl.BlockSpec(
            (None, heads, *array.shape[2:]), lambda b, h, *_: (b, h, *zeros), pipeline_mode=pl.Buffered(1)
        )

    def tokens(array):
        return tokens_spec(spec, array)

    def shared_rows(array):  # [b|1, tiles, 1, rows]
        batched = array.shape[0] > 1
        return pl.BlockSpec((None, None, *array.shape[2:]), lambda b, h, t, *_: (b if batched else 0, t, 0, 0))

    lse_spec = rows_spec if spec.rows_are_queries else head_tile
    make = {
        "entries": head_list, "pass_scalars": head_scalars, "mask_bits": whole,
        "streamed": lambda _: pl.BlockSpec(memory_space=pl.ANY), "q_or_k": tokens, "dout_or_v": tokens,
        "sinks": lambda _: smem, "row_segment_ids": shared_rows if spec.rows_are_queries else rows_spec,
        "row_positions": shared_rows, "column_segment_ids": sequence, "first_chunk": lambda _: smem,
        "first_position": lambda _: smem, "lse": lse_spec, "delta": lse_spec,
    }  # fmt: skip
    arrays = {name: getattr(inputs, name) for name in make}
    specs = {name: None if array is None else make[name](array) for name, array in arrays.items()}
    return KernelInputs(list_ids=None, **specs)


def _pin_to_hbm(array: Array) -> Array:
    """Pins an array in HBM. In VMEM its copies would lower to load/store loops."""
    return array if interpreted() else pltpu.with_memory_space_constraint(array, pltpu.HBM)


def _block_bytes(array: Array, spec: pl.BlockSpec) -> int:
    """VMEM bytes of an input's block, in padded tiles, twice if it is double-buffered."""
    if spec.block_shape is None or spec.memory_space is not None:
        return 0
    sizes: list[int] = [size if isinstance(size, int) else 1 for size in spec.block_shape]
    *blocks, rows, lanes = sizes
    elements = -(-rows // SUBLANES) * SUBLANES * -(-lanes // LANES) * LANES
    return elements * math.prod(blocks) * array.dtype.itemsize * (1 if spec.pipeline_mode is not None else 2)
