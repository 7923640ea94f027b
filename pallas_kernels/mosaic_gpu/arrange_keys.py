"""From a call of the backward pass to a call of the kernel of the keys' gradients, and the way back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.arrange import FEATURES, LENGTH
from pallas_kernels.mosaic_gpu.kv_tables import KVInputs, KVTables
from pallas_kernels.mosaic_gpu.sm90.config import ROWS, HopperConfig, KVKernelSpec
from pallas_kernels.padding import QueryGrid, edge_ids, make_query_grid, pad, positive_scale, round_up
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.segments import find, narrow_kv_tiles
from pallas_kernels.softmax import LOG2E


def prepare_kv_grad_inputs(
    problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array, tables: KVTables, config: HopperConfig
):
    """The plan and the inputs of the kernel, and the function that makes dk and dv of its results.

    Args:
      dout: [b, t, h, e].
      lse, delta: float32 [b, h, t]; -inf where nothing is read.
    """
    reads = problem.schedule or operands.selection
    assert reads is not None  # one of the two says what is read
    size = reads.block_size if operands.selection is None else operands.selection.query_block
    grid = make_query_grid(problem, operands, size)
    query, scale = positive_scale(operands.query, problem.scale)
    in_place = isinstance(grid.shift, int) and grid.shift == 0
    length = round_up(grid.length, LENGTH) if in_place else grid.num_tiles * size
    query, dout = (pad(grid.place(array, length), 3, FEATURES) for array in (query, dout))
    key, value = (pad(pad(array, 3, FEATURES), 1, LENGTH) for array in (operands.key, operands.value))

    def of_queries(array: Array, nothing: float) -> Array:
        return grid.place(array.swapaxes(1, 2), grid.num_tiles * size, nothing).swapaxes(1, 2)

    first_row = None if isinstance(grid.first, int) else grid.first
    tables, conditions = _segments(operands, grid, tables, reads.block_size)
    if first_row is not None:
        first = first_row[:, None, None, None, None]
        blocks, ranges = jnp.asarray(tables.blocks), jnp.asarray(tables.ranges)
        ranges = jnp.stack([find(blocks, ranges, edge) for edge in (first, first + grid.num_tiles)], -1)
        tables = dataclasses.replace(tables, ranges=ranges)
    inputs = KVInputs(
        query, dout, key, value, of_queries(lse * LOG2E, np.inf), of_queries(delta, 0),
        jax.tree.map(jnp.asarray, tables), first_row,
        **conditions, **_positions(operands, grid, tables, reads.block_size),
    )  # fmt: skip
    _, num_kv_heads, kv_tiles, head_passes, num_ranges, _ = tables.ranges.shape
    plan = KVKernelSpec(
        batch=query.shape[0], num_heads=query.shape[2], num_kv_heads=num_kv_heads, head_dim=query.shape[3],
        value_dim=value.shape[3], dtype=np.dtype(query.dtype), step_size=config.block_kv,
        num_stages=config.num_stages, block_size=size,
        num_ranges=num_ranges, num_full_ranges=tables.num_full_ranges, scale=scale, soft_cap=problem.logits_soft_cap,
        num_kv_tiles=kv_tiles, kv_block_size=reads.block_size, head_passes=head_passes,
    )  # fmt: skip

    def finish(dkey: Array, dvalue: Array) -> tuple[Array, Array]:
        kv_length, head_dim, value_dim = operands.key.shape[1], operands.key.shape[3], operands.value.shape[3]
        return dkey[:, :kv_length, :, :head_dim], dvalue[:, :kv_length, :, :value_dim]

    return plan, inputs, finish


def _segments(operands: Operands, grid: QueryGrid, tables: KVTables, key_block: int) -> tuple[KVTables, dict]:
    """The tables without the queries that share no segment with a pack, and the ids of queries and of packs' keys."""
    if operands.query_segment_ids is None or operands.kv_segment_ids is None:
        return tables, {}
    ids = edge_ids(grid, operands.query_segment_ids)
    kv_ids = operands.kv_segment_ids
    kv_ids = jnp.pad(kv_ids, ((0, 0), (0, -kv_ids.shape[1] % key_block)), mode="edge")
    kv_ids = kv_ids.reshape(len(kv_ids), -1, key_block)
    # A place without a block takes the first one's ids.
    members = jnp.where(tables.members < 0, tables.members[..., :1], tables.members)
    kv_ids = kv_ids[:, jnp.maximum(members, 0)].reshape(len(kv_ids), *members.shape[:2], ROWS)
    first_row = 0 if isinstance(grid.first, int) else grid.first[:, None, None]
    blocks, ranges = jnp.asarray(tables.blocks), jnp.asarray(tables.ranges)
    ranges = narrow_kv_tiles(blocks, ranges, tables.num_full_ranges, ids, kv_ids, first_row)
    conditions = {"query_segments": ids.reshape(len(ids), -1), "kv_segments": kv_ids}
    return dataclasses.replace(tables, ranges=ranges), conditions


def _positions(operands: Operands, grid: QueryGrid, tables: KVTables, key_block: int) -> dict:
    """Of queries and of packs' keys, where a selection is causal."""
    if operands.selection is None or not operands.selection.causal:
        return {}
    position = jnp.arange(grid.num_tiles * grid.block_q, dtype=jnp.int32)
    offset = 0 if operands.query_offset is None else operands.query_offset[:, None]
    position = jnp.broadcast_to(position + offset, (len(operands.query), len(position)))
    # Packs of a selection are the same for all heads.
    keys = tables.members[0, :, :, None] * key_block + jnp.arange(key_block, dtype=jnp.int32)
    return {"query_positions": position, "kv_positions": keys.reshape(-1, ROWS)}
