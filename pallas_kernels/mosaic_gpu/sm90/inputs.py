"""Inputs of the Hopper kernels from a call of the op: tables of the schedule, padded arrays, segments and positions."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.kernel_tables import (
    kv_ranges,
    kv_tile_positions,
    q_ranges,
    query_positions,
    selected_blocks,
    selected_readers,
    selection_of,
)
from pallas_kernels.mosaic_gpu.sm90.config import ROWS, HopperConfig, KVKernelSpec, QKernelSpec
from pallas_kernels.padding import QueryGrid, make_query_grid, pad, positive_scale, round_up
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection
from pallas_kernels.softmax import LOG2E
from pallas_kernels.tiling import WORD_BITS, make_kv_tiles, make_q_tiles

NO_KEY = np.iinfo(np.int32).max
"""The position of padding keys, behind every query."""

FEATURE_MULTIPLE = 16
"""Features that the tensor cores multiply at a time."""

LENGTH_MULTIPLE = 8
"""Rows of a tile in shared memory, whole numbers of which TMA copies."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelTables:
    """Tiles of 128 rows and the lists of blocks that they read.

    The rows are queries, of one or more heads, or keys of a KV tile, which reads lists of query rows.

    Attributes:
      blocks: int32 [entries], the lists.
      mask_ids: int32 [entries], the mask of every entry: 0 masks nothing, EMPTY everything.
      ranges: int32 [b|1, head tiles, tiles, ranges, 2], for KV tiles [b|1, k, kv_tiles, head_passes, ranges, 2]; the
        first `num_full_ranges` hold full entries.
      mask_bits: int32 [masks, words of a block, ROWS], one bit for each column of a block that a row sees; None if
        positions say it.
      members: int32 [k, kv_tiles, blocks], the blocks of each KV tile, -1 for none; None for query tiles.
    """

    blocks: Int32[Array | np.ndarray, " entries"]
    mask_ids: Int32[Array | np.ndarray, " entries"]
    ranges: Int32[Array | np.ndarray, "#b head_tiles tiles *passes ranges 2"]
    mask_bits: Int32[Array | np.ndarray, "masks words rows"] | None
    num_full_ranges: int = dataclasses.field(metadata={"static": True})
    members: Int32[Array | np.ndarray, "k kv_tiles blocks"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelInputs:
    """The arrays of a kernel, or references to them; an absent one is None.

    Attributes:
      query, key, value, dout: padded in length and features.
      tables: the lists, with ranges by batch element where offsets or segments narrow them.
      query_segments, query_positions: int32 [b, tiles, ROWS] for query tiles, [b, t] for KV tiles.
      kv_segments: int32 [b, s] for query tiles, [b, k, kv_tiles, ROWS] for KV tiles.
      kv_positions: int32 [s + block_size] for query tiles, with NO_KEY for padding; [kv_tiles, ROWS] for KV tiles.
      sinks: float32 [head tiles, ROWS].
      lse, delta: float32 [b, head tiles, tiles, ROWS] for query tiles, [b, h, t] for KV tiles; lse in base 2, inf for
        padding.
      first_row: int32 [b], the row of the lists that the call's first row is, if it is known at run time only.
    """

    query: Float[Array, "b t h d"]
    key: Float[Array, "b s k d"]
    value: Float[Array, "b s k e"]
    tables: KernelTables
    dout: Float[Array, "b t h e"] | None = None
    lse: Float[Array, "b h *t"] | None = None
    delta: Float[Array, "b h *t"] | None = None
    query_segments: Int32[Array, "b *t"] | None = None
    kv_segments: Int32[Array, "b *s"] | None = None
    query_positions: Int32[Array, "b *t"] | None = None
    kv_positions: Int32[Array, "*s"] | None = None
    sinks: Float[Array, "head_tiles rows"] | None = None
    first_row: Int32[Array, " b"] | None = None


# Tables.


@functools.lru_cache(maxsize=64)
def q_tables(schedule: BlockSchedule, block_q: int, width: int) -> KernelTables:
    """Tables of a schedule for query tiles (numpy arrays).

    Args:
      block_q: queries of each head in a tile.
      width: bits used of a word.
    """
    tiles = make_q_tiles(schedule, block_q)
    heads, seen = schedule.head_index[:: ROWS // block_q], tiles.seen
    mask_bits = pack_bits(np.tile(seen, (1, ROWS // seen.shape[1], 1)), width)
    return KernelTables(tiles.blocks, tiles.mask_ids, tiles.ranges[heads][None], mask_bits, tiles.num_full_ranges)


@functools.lru_cache(maxsize=64)
def kv_tables(schedule: BlockSchedule, width: int) -> KernelTables:
    """Tables of a schedule for KV tiles (numpy arrays); `width` is the number of bits used of a word."""
    tiles = make_kv_tiles(schedule, ROWS)
    ranges, members = tiles.ranges[tiles.group_of][None], tiles.members[tiles.group_of]
    mask_bits = pack_bits(tiles.seen, width)
    return KernelTables(tiles.blocks, tiles.mask_ids, ranges, mask_bits, tiles.num_full_ranges, members)


def pack_bits(seen: Bool[np.ndarray, "masks rows columns"], width: int) -> Int32[np.ndarray, "masks words rows"]:
    """Columns packed into words of `width` bits."""
    bits = seen.reshape(*seen.shape[:2], -1, width)
    bits = np.pad(bits, ((0, 0), (0, 0), (0, 0), (0, WORD_BITS - width)))
    packed = np.packbits(bits, axis=-1, bitorder="little").view("<i4")[..., 0]
    return np.ascontiguousarray(packed.swapaxes(1, 2)).astype(np.int32)


def selection_q_tables(operands: Operands, config: HopperConfig) -> KernelTables:
    """Tables of a traced selection for query tiles: a list for every row, masked by position."""
    selected = selected_blocks(operands, config.block_q, config.heads_per_tile)
    _, _, rows, most = selected.blocks.shape
    ranges = selected.ranges + (selected.list_ids * (rows * most))[:, :, None, None]
    return KernelTables(selected.blocks.reshape(-1), selected.mask_ids.reshape(-1), ranges[:, :, :, None], None, 0)


def selection_kv_tables(operands: Operands, width: int) -> KernelTables:
    """Tables of a traced selection for KV tiles; a mask says which blocks of the tile a query row reads."""
    readers, selection = selected_readers(operands, ROWS), selection_of(operands)
    num_kv_heads, kv_tiles, size = readers.members.shape
    list_ids = np.arange(num_kv_heads * readers.head_passes) % readers.ends.shape[1]
    ranges = jnp.stack([readers.ends[..., :-1], readers.ends[..., 1:]], -1)[:, list_ids]
    ranges = ranges.reshape(len(ranges), num_kv_heads, readers.head_passes, kv_tiles, 1, 2).swapaxes(2, 3)
    seen = np.arange(1 << size)[:, None] >> np.arange(ROWS) // selection.block_size & 1  # [masks, rows]
    seen = np.concatenate([np.ones((1, ROWS), int), np.zeros((1, ROWS), int), seen])  # WHOLE and NOTHING first
    words = np.broadcast_to(np.where(seen, -1, 0)[:, None], (len(seen), selection.query_block // width, ROWS))
    mask_ids = readers.member_bits + 2
    return KernelTables(readers.rows, mask_ids, ranges, words.astype(np.int32), 0, readers.members)


# Inputs.


def prepare_inputs(
    problem: Problem, operands: Operands, tables: KernelTables, config: HopperConfig
) -> tuple[QKernelSpec, KernelInputs, QueryGrid]:
    """The specification and the inputs of the forward kernel, and its query tiles."""
    grid, schedule = make_query_grid(operands, config.block_q), operands.schedule
    query, scale = positive_scale(operands.query, problem.scale)
    found = q_ranges(operands, grid, tables.blocks, tables.ranges, tables.num_full_ranges, schedule.block_size)
    query = pad(grid.pad_to_tiles(query, _length(grid)), 3, FEATURE_MULTIPLE)
    key, value = (pad(pad(array, 3, FEATURE_MULTIPLE), 1, LENGTH_MULTIPLE) for array in (operands.key, operands.value))
    arrays: dict[str, typing.Any] = {}
    if found.query_ids is not None:
        arrays["query_segments"] = jnp.tile(found.query_ids, (1, 1, ROWS // grid.block_q))
        arrays["kv_segments"] = found.kv_ids
    if isinstance(schedule, BlockSelection):
        position, kv_length = query_positions(operands, operands.query.shape[1]), operands.key.shape[1]
        position = position if schedule.causal else jnp.full_like(position, NO_KEY - 1)
        keys = jnp.arange(round_up(kv_length, schedule.block_size) + schedule.block_size, dtype=jnp.int32)
        arrays["query_positions"] = grid.tile_rows(position, ROWS)
        arrays["kv_positions"] = jnp.where(keys < kv_length, keys, NO_KEY)
    if operands.sinks is not None:
        sinks = operands.sinks.astype(jnp.float32).reshape(-1, config.heads_per_tile)
        arrays["sinks"] = jnp.repeat(sinks, config.block_q, 1)
    tables = jax.tree.map(jnp.asarray, dataclasses.replace(tables, ranges=found.ranges))
    spec = QKernelSpec(
        batch=query.shape[0], num_heads=query.shape[2], num_kv_heads=key.shape[2], head_dim=query.shape[3],
        value_dim=value.shape[3], dtype=np.dtype(query.dtype), step_size=config.block_kv, num_stages=config.num_stages,
        block_size=schedule.block_size, num_ranges=found.ranges.shape[3], num_full_ranges=tables.num_full_ranges,
        scale=scale, soft_cap=problem.logits_soft_cap, block_q=grid.block_q, num_tiles=grid.num_tiles,
    )  # fmt: skip
    return spec, KernelInputs(query, key, value, tables, **arrays), grid


def prepare_query_grad_inputs(
    problem: Problem,
    operands: Operands,
    dout: Array,
    lse: Array,
    delta: Array,
    tables: KernelTables,
    config: HopperConfig,
) -> tuple[QKernelSpec, KernelInputs, QueryGrid]:
    """The specification and the inputs of the dq kernel, and its query tiles.

    Args:
      dout: [b, t, h, e].
      lse, delta: float32 [b, h, t]; -inf where nothing is read.
    """
    spec, inputs, grid = prepare_inputs(problem, dataclasses.replace(operands, sinks=None), tables, config)

    def to_rows(array: Array, fill: float) -> Array:
        array = grid.pad_rows(array, fill=fill)
        array = array.reshape(array.shape[0], -1, spec.heads_per_tile, grid.num_tiles, grid.block_q)
        return array.swapaxes(2, 3).reshape(*array.shape[:2], grid.num_tiles, ROWS)

    dout = pad(grid.pad_to_tiles(dout, _length(grid)), 3, FEATURE_MULTIPLE)
    inputs = dataclasses.replace(inputs, dout=dout, lse=to_rows(lse * LOG2E, np.inf), delta=to_rows(delta, 0))
    return spec, inputs, grid


def prepare_kv_grad_inputs(
    problem: Problem,
    operands: Operands,
    dout: Array,
    lse: Array,
    delta: Array,
    tables: KernelTables,
    config: HopperConfig,
) -> tuple[KVKernelSpec, KernelInputs]:
    """The specification and the inputs of the dk/dv kernel; the arguments are those of `prepare_query_grad_inputs`."""
    schedule, members = operands.schedule, tables.members
    assert members is not None  # KV tables have them
    grid = make_query_grid(operands, schedule.query_block)
    query, scale = positive_scale(operands.query, problem.scale)
    query, dout = (pad(grid.pad_to_tiles(array, _length(grid)), 3, FEATURE_MULTIPLE) for array in (query, dout))
    key, value = (pad(pad(array, 3, FEATURE_MULTIPLE), 1, LENGTH_MULTIPLE) for array in (operands.key, operands.value))
    found = kv_ranges(operands, grid, tables.blocks, tables.ranges, tables.num_full_ranges, members)
    positions: dict[str, typing.Any] = {}
    if isinstance(schedule, BlockSelection) and schedule.causal:
        positions["query_positions"] = query_positions(operands, grid.num_tiles * grid.block_q)
        positions["kv_positions"] = kv_tile_positions(operands, members)
    inputs = KernelInputs(
        query, key, value, jax.tree.map(jnp.asarray, dataclasses.replace(tables, ranges=found.ranges)), dout,
        grid.pad_rows(lse * LOG2E, fill=np.inf), grid.pad_rows(delta),
        query_segments=found.query_ids, kv_segments=found.kv_ids, first_row=found.first_row, **positions,
    )  # fmt: skip
    _, num_kv_heads, kv_tiles, head_passes, num_ranges, _ = found.ranges.shape
    spec = KVKernelSpec(
        batch=query.shape[0], num_heads=query.shape[2], num_kv_heads=num_kv_heads, head_dim=query.shape[3],
        value_dim=value.shape[3], dtype=np.dtype(query.dtype), step_size=config.block_kv, num_stages=config.num_stages,
        block_size=schedule.query_block, num_ranges=num_ranges, num_full_ranges=tables.num_full_ranges, scale=scale,
        soft_cap=problem.logits_soft_cap, num_kv_tiles=kv_tiles, kv_block_size=schedule.block_size,
        head_passes=head_passes,
    )  # fmt: skip
    return spec, inputs


def _length(grid: QueryGrid) -> int | None:
    """The padded length of queries: a few rows if they begin with a tile, else whole tiles."""
    return round_up(grid.length, LENGTH_MULTIPLE) if isinstance(grid.shift, int) and grid.shift == 0 else None
