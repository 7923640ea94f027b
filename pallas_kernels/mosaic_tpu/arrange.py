"""From a call of the op to a call of a TPU kernel: padded arrays, heads before tokens, and the way back."""

import dataclasses
import typing

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.config import LANES, KernelSpec, TpuConfig
from pallas_kernels.mosaic_tpu.launch import KernelInputs
from pallas_kernels.mosaic_tpu.pipeline import pass_scalars
from pallas_kernels.mosaic_tpu.tables import Tables
from pallas_kernels.padding import QueryGrid, edge_ids, make_query_grid, pad
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.segments import narrow
from pallas_kernels.softmax import LOG2E


def arrange(
    problem: Problem, operands: Operands, tables: Tables, config: TpuConfig
) -> tuple[KernelSpec, KernelInputs, QueryGrid]:
    """The specification and the inputs of the forward kernel, and its tiles of queries."""
    grid = make_query_grid(problem, operands, config.block_q)
    reads = problem.schedule or operands.selection
    assert reads is not None  # one of the two says what is read
    query, key, value, size = operands.query, operands.key, operands.value, reads.block_size
    attributes = _attributes(operands, grid, config, size)
    ranges = jnp.asarray(tables.ranges)
    if not isinstance(grid.first, int):
        tile = jnp.minimum(grid.first[:, None] + jnp.arange(grid.num_tiles, dtype=jnp.int32), ranges.shape[2] - 1)
        ranges = ranges[0][:, tile].swapaxes(0, 1)
    if "row_segment_ids" in attributes and problem.schedule is not None:
        ids = attributes["row_segment_ids"][:, :, 0, : grid.block_q]
        kv_ids = attributes["column_segment_ids"].reshape(len(ids), -1)
        ranges = narrow(tables.blocks, ranges, tables.num_full_ranges, ids, kv_ids, size)
    spec = KernelSpec(
        batch=query.shape[0], num_head_tiles=ranges.shape[1], num_tiles=grid.num_tiles, head_passes=1,
        tile_heads=config.heads_per_tile,
        tile_tokens=config.block_q, group_size=query.shape[2] // key.shape[2], head_dim=lanes(query.shape[3]),
        value_dim=lanes(value.shape[3]), dtype=np.dtype(query.dtype), step_size=config.block_kv, step_heads=1,
        chunk_size=config.chunk_size(size), chunk_bits=tables.piece_bits, empty_mask_id=tables.nothing,
        num_ranges=ranges.shape[3], num_full_ranges=tables.num_full_ranges, entries_per_list=tables.entries.shape[1],
        padded_to_steps=tables.in_steps and "row_segment_ids" not in attributes, scale=problem.scale,
        soft_cap=problem.logits_soft_cap, rows_are_queries=True,
    )  # fmt: skip
    inputs = KernelInputs(
        jnp.asarray(tables.lists).reshape(-1), jnp.asarray(tables.entries)[:, None],
        pass_scalars(ranges), None if tables.mask_bits is None else jnp.asarray(tables.mask_bits),
        in_pieces(beside(pad(key, 1, size), pad(value, 1, size)), spec.chunk_size), of_tiles(grid, query),
        sinks=None if operands.sinks is None else operands.sinks.astype(jnp.float32), **attributes,
    )  # fmt: skip
    return spec, inputs, grid


def prepare_query_grad_inputs(
    problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array, tables: Tables, config: TpuConfig
) -> tuple[KernelSpec, KernelInputs, QueryGrid]:
    """The same for the gradient of the queries.

    Args:
      dout: [b, t, h, e].
      lse, delta: float32 [b, h, t]; -inf where nothing is read.
    """
    spec, inputs, grid = arrange(problem, dataclasses.replace(operands, sinks=None), tables, config)
    lse, delta = (
        rows_of(grid, lse * LOG2E, config.heads_per_tile, np.inf),
        rows_of(grid, delta, config.heads_per_tile, 0),
    )
    return spec, inputs._replace(dout_or_v=of_tiles(grid, dout), lse=lse, delta=delta), grid


def lanes(features: int) -> int:
    return -(-features // LANES) * LANES


def of_tiles(grid: QueryGrid, array: Array) -> Array:
    """[b, t, h, f] -> [b, h, whole tiles of queries, f in whole lanes]."""
    return pad(grid.place(array, grid.num_tiles * grid.block_q), 3, LANES).swapaxes(1, 2)


def beside(first: Array, second: Array) -> Array:
    """[b, s, k, d] and [b, s, k, e] -> [b, k, s, d and e in whole lanes]: one copy brings both."""
    return jnp.concatenate([pad(first, 3, LANES), pad(second, 3, LANES)], 3).swapaxes(1, 2)


def in_pieces(array: Array, slot: int) -> Array:
    """[b, k, s, f] -> [b · k, pieces, slot, f]."""
    return array.reshape(-1, array.shape[2] // slot, slot, array.shape[3])


def rows_of(grid: QueryGrid, array: Array, heads: int, nothing: float) -> Array:
    """[b, h, t] -> [b, h / heads of a tile, tiles, 1, rows], `nothing` where there is no query."""
    array = grid.place(array.swapaxes(1, 2), grid.num_tiles * grid.block_q, nothing).swapaxes(1, 2)
    array = array.reshape(array.shape[0], -1, heads, grid.num_tiles, grid.block_q).swapaxes(2, 3)
    return array.reshape(*array.shape[:3], 1, -1)


def rows_back(grid: QueryGrid, array: Array, heads: int) -> Array:
    """The inverse."""
    batch, head_tiles = array.shape[:2]
    array = array.reshape(batch, head_tiles, grid.num_tiles, heads, grid.block_q).swapaxes(2, 3)
    return grid.unpad(array.reshape(batch, head_tiles * heads, -1), 2)


def by_lanes(array: Array, nothing: float = 0) -> Array:
    """[..., tokens] -> [..., tokens / LANES, LANES]."""
    after = -array.shape[-1] % LANES
    array = jnp.pad(array, [*[(0, 0)] * (array.ndim - 1), (0, after)], constant_values=nothing)
    return array.reshape(*array.shape[:-1], -1, LANES)


def _attributes(operands: Operands, grid: QueryGrid, config: TpuConfig, size: int) -> dict:
    """Segments and positions of rows and columns, those that are needed."""
    found: dict[str, typing.Any] = {}
    if operands.query_segment_ids is not None:
        kv_ids = operands.kv_segment_ids
        assert kv_ids is not None  # both or neither
        # Keys that are not there take the last one's id: a tile in one segment sees one segment in that block too.
        whole = max(size, LANES)
        kv_ids = jnp.pad(kv_ids, ((0, 0), (0, -kv_ids.shape[1] % whole)), mode="edge")
        found["column_segment_ids"] = by_lanes(kv_ids)
        ids = edge_ids(grid, operands.query_segment_ids)
        found["row_segment_ids"] = jnp.tile(ids, (1, 1, config.heads_per_tile))[:, :, None]
    selection = operands.selection
    if selection is not None:
        batch, length = operands.query.shape[:2]
        position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        if operands.query_offset is not None:
            position = position + operands.query_offset[:, None]
        last = operands.key.shape[1] - 1
        position = jnp.minimum(position, last) if selection.causal else jnp.full_like(position, last)
        found["row_positions"] = grid.rows(position, config.rows)[:, :, None]
    return found
