"""From a call of the backward pass to a call of the kernel of the keys' gradients, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.arrange import FEATURES, LENGTH, Grid, edge_ids, make_grid, pad, positive_scale, round_up
from pallas_kernels.mosaic_gpu.key_tables import KeyInputs, KeyTables
from pallas_kernels.mosaic_gpu.plan import LOG2E, ROWS, KeyPlan
from pallas_kernels.mosaic_gpu.segments import find
from pallas_kernels.mosaic_gpu.tiles import HopperTiles
from pallas_kernels.problem import Operands, Problem


def arrange_key_gradients(
    problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array, tables: KeyTables, tiles: HopperTiles
):
    """The plan and the inputs of the kernel, and the function that makes dk and dv of its results.

    Args:
      dout: [b, t, h, e].
      lse, delta: float32 [b, h, t]; an infinite lse hides a query.
    """
    schedule = problem.schedule
    assert schedule is not None  # of a selection there are no tables
    size = schedule.block_size
    grid = make_grid(problem, operands, size)
    query, scale = positive_scale(operands.query, problem.scale)
    in_place = isinstance(grid.shift, int) and grid.shift == 0
    length = round_up(grid.length, LENGTH) if in_place else grid.tiles * size
    query, dout = (pad(grid.place(array, length), 3, FEATURES) for array in (query, dout))
    key, value = (pad(pad(array, 3, FEATURES), 1, LENGTH) for array in (operands.key, operands.value))

    def of_queries(array: Array, nothing: float) -> Array:
        return grid.place(array.swapaxes(1, 2), grid.tiles * size, nothing).swapaxes(1, 2)

    first_row = None if isinstance(grid.first, int) else grid.first
    query_segments, kv_segments, slices = _segments(operands, grid, tables, jnp.asarray(tables.slices))
    if first_row is not None:
        edges = first_row[:, None, None]
        slices = _between(jnp.asarray(tables.blocks), slices, edges, edges + grid.tiles)
    inputs = KeyInputs(
        query, dout, key, value, of_queries(lse * LOG2E, np.inf), of_queries(delta, 0), jnp.asarray(tables.blocks),
        jnp.asarray(tables.masks), slices, jnp.asarray(tables.words), jnp.asarray(tables.members), first_row,
        query_segments, kv_segments,
    )  # fmt: skip
    plan = KeyPlan(
        batch=query.shape[0], num_heads=query.shape[2], num_kv_heads=key.shape[2], head_dim=query.shape[3],
        value_dim=value.shape[3], dtype=np.dtype(query.dtype), step=tiles.keys, stages=tiles.stages, block_size=size,
        num_parts=slices.shape[3], num_full=tables.num_full if query_segments is None else 0, scale=scale,
        soft_cap=problem.logits_soft_cap, packs=slices.shape[2],
    )  # fmt: skip

    def finish(dkey: Array, dvalue: Array) -> tuple[Array, Array]:
        kv_length, head_dim, value_dim = operands.key.shape[1], operands.key.shape[3], operands.value.shape[3]
        return dkey[:, :kv_length, :, :head_dim], dvalue[:, :kv_length, :, :value_dim]

    return plan, inputs, finish


def _segments(operands: Operands, grid: Grid, tables: KeyTables, slices: Array):
    """The ids of the queries and of the packs' keys, and the slices without the queries of other segments."""
    if operands.query_segment_ids is None or operands.kv_segment_ids is None:
        return None, None, slices
    size = grid.queries
    ids = edge_ids(grid, operands.query_segment_ids)  # [b, rows, size]
    kv_ids = operands.kv_segment_ids
    blocks = round_up(kv_ids.shape[1], size)
    kv_ids = jnp.pad(kv_ids, ((0, 0), (0, blocks - kv_ids.shape[1])), mode="edge").reshape(len(kv_ids), -1, size)
    # A place without a block takes the first one's ids.
    members = jnp.asarray(tables.members)
    members = jnp.where(members < 0, members[..., :1], members)
    kv_ids = kv_ids[:, jnp.maximum(members, 0)].reshape(len(kv_ids), *members.shape[:2], ROWS)
    low, high = _overlapping(ids.min(-1), ids.max(-1), kv_ids.min(-1), kv_ids.max(-1))
    first = 0 if isinstance(grid.first, int) else grid.first[:, None, None]
    slices = _between(jnp.asarray(tables.blocks), slices, low + first, high + first)
    return ids.reshape(len(ids), -1), kv_ids, slices


def _overlapping(least: Array, most: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """First, and one past the last, of the rows whose ids may lie between `low` and `high`: int32 [b, ...] each.

    Exact for ids that ascend; for others, what lies between may not.

    Args:
      least, most: int32 [b, rows], of every row's ids.
      low, high: int32 [b, ...].
    """
    before = jax.vmap(jnp.searchsorted)(jax.lax.cummax(most, 1), low)
    after = jax.vmap(lambda edges, ids: jnp.searchsorted(edges, ids, side="right"))(
        jax.lax.cummin(least, 1, reverse=True), high
    )
    return before.astype(jnp.int32), jnp.maximum(before, after).astype(jnp.int32)


def _between(blocks: Array, slices: Array, low: Array, high: Array) -> Array:
    """The slices [b|1, k, packs, parts, 2] cut to the rows from `low` [b, k|1, packs|1] on, before `high`."""
    return jnp.stack([find(blocks, slices, edge[..., None]) for edge in (low, high)], -1)
