"""From a call of the op to a call of a TPU kernel: padded arrays, heads before tokens, and the way back."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.grid import Grid, edge_ids, make_grid, pad
from pallas_kernels.mosaic_tpu.plan import LOG2E, Plan
from pallas_kernels.mosaic_tpu.tables import Tables
from pallas_kernels.mosaic_tpu.tiles import LANES, TpuTiles
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.segments import narrow


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays that a kernel of tiles of queries is called with; what is absent is None.

    Attributes:
      lists: int32 [b|1 · heads of tiles], of scalars that are there before anything else.
      entries: int32 [lists, 1, entries].
      slices: int32 [b|1, heads of tiles, 1, tiles · parts · 2].
      words: int32 [kinds, words, keys].
      query: with whole tiles of queries.
      key_value: keys and values side by side, each padded to lanes; tokens of all heads, in whole blocks each.
      sinks: float32 [h], in scalar memory.
      query_segments, query_positions: int32 [b, tiles, 1, rows of a tile].
      kv_segments: int32 [b, s / LANES, LANES].
      dout: of the backward pass.
      lse, delta: float32 [b, heads of tiles, tiles, 1, rows]; lse times log2(e), inf where there is no query.
    """

    lists: Int32[Array, " lists"]
    entries: Int32[Array, "lists 1 entries"]
    slices: Int32[Array, "#b heads 1 numbers"]
    words: Int32[Array, "kinds words keys"] | None
    query: Float[Array, "b h t d"]
    key_value: Float[Array, "b*k*s f"]
    sinks: Float[Array, " h"] | None = None
    query_segments: Int32[Array, "b tiles 1 rows"] | None = None
    query_positions: Int32[Array, "b tiles 1 rows"] | None = None
    kv_segments: Int32[Array, "b s lanes"] | None = None
    dout: Float[Array, "b h t e"] | None = None
    lse: Float[Array, "b heads tiles 1 rows"] | None = None
    delta: Float[Array, "b heads tiles 1 rows"] | None = None


def arrange(problem: Problem, operands: Operands, tables: Tables, tiles: TpuTiles) -> tuple[Plan, Inputs, Grid]:
    """The plan and the inputs of the forward kernel, and how its tiles stand."""
    grid = make_grid(problem, operands, tiles.queries)
    query = scaled(operands.query, problem)
    reads = problem.schedule or operands.selection
    assert reads is not None  # one of the two says what is read
    size = reads.block_size
    attributes = _attributes(problem, operands, grid, tiles, size)
    slices = jnp.asarray(tables.slices)
    if not isinstance(grid.first, int):
        tile = jnp.minimum(grid.first[:, None] + jnp.arange(grid.tiles, dtype=jnp.int32), slices.shape[2] - 1)
        slices = slices[0][:, tile].swapaxes(0, 1)
    if "kv_segments" in attributes and problem.schedule is not None:
        ids = attributes["query_segments"][:, :, 0, : grid.queries]
        kv_ids = attributes["kv_segments"].reshape(len(ids), -1)
        slices = narrow(tables.blocks, slices, tables.num_full, ids, kv_ids, size)
    lists, key_value = jnp.asarray(tables.lists), beside(operands.key, operands.value, size)
    plan = Plan(
        batch=query.shape[0], head_tiles=slices.shape[1], tiles=grid.tiles, heads=tiles.heads, queries=tiles.queries,
        group=query.shape[2] // operands.key.shape[2], key_dim=lanes(query.shape[3]),
        value_dim=lanes(operands.value.shape[3]), dtype=np.dtype(query.dtype), step=tiles.keys, block_size=size,
        block_bits=tables.block_bits, num_parts=slices.shape[3], num_full=tables.num_full,
        list_length=tables.entries.shape[1], kv_length=key_value.shape[2], soft_cap=problem.logits_soft_cap,
    )  # fmt: skip
    inputs = Inputs(
        lists.reshape(-1), jnp.asarray(tables.entries)[:, None], slices.reshape(*slices.shape[:2], 1, -1),
        None if tables.words is None else jnp.asarray(tables.words),
        of_tiles(grid, query), key_value.reshape(-1, key_value.shape[3]),
        sinks=None if operands.sinks is None else operands.sinks.astype(jnp.float32), **attributes,
    )  # fmt: skip
    return plan, inputs, grid


def scaled(query: Array, problem: Problem) -> Array:
    """Queries whose products with keys are logits times log2(e), or with a soft cap what its tanh is taken of.

    Rounded to the queries' own dtype, like the weights: that is less than what rounded logits would lose.
    """
    factor = problem.scale * (LOG2E if problem.logits_soft_cap is None else 1 / problem.logits_soft_cap)
    return (query.astype(jnp.float32) * factor).astype(query.dtype)


def lanes(features: int) -> int:
    return -(-features // LANES) * LANES


def of_tiles(grid: Grid, array: Array) -> Array:
    """[b, t, h, f] -> [b, h, whole tiles of queries, f in whole lanes]."""
    return pad(grid.place(array, grid.tiles * grid.queries), 3, LANES).swapaxes(1, 2)


def beside(first: Array, second: Array, size: int) -> Array:
    """[b, s, k, d] and [b, s, k, e] -> [b, k, s in whole blocks, d and e in whole lanes]: one copy brings both."""
    both = jnp.concatenate([pad(first, 3, LANES), pad(second, 3, LANES)], 3)
    return pad(both, 1, size).swapaxes(1, 2)


def rows_of(grid: Grid, array: Array, heads: int, nothing: float) -> Array:
    """[b, h, t] -> [b, h / heads of a tile, tiles, 1, rows], `nothing` where there is no query."""
    array = grid.place(array.swapaxes(1, 2), grid.tiles * grid.queries, nothing).swapaxes(1, 2)
    array = array.reshape(array.shape[0], -1, heads, grid.tiles, grid.queries).swapaxes(2, 3)
    return array.reshape(*array.shape[:3], 1, -1)


def rows_back(grid: Grid, array: Array, heads: int) -> Array:
    """The inverse."""
    batch, head_tiles = array.shape[:2]
    array = array.reshape(batch, head_tiles, grid.tiles, heads, grid.queries).swapaxes(2, 3)
    return grid.take_back(array.reshape(batch, head_tiles * heads, -1), 2)


def _attributes(problem: Problem, operands: Operands, grid: Grid, tiles: TpuTiles, size: int) -> dict:
    """Segments and positions of rows and keys, those that are needed."""
    found: dict[str, typing.Any] = {}
    if operands.query_segment_ids is not None:
        kv_ids = operands.kv_segment_ids
        assert kv_ids is not None  # both or neither
        # Keys that are not there take the last one's id: a tile in one segment sees one segment in that block too.
        whole = max(size, LANES)
        kv_ids = jnp.pad(kv_ids, ((0, 0), (0, -kv_ids.shape[1] % whole)), mode="edge")
        found["kv_segments"] = kv_ids.reshape(len(kv_ids), -1, LANES)
        ids = edge_ids(grid, operands.query_segment_ids)
        found["query_segments"] = jnp.tile(ids, (1, 1, tiles.heads))[:, :, None]
    selection = operands.selection
    if selection is not None:
        batch, length = operands.query.shape[:2]
        position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        if operands.query_offset is not None:
            position = position + operands.query_offset[:, None]
        last = operands.key.shape[1] - 1
        position = jnp.minimum(position, last) if selection.causal else jnp.full_like(position, last)
        found["query_positions"] = grid.rows(position, tiles.rows)[:, :, None]
    return found
