"""Inputs of the TPU kernels from a call of the op, and the op's results from their outputs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.kernel_tables import kv_ranges, kv_tile_positions, q_ranges, query_positions, selection_of
from pallas_kernels.mosaic_tpu.config import LANES, KernelSpec, KVGradConfig, TpuConfig
from pallas_kernels.mosaic_tpu.entries import EntryLists, KVTables
from pallas_kernels.mosaic_tpu.launch import KernelInputs
from pallas_kernels.mosaic_tpu.pipeline import pass_scalars
from pallas_kernels.padding import QueryGrid, make_query_grid, pad, round_up
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.selection import BlockSelection
from pallas_kernels.softmax import LOG2E


def prepare_inputs(
    problem: Problem, operands: Operands, lists: EntryLists, config: TpuConfig
) -> tuple[KernelSpec, KernelInputs, QueryGrid]:
    """The specification and the inputs of the forward kernel, and its query tiles."""
    grid = make_query_grid(operands, config.block_q)
    query, key, value, size = operands.query, operands.key, operands.value, operands.schedule.block_size
    found = q_ranges(operands, grid, lists.blocks, lists.ranges, lists.num_full_ranges, max(size, LANES))
    has_segments = found.query_ids is not None
    spec = KernelSpec(
        batch=query.shape[0], num_head_tiles=found.ranges.shape[1], num_tiles=grid.num_tiles, head_passes=1,
        tile_heads=config.heads_per_tile, tile_tokens=config.block_q, group_size=query.shape[2] // key.shape[2],
        head_dim=round_up(query.shape[3], LANES), value_dim=round_up(value.shape[3], LANES),
        dtype=np.dtype(query.dtype), step_size=config.block_kv, step_heads=1, chunk_size=config.chunk_size(size),
        chunk_bits=lists.chunk_bits, empty_mask_id=lists.empty_mask_id, num_ranges=found.ranges.shape[3],
        num_full_ranges=lists.num_full_ranges, entries_per_list=lists.entries.shape[1],
        padded_to_steps=lists.padded_to_steps and not has_segments, scale=problem.scale,
        soft_cap=problem.logits_soft_cap, rows_are_queries=True,
    )  # fmt: skip
    inputs = KernelInputs(
        jnp.asarray(lists.list_ids).reshape(-1), jnp.asarray(lists.entries)[:, None], pass_scalars(found.ranges),
        None if lists.mask_bits is None else jnp.asarray(lists.mask_bits),
        _in_chunks(_side_by_side(pad(key, 1, size), pad(value, 1, size)), spec.chunk_size), _in_tiles(grid, query),
        sinks=None if operands.sinks is None else operands.sinks.astype(jnp.float32),
        row_positions=_row_positions(operands, grid, config),
    )  # fmt: skip
    if found.query_ids is not None and found.kv_ids is not None:
        row_ids = jnp.tile(found.query_ids, (1, 1, config.heads_per_tile))[:, :, None]
        inputs = inputs._replace(row_segment_ids=row_ids, column_segment_ids=_by_lanes(found.kv_ids))
    return spec, inputs, grid


def prepare_query_grad_inputs(
    problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array, lists: EntryLists, config: TpuConfig
) -> tuple[KernelSpec, KernelInputs, QueryGrid]:
    """The specification and the inputs of the dq kernel, and its query tiles.

    Args:
      dout: [b, t, h, e].
      lse, delta: float32 [b, h, t]; -inf where nothing is read.
    """
    spec, inputs, grid = prepare_inputs(problem, dataclasses.replace(operands, sinks=None), lists, config)
    lse = _to_rows(grid, lse * LOG2E, config.heads_per_tile, np.inf)
    delta = _to_rows(grid, delta, config.heads_per_tile, 0)
    return spec, inputs._replace(dout_or_v=_in_tiles(grid, dout), lse=lse, delta=delta), grid


def prepare_kv_grad_inputs(
    problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array, tables: KVTables, config: KVGradConfig
) -> tuple[KernelSpec, KernelInputs]:
    """The specification and the inputs of the dk/dv kernel; the arguments are those of `prepare_query_grad_inputs`."""
    query, key, value = operands.query, operands.key, operands.value
    size, query_block = operands.schedule.block_size, operands.schedule.query_block
    grid, lists, members = make_query_grid(operands, query_block), tables.queries, jnp.asarray(tables.members)
    found = kv_ranges(operands, grid, lists.blocks, lists.ranges, lists.num_full_ranges, members)
    num_kv_heads, kv_tiles, blocks = members.shape
    group_size = query.shape[2] // num_kv_heads
    head_passes = group_size // config.heads_per_step
    # Heads that share a list but not a step read it in one pass each.
    ranges = jnp.broadcast_to(found.ranges, (*found.ranges.shape[:3], head_passes, *found.ranges.shape[4:]))
    spec = KernelSpec(
        batch=query.shape[0], num_head_tiles=num_kv_heads, num_tiles=kv_tiles, head_passes=head_passes, tile_heads=1,
        tile_tokens=blocks * size, group_size=group_size, head_dim=round_up(query.shape[3], LANES),
        value_dim=round_up(value.shape[3], LANES), dtype=np.dtype(query.dtype), step_size=config.step_size,
        step_heads=config.heads_per_step, chunk_size=config.chunk_size(query_block), chunk_bits=lists.chunk_bits,
        empty_mask_id=0 if lists.mask_bits is None else lists.empty_mask_id, num_ranges=ranges.shape[4],
        num_full_ranges=lists.num_full_ranges, entries_per_list=lists.entries.shape[1],
        padded_to_steps=lists.padded_to_steps and found.first_row is None and found.query_ids is None,
        scale=problem.scale, soft_cap=problem.logits_soft_cap, rows_are_queries=False,
        member_block_size=size if lists.mask_bits is None else None,
    )  # fmt: skip
    streamed = _side_by_side(grid.pad_to_tiles(query), grid.pad_to_tiles(dout))
    tiled = _gather_kv_tiles(_side_by_side(key, value), members, size)
    length = round_up(grid.num_tiles * query_block, LANES)
    inputs = KernelInputs(
        jnp.asarray(lists.list_ids).reshape(-1), jnp.asarray(lists.entries)[:, None],
        pass_scalars(ranges.reshape(*ranges.shape[:2], -1, *ranges.shape[4:])),
        None if lists.mask_bits is None else jnp.asarray(lists.mask_bits),
        _in_chunks(streamed, spec.chunk_size), tiled[..., : spec.head_dim], tiled[..., spec.head_dim :],
        first_chunk=None if found.first_row is None else found.first_row * lists.chunks_per_block,
        lse=_by_lanes(grid.pad_rows(lse * LOG2E, length, np.inf)), delta=_by_lanes(grid.pad_rows(delta, length)),
    )  # fmt: skip
    if found.query_ids is not None and found.kv_ids is not None:
        row_ids = found.kv_ids[:, :, :, None]
        inputs = inputs._replace(column_segment_ids=_by_lanes(found.query_ids), row_segment_ids=row_ids)
    if isinstance(operands.schedule, BlockSelection) and operands.schedule.causal:
        positions, offset = kv_tile_positions(operands, members), operands.query_offset
        first = jnp.zeros(len(query), jnp.int32) if offset is None else offset
        inputs = inputs._replace(row_positions=positions[None, :, None], first_position=first)
    return spec, inputs


def from_rows(grid: QueryGrid, array: Array, heads_per_tile: int) -> Array:
    """[b, head tiles, tiles, 1, rows] -> [b, h, t]."""
    batch, head_tiles = array.shape[:2]
    array = array.reshape(batch, head_tiles, grid.num_tiles, heads_per_tile, grid.block_q).swapaxes(2, 3)
    return grid.unpad(array.reshape(batch, head_tiles * heads_per_tile, -1), 2)


def from_kv_tiles(array: Array, members: Array, size: int, length: int) -> Array:
    """[b, k, rows of KV tiles, f] -> [b, length, k, f]: every block is in one KV tile."""
    flat_members = members.reshape(len(members), -1)
    num_blocks = -(-length // size)
    # Absent blocks go to one beyond the last.
    target = jnp.where(flat_members < 0, num_blocks, flat_members)
    place = jnp.zeros((len(members), num_blocks + 1), jnp.int32)
    place = place.at[jnp.arange(len(members))[:, None], target].set(jnp.arange(target.shape[1], dtype=jnp.int32))
    blocks = array.reshape(*array.shape[:2], -1, size, array.shape[3])
    found = jnp.take_along_axis(blocks, place[None, :, :num_blocks, None, None], 2)
    return found.reshape(*array.shape[:2], -1, array.shape[3])[:, :, :length].swapaxes(1, 2)


def _gather_kv_tiles(array: Array, members: Array, size: int) -> Array:
    """[b, k, s, f] -> [b, k, rows of KV tiles, f]."""
    array = pad(array, 2, size)
    blocks = array.reshape(*array.shape[:2], -1, size, array.shape[3])
    order = jnp.maximum(members, 0).reshape(1, len(members), -1, 1, 1)
    return jnp.take_along_axis(blocks, order, 2).reshape(*array.shape[:2], -1, array.shape[3])


def _in_tiles(grid: QueryGrid, array: Array) -> Array:
    """[b, t, h, f] -> [b, h, t in whole tiles, f in whole lanes]."""
    return pad(grid.pad_to_tiles(array), 3, LANES).swapaxes(1, 2)


def _side_by_side(first: Array, second: Array) -> Array:
    """[b, s, k, d] and [b, s, k, e] -> [b, k, s, d and e in whole lanes], so that one DMA copies both."""
    return jnp.concatenate([pad(first, 3, LANES), pad(second, 3, LANES)], 3).swapaxes(1, 2)


def _in_chunks(array: Array, chunk_size: int) -> Array:
    """[b, k, s, f] -> [b · k, chunks, chunk_size, f]."""
    return array.reshape(-1, array.shape[2] // chunk_size, chunk_size, array.shape[3])


def _to_rows(grid: QueryGrid, array: Array, heads_per_tile: int, fill: float) -> Array:
    """[b, h, t] -> [b, head tiles, tiles, 1, rows], with `fill` in padding."""
    array = grid.pad_rows(array, fill=fill)
    array = array.reshape(array.shape[0], -1, heads_per_tile, grid.num_tiles, grid.block_q).swapaxes(2, 3)
    return array.reshape(*array.shape[:3], 1, -1)


def _by_lanes(array: Array) -> Array:
    """[..., tokens] -> [..., tokens / LANES, LANES]."""
    array = pad(array, array.ndim - 1, LANES)
    return array.reshape(*array.shape[:-1], -1, LANES)


def _row_positions(operands: Operands, grid: QueryGrid, config: TpuConfig) -> Array | None:
    """The last position that each row of a selection's tiles sees: int32 [b, tiles, 1, rows]."""
    if not isinstance(operands.schedule, BlockSelection):
        return None
    last, position = operands.key.shape[1] - 1, query_positions(operands, operands.query.shape[1])
    position = jnp.minimum(position, last) if selection_of(operands).causal else jnp.full_like(position, last)
    return grid.tile_rows(position, config.rows)[:, :, None]
