"""From a call of the op to a call of the kernel: padded arrays, attributes of rows and keys, and the way back."""

import dataclasses
import typing

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.sm90.config import ROWS, HopperConfig, QKernelSpec
from pallas_kernels.mosaic_gpu.tables import Inputs, Tables
from pallas_kernels.padding import QueryGrid, edge_ids, make_query_grid, pad, positive_scale, round_up
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.segments import narrow
from pallas_kernels.softmax import LOG2E

NOWHERE = np.iinfo(np.int32).max
"""The position of a key that is not there: behind every query."""

FEATURES = 16
"""The tensor cores multiply so many features at a time."""

LENGTH = 8
"""Copies need lengths of a multiple of the rows that lie together in shared memory."""


def arrange(problem: Problem, operands: Operands, tables: Tables, config: HopperConfig):
    """The plan and the inputs of the forward kernel, and the function that makes out and lse of its results."""
    plan, inputs, grid = _arrange(problem, operands, tables, config)

    def finish(out: Array, lse: Array) -> tuple[Array, Array]:
        return grid.unpad(out, 1)[..., : operands.value.shape[3]], grid.unpad(lse, 2)

    return plan, inputs, finish


def prepare_query_grad_inputs(
    problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array, tables: Tables, config: HopperConfig
):
    """The plan and the inputs of the kernel, and the function that makes dq of its result.

    Args:
      dout: [b, t, h, e].
      lse, delta: float32 [b, h, t]; -inf where nothing is read.
    """
    plan, inputs, grid = _arrange(problem, dataclasses.replace(operands, sinks=None), tables, config)
    inputs = dataclasses.replace(
        inputs,
        dout=pad(grid.place(dout, inputs.query.shape[1]), 3, FEATURES),
        lse=_of_rows(grid, plan, lse * LOG2E, np.inf),
        delta=_of_rows(grid, plan, delta, 0),
    )

    def finish(dquery: Array) -> Array:
        return grid.unpad(dquery, 1)[..., : operands.query.shape[3]]

    return plan, inputs, finish


def _of_rows(grid: QueryGrid, plan: QKernelSpec, array: Array, nothing: float) -> Array:
    """[b, h, t] -> [b, h / heads of a tile, tiles, ROWS], `nothing` where there is no query."""
    array = grid.place(array.swapaxes(1, 2), grid.num_tiles * grid.block_q, nothing).swapaxes(1, 2)
    array = array.reshape(array.shape[0], -1, plan.heads_per_tile, grid.num_tiles, grid.block_q)
    return array.swapaxes(2, 3).reshape(*array.shape[:2], grid.num_tiles, ROWS)


def _arrange(
    problem: Problem, operands: Operands, tables: Tables, config: HopperConfig
) -> tuple[QKernelSpec, Inputs, QueryGrid]:
    grid = make_query_grid(problem, operands, config.block_q)
    query, scale = positive_scale(operands.query, problem.scale)
    batch, _, num_heads, _ = query.shape
    kv_length, num_kv_heads = operands.key.shape[1:3]
    in_place = isinstance(grid.shift, int) and grid.shift == 0
    query = grid.place(query, round_up(grid.length, LENGTH) if in_place else grid.num_tiles * grid.block_q)
    query, key, value = (pad(array, 3, FEATURES) for array in (query, operands.key, operands.value))
    key, value = (pad(array, 1, LENGTH) for array in (key, value))
    reads = problem.schedule or operands.selection
    assert reads is not None  # one of the two says what is read
    block_size = reads.block_size
    num_blocks = -(-kv_length // block_size)
    attributes = _attributes(problem, operands, grid, block_size, num_blocks)
    ranges, num_full_ranges = jnp.asarray(tables.ranges), tables.num_full_ranges
    if not isinstance(grid.first, int):
        tile = jnp.minimum(grid.first[:, None] + jnp.arange(grid.num_tiles, dtype=jnp.int32), ranges.shape[2] - 1)
        ranges = ranges[0][:, tile].swapaxes(0, 1)
    blocks = jnp.asarray(tables.blocks)
    if "kv_segments" in attributes and problem.schedule is not None:
        mine = attributes["query_segments"][..., : grid.block_q]
        ranges = narrow(blocks, ranges, num_full_ranges, mine, attributes["kv_segments"], block_size)
    inputs = Inputs(
        query, key, value, blocks, jnp.asarray(tables.mask_ids), ranges,
        None if tables.mask_bits is None else jnp.asarray(tables.mask_bits),
        sinks=_sinks(operands.sinks, config), **attributes,
    )  # fmt: skip
    plan = QKernelSpec(
        batch=batch, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=query.shape[3], value_dim=value.shape[3],
        dtype=np.dtype(query.dtype), step_size=config.block_kv, num_stages=config.num_stages, block_size=block_size,
        num_ranges=ranges.shape[3], num_full_ranges=num_full_ranges, scale=scale, soft_cap=problem.logits_soft_cap,
        block_q=grid.block_q, num_tiles=grid.num_tiles,
    )  # fmt: skip
    return plan, inputs, grid


def _attributes(problem: Problem, operands: Operands, grid: QueryGrid, block_size: int, num_blocks: int) -> dict:
    """Segments and positions of rows and keys, those that are needed."""
    found: dict[str, typing.Any] = {}
    whole = num_blocks * block_size
    if operands.query_segment_ids is not None:
        kv_ids = operands.kv_segment_ids
        assert kv_ids is not None  # both or neither
        # Keys that are not there take the last one's id: a tile in one segment sees one segment in that block too.
        found["kv_segments"] = jnp.pad(kv_ids, ((0, 0), (0, whole - kv_ids.shape[1])), mode="edge")
        ids = edge_ids(grid, operands.query_segment_ids)
        found["query_segments"] = jnp.tile(ids, (1, 1, ROWS // grid.block_q))
    if operands.selection is not None:
        batch, length = operands.query.shape[:2]
        position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        if operands.query_offset is not None:
            position = position + operands.query_offset[:, None]
        if not operands.selection.causal:
            position = jnp.full_like(position, NOWHERE - 1)
        keys = jnp.arange(whole + block_size, dtype=jnp.int32)
        found["query_positions"] = grid.rows(position, ROWS)
        found["kv_positions"] = jnp.where(keys < operands.key.shape[1], keys, NOWHERE)
    return found


def _sinks(sinks: Array | None, config: HopperConfig) -> Array | None:
    if sinks is None:
        return None
    return jnp.repeat(sinks.astype(jnp.float32).reshape(-1, config.heads_per_tile), config.block_q, 1)
