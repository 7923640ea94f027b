"""From a call of the backward pass to a call of the kernel of the keys' gradients, and the way back."""

import typing

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.arrange import beside, by_lanes, in_pieces, lanes
from pallas_kernels.mosaic_tpu.config import LANES, KernelSpec, KVGradConfig
from pallas_kernels.mosaic_tpu.launch import KernelInputs
from pallas_kernels.mosaic_tpu.pipeline import pass_scalars
from pallas_kernels.mosaic_tpu.tables import KVTables
from pallas_kernels.padding import QueryGrid, edge_ids, make_query_grid, pad
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.segments import find, narrow_kv_tiles
from pallas_kernels.softmax import LOG2E


def prepare_kv_grad_inputs(
    problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array, tables: KVTables, config: KVGradConfig
) -> tuple[KernelSpec, KernelInputs]:
    """The specification and the inputs of the dk/dv kernel.

    Args:
      dout: [b, t, h, e].
      lse, delta: float32 [b, h, t]; -inf where nothing is read.
    """
    reads = problem.schedule or operands.selection
    assert reads is not None  # one of the two says what is read
    size = reads.block_size if operands.selection is None else operands.selection.query_block
    grid = make_query_grid(problem, operands, size)
    query, key, value = operands.query, operands.key, operands.value
    length = -(-grid.num_tiles * size // LANES) * LANES

    def of_queries(array: Array, nothing: float) -> Array:
        return by_lanes(grid.place(array.swapaxes(1, 2), length, nothing).swapaxes(1, 2))

    first_row = None if isinstance(grid.first, int) else grid.first
    ranges, conditions = _segments(operands, grid, tables, reads.block_size)
    if first_row is not None:
        first = first_row[:, None, None, None]
        edges = [find(tables.walked.blocks, ranges, edge) for edge in (first, first + grid.num_tiles)]
        ranges = jnp.stack(edges, -1)
    walked, members = tables.walked, jnp.asarray(tables.members)
    num_kv_heads, kv_tiles, blocks = members.shape
    by_head_pass = ranges.reshape(*ranges.shape[:2], kv_tiles, -1, *ranges.shape[3:])
    head_passes = query.shape[2] // num_kv_heads // config.heads_per_step
    ranges = jnp.broadcast_to(by_head_pass, (*by_head_pass.shape[:3], head_passes, *by_head_pass.shape[4:]))
    spec = KernelSpec(
        batch=query.shape[0], num_head_tiles=num_kv_heads, num_tiles=kv_tiles, head_passes=head_passes, tile_heads=1,
        tile_tokens=blocks * reads.block_size, group_size=query.shape[2] // num_kv_heads,
        head_dim=lanes(query.shape[3]), value_dim=lanes(value.shape[3]), dtype=np.dtype(query.dtype),
        step_size=config.step_size, step_heads=config.heads_per_step,
        chunk_size=config.chunk_size(size), chunk_bits=walked.piece_bits,
        empty_mask_id=0 if walked.mask_bits is None else walked.nothing,
        num_ranges=ranges.shape[4], num_full_ranges=walked.num_full_ranges, entries_per_list=walked.entries.shape[1],
        padded_to_steps=walked.in_steps and first_row is None and not conditions,
        scale=problem.scale, soft_cap=problem.logits_soft_cap, rows_are_queries=False,
        member_block_size=reads.block_size if walked.mask_bits is None else None,
    )  # fmt: skip
    source = beside(grid.place(query, grid.num_tiles * size), grid.place(dout, grid.num_tiles * size))
    both = gather_kv_tiles(beside(key, value), members, reads.block_size)
    inputs = KernelInputs(
        jnp.asarray(walked.lists).reshape(-1), jnp.asarray(walked.entries)[:, None],
        pass_scalars(ranges.reshape(*ranges.shape[:2], -1, *ranges.shape[4:])),
        None if walked.mask_bits is None else jnp.asarray(walked.mask_bits),
        in_pieces(source, spec.chunk_size), both[..., : spec.head_dim], both[..., spec.head_dim :],
        first_chunk=None if first_row is None else first_row * walked.pieces,
        lse=of_queries(lse * LOG2E, np.inf), delta=of_queries(delta, 0),
        **conditions, **_positions(operands, tables, reads.block_size),
    )  # fmt: skip
    return spec, inputs


def gather_kv_tiles(array: Array, members: Array, size: int) -> Array:
    """[b, k, s, f] -> [b, k, rows of packs, f]."""
    array = pad(array, 2, size)
    blocks = array.reshape(*array.shape[:2], -1, size, array.shape[3])
    order = jnp.maximum(members, 0).reshape(1, len(members), -1, 1, 1)
    return jnp.take_along_axis(blocks, order, 2).reshape(*array.shape[:2], -1, array.shape[3])


def scatter_kv_tiles(array: Array, members: Array, size: int, length: int) -> Array:
    """[b, k, rows of packs, f] -> [b, length, k, f]: every block is in one pack."""
    flat_members = members.reshape(len(members), -1)
    num_blocks = -(-length // size)
    # Places without a block go to one beyond the last.
    there = jnp.where(flat_members < 0, num_blocks, flat_members)
    place = jnp.zeros((len(members), num_blocks + 1), jnp.int32)
    place = place.at[jnp.arange(len(members))[:, None], there].set(jnp.arange(there.shape[1], dtype=jnp.int32))
    blocks = array.reshape(*array.shape[:2], -1, size, array.shape[3])
    found = jnp.take_along_axis(blocks, place[None, :, :num_blocks, None, None], 2)
    return found.reshape(*array.shape[:2], -1, array.shape[3])[:, :, :length].swapaxes(1, 2)


def _segments(operands: Operands, grid: QueryGrid, tables: KVTables, size: int) -> tuple[Array, dict]:
    """The slices without the queries that share no segment with a pack, and the ids of queries and of packs' keys."""
    ranges = jnp.asarray(tables.walked.ranges)
    if operands.query_segment_ids is None or operands.kv_segment_ids is None:
        return ranges, {}
    ids, kv_ids = edge_ids(grid, operands.query_segment_ids), operands.kv_segment_ids
    kv_ids = jnp.pad(kv_ids, ((0, 0), (0, -kv_ids.shape[1] % size)), mode="edge").reshape(len(kv_ids), -1, size)
    # A place without a block takes the first one's ids.
    members = jnp.asarray(tables.members)
    members = jnp.maximum(jnp.where(members < 0, members[..., :1], members), 0)
    kv_ids = kv_ids[:, members].reshape(len(kv_ids), *members.shape[:2], -1)
    kv_tiles = members.shape[1]
    first_row = 0 if isinstance(grid.first, int) else grid.first[:, None, None]
    by_head_pass = ranges.reshape(*ranges.shape[:2], kv_tiles, -1, *ranges.shape[3:])
    narrowed = narrow_kv_tiles(
        tables.walked.blocks, by_head_pass, tables.walked.num_full_ranges, ids, kv_ids, first_row
    )
    conditions: dict[str, typing.Any] = {
        "column_segment_ids": by_lanes(ids.reshape(len(ids), -1)), "row_segment_ids": kv_ids[:, :, :, None],
    }  # fmt: skip
    return narrowed.reshape(*narrowed.shape[:2], -1, *narrowed.shape[4:]), conditions


def _positions(operands: Operands, tables: KVTables, size: int) -> dict:
    """Of packs' keys and of the first query, where a selection is causal."""
    if operands.selection is None or not operands.selection.causal:
        return {}
    # Packs of a selection are the same for all heads.
    keys = jnp.asarray(tables.members)[0, :, :, None] * size + jnp.arange(size, dtype=jnp.int32)
    offset = operands.query_offset
    first = jnp.zeros(len(operands.query), jnp.int32) if offset is None else offset
    return {"row_positions": keys.reshape(1, len(keys), 1, -1), "first_position": first}
