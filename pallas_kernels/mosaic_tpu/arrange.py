"""From a call of the op to a call of a TPU kernel: padded arrays, heads before tokens, and the way back."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic_tpu.launch import Specs
from pallas_kernels.mosaic_tpu.plan import LOG2E, Plan
from pallas_kernels.mosaic_tpu.tables import Tables
from pallas_kernels.mosaic_tpu.tiles import LANES, TpuConfig
from pallas_kernels.mosaic_tpu.walk import row_scalars
from pallas_kernels.padding import QueryGrid, edge_ids, make_query_grid, pad
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.segments import narrow


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays that a kernel is called with, and after that their specs, or references; what is absent is None.

    The rows of a tile are those of `first` and `second`, its columns come from the source: queries with douts, and keys
    with values, or the other way round.

    Attributes:
      lists: int32 [lists], one for every head of tiles, and sequence if they differ.
      entries: int32 [lists, 1, entries].
      ranges: int32 [b|1, heads of tiles, 1, numbers]: see `numbers_of`.
      mask_bits: int32 [masks, words, columns].
      source: [b · heads, pieces, slot, f], the two halves of what is walked side by side, each padded to lanes.
      first, second: [b, heads, tokens, d] and [b, heads, tokens, e].
      sinks: float32 [h].
      row_segments: int32 [b, tiles, 1, rows], or for every head [b, heads of tiles, tiles, 1, rows].
      row_positions: int32 [b|1, tiles, 1, rows].
      column_segments: int32 [b, tokens / LANES, LANES].
      first_piece, first_position: int32 [b], which piece the source's first one is, and where its first token stands.
      lse, delta: float32, of rows [b, heads of tiles, tiles, 1, rows], or of columns [b, h, tokens / LANES, LANES]; lse
        times log2(e), inf where there is no query.
    """

    lists: Int32[Array, " lists"]
    entries: Int32[Array, "lists 1 entries"]
    ranges: Int32[Array, "#b h 1 numbers"]
    mask_bits: Int32[Array, "kinds mask_bits columns"] | None
    source: Float[Array, "b*heads pieces slot f"]
    first: Float[Array, "b h tokens d"]
    second: Float[Array, "b h tokens e"] | None = None
    sinks: Float[Array, " h"] | None = None
    row_segments: Int32[Array, "b *tiles 1 rows"] | None = None
    row_positions: Int32[Array, "#b tiles 1 rows"] | None = None
    column_segments: Int32[Array, "b s lanes"] | None = None
    first_piece: Int32[Array, " b"] | None = None
    first_position: Int32[Array, " b"] | None = None
    lse: Float[Array, "b h tokens lanes"] | Float[Array, "b h tiles 1 rows"] | None = None
    delta: Float[Array, "b h tokens lanes"] | Float[Array, "b h tiles 1 rows"] | None = None

    def specs(self, plan: Plan) -> typing.Any:
        """Which block of each a tile is given."""
        specs, of_queries = Specs(plan, self.lists), plan.ascending
        of_ids = specs.rows_of_all_heads if of_queries else specs.rows
        of_numbers = specs.rows if of_queries else specs.of_head
        kinds = {
            "entries": specs.list, "ranges": specs.scalars_of_head, "mask_bits": specs.whole, "source": specs.source,
            "first": specs.tokens, "second": specs.tokens, "sinks": specs.scalars, "row_segments": of_ids,
            "row_positions": specs.rows_of_all_heads, "column_segments": specs.of_batch, "first_piece": specs.scalars,
            "first_position": specs.scalars, "lse": of_numbers, "delta": of_numbers,
        }  # fmt: skip
        given = {name: getattr(self, name) for name in kinds}
        found = {name: None if array is None else kinds[name](array) for name, array in given.items()}
        return dataclasses.replace(self, lists=None, **found)


def arrange(problem: Problem, operands: Operands, tables: Tables, config: TpuConfig) -> tuple[Plan, Inputs, QueryGrid]:
    """The plan and the inputs of the forward kernel, and how its tiles stand."""
    grid = make_query_grid(problem, operands, config.block_q)
    reads = problem.schedule or operands.selection
    assert reads is not None  # one of the two says what is read
    query, key, value, size = operands.query, operands.key, operands.value, reads.block_size
    attributes = _attributes(operands, grid, config, size)
    ranges = jnp.asarray(tables.ranges)
    if not isinstance(grid.first, int):
        tile = jnp.minimum(grid.first[:, None] + jnp.arange(grid.num_tiles, dtype=jnp.int32), ranges.shape[2] - 1)
        ranges = ranges[0][:, tile].swapaxes(0, 1)
    if "row_segments" in attributes and problem.schedule is not None:
        ids = attributes["row_segments"][:, :, 0, : grid.block_q]
        kv_ids = attributes["column_segments"].reshape(len(ids), -1)
        ranges = narrow(tables.blocks, ranges, tables.num_full_ranges, ids, kv_ids, size)
    plan = Plan(
        batch=query.shape[0], head_tiles=ranges.shape[1], num_tiles=grid.num_tiles, head_passes=1,
        row_heads=config.heads_per_tile,
        row_tokens=config.block_q, group=query.shape[2] // key.shape[2], key_dim=lanes(query.shape[3]),
        value_dim=lanes(value.shape[3]), dtype=np.dtype(query.dtype), step_size=config.block_kv, step_heads=1,
        slot=config.slot(size), piece_bits=tables.piece_bits, nothing=tables.nothing, num_ranges=ranges.shape[3],
        num_full_ranges=tables.num_full_ranges, list_length=tables.entries.shape[1],
        in_steps=tables.in_steps and "row_segments" not in attributes, scale=problem.scale,
        soft_cap=problem.logits_soft_cap, ascending=True,
    )  # fmt: skip
    inputs = Inputs(
        jnp.asarray(tables.lists).reshape(-1), jnp.asarray(tables.entries)[:, None],
        row_scalars(ranges), None if tables.mask_bits is None else jnp.asarray(tables.mask_bits),
        in_pieces(beside(pad(key, 1, size), pad(value, 1, size)), plan.slot), of_tiles(grid, query),
        sinks=None if operands.sinks is None else operands.sinks.astype(jnp.float32), **attributes,
    )  # fmt: skip
    return plan, inputs, grid


def prepare_query_grad_inputs(
    problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array, tables: Tables, config: TpuConfig
) -> tuple[Plan, Inputs, QueryGrid]:
    """The same for the gradient of the queries.

    Args:
      dout: [b, t, h, e].
      lse, delta: float32 [b, h, t]; -inf where nothing is read.
    """
    plan, inputs, grid = arrange(problem, dataclasses.replace(operands, sinks=None), tables, config)
    lse, delta = (
        rows_of(grid, lse * LOG2E, config.heads_per_tile, np.inf),
        rows_of(grid, delta, config.heads_per_tile, 0),
    )
    return plan, dataclasses.replace(inputs, second=of_tiles(grid, dout), lse=lse, delta=delta), grid


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
        found["column_segments"] = by_lanes(kv_ids)
        ids = edge_ids(grid, operands.query_segment_ids)
        found["row_segments"] = jnp.tile(ids, (1, 1, config.heads_per_tile))[:, :, None]
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
