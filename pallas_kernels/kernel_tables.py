"""Lists, ranges, segments and positions of a call, as both Mosaic backends need them before their own encoding.

A schedule's tables are made on the host. A selection's are traced, and so is what offsets and segments leave of either.
"""

import typing

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from pallas_kernels.padding import QueryGrid, pad_blocks
from pallas_kernels.problem import Operands
from pallas_kernels.schedule import NOTHING, WHOLE
from pallas_kernels.segments import find, narrow, narrow_kv_tiles
from pallas_kernels.selection import BlockSelection
from pallas_kernels.tiling import transpose_selection

Entries = Array | np.ndarray

EMPTY = NOTHING
"""The mask id of padding, which hides all of it."""


class SelectedBlocks(typing.NamedTuple):
    """A selection as lists of blocks: one for every sequence and head that has its own.

    Attributes:
      blocks, mask_ids: int32 [b|1, lists, rows, max_blocks].
      ranges: int32 [b|1, head tiles, tiles, 2], positions in the list of the tile's heads.
      list_ids: int32 [b|1, head tiles], the list of every head tile, counted over sequences.
    """

    blocks: Int32[Array, "#b lists rows max_blocks"]
    mask_ids: Int32[Array, "#b lists rows max_blocks"]
    ranges: Int32[Array, "#b head_tiles tiles 2"]
    list_ids: Int32[np.ndarray, "#b head_tiles"]


def selected_blocks(operands: Operands, block_q: int, heads_per_tile: int) -> SelectedBlocks:
    """The blocks that query tiles of a selection read, all of them masked by position."""
    selection = selection_of(operands)
    batch, lists, rows, most = selection.kv_blocks.shape
    num_heads, length = operands.query.shape[2], operands.query.shape[1]
    num_blocks = -(-operands.key.shape[1] // selection.block_size)
    inside = (selection.kv_blocks >= 0) & (selection.kv_blocks < num_blocks)
    first = jnp.arange(rows, dtype=jnp.int32) * most
    ends = jnp.broadcast_arrays(first, first + jnp.clip(selection.counts, 0, most))
    list_of_head = np.arange(0, num_heads, heads_per_tile, dtype=np.int32) * lists // num_heads
    row_of_tile = np.arange(-(-length // block_q)) * block_q // selection.query_block
    return SelectedBlocks(
        jnp.where(inside, selection.kv_blocks, 0),
        jnp.where(inside, WHOLE, EMPTY).astype(jnp.int32),
        jnp.stack(ends, -1)[:, list_of_head][:, :, row_of_tile],
        np.arange(batch, dtype=np.int32)[:, None] * lists + list_of_head,
    )


class SelectedReaders(typing.NamedTuple):
    """A selection as lists of query rows that read KV tiles of consecutive blocks.

    Attributes:
      rows: int32 [b|1 · lists · entries], query rows.
      member_bits: int32 [b|1 · lists · entries], one bit for each block of the KV tile that the row reads.
      ends: int32 [b|1, lists, kv_tiles + 1], where the rows of every KV tile begin.
      head_passes: passes over each KV tile, each with a list of its own.
      members: int32 [k, kv_tiles, blocks], the blocks of each KV tile, -1 for none.
    """

    rows: Int32[Array, " entries"]
    member_bits: Int32[Array, " entries"]
    ends: Int32[Array, "#b lists ends"]
    head_passes: int
    members: Int32[np.ndarray, "k kv_tiles blocks"]


def selected_readers(operands: Operands, block_kv: int) -> SelectedReaders:
    """The transpose of a selection, by one sort of its entries by KV tile and row."""
    selection = selection_of(operands)
    num_heads, (kv_length, num_kv_heads) = operands.query.shape[2], operands.key.shape[1:3]
    size, num_blocks = block_kv // selection.block_size, -(-kv_length // selection.block_size)
    kv_tiles = -(-num_blocks // size)
    rows, bits, ends = transpose_selection(selection, num_blocks, kv_tiles, size)
    members = np.arange(kv_tiles * size, dtype=np.int32).reshape(kv_tiles, size)
    members = np.broadcast_to(np.where(members < num_blocks, members, -1), (num_kv_heads, kv_tiles, size))
    head_passes = num_heads // num_kv_heads if ends.shape[1] == num_heads else 1
    return SelectedReaders(rows, bits, ends, head_passes, members)


def selection_of(operands: Operands) -> BlockSelection:
    """The selection of a call that has one."""
    assert isinstance(operands.schedule, BlockSelection)
    return operands.schedule


class QRanges(typing.NamedTuple):
    """The ranges that query tiles of a call read, and segment ids if there are any.

    Attributes:
      ranges: int32 [b|1, head tiles, tiles, ranges, 2].
      query_ids: int32 [b, tiles, block_q].
      kv_ids: int32 [b, s], s padded.
    """

    ranges: Int32[Array, "#b head_tiles tiles ranges 2"]
    query_ids: Int32[Array, "b tiles block_q"] | None
    kv_ids: Int32[Array, "b s"] | None


def q_ranges(
    operands: Operands, grid: QueryGrid, blocks: Entries, ranges: Entries, num_full_ranges: int, kv_multiple: int
) -> QRanges:
    """The ranges of the tiles at this call's offsets, without the blocks that share no segment with a tile.

    Args:
      blocks: int32 [entries], the lists.
      ranges: int32 [b|1, head tiles, tiles, ranges, 2], of all tiles of the schedule.
      kv_multiple: the length of `kv_ids` is a multiple of it; it is a multiple of the block size.
    """
    blocks, ranges = jnp.asarray(blocks), jnp.asarray(ranges)
    if not isinstance(grid.first, int):
        tile = jnp.minimum(grid.first[:, None] + jnp.arange(grid.num_tiles, dtype=jnp.int32), ranges.shape[2] - 1)
        ranges = ranges[0][:, tile].swapaxes(0, 1)
    if operands.query_segment_ids is None or operands.kv_segment_ids is None:
        return QRanges(ranges, None, None)
    query_ids = grid.edge_ids(operands.query_segment_ids)
    kv_ids = pad_blocks(operands.kv_segment_ids, kv_multiple)
    if not isinstance(operands.schedule, BlockSelection):
        ranges = narrow(blocks, ranges, num_full_ranges, query_ids, kv_ids, operands.schedule.block_size)
    return QRanges(ranges, query_ids, kv_ids)


class KVRanges(typing.NamedTuple):
    """The ranges of query rows that KV tiles of a call loop over, and segment ids if there are any.

    Attributes:
      ranges: int32 [b|1, k, kv_tiles, head passes, ranges, 2].
      query_ids: int32 [b, rows · query_block].
      kv_ids: int32 [b, k, kv_tiles, keys of a tile].
      first_row: int32 [b], the row of the lists that the call's first row is; None if it is 0 for all.
    """

    ranges: Int32[Array, "#b k kv_tiles passes ranges 2"]
    query_ids: Int32[Array, "b t"] | None
    kv_ids: Int32[Array, "b k kv_tiles keys"] | None
    first_row: Int32[Array, " b"] | None


def kv_ranges(
    operands: Operands, grid: QueryGrid, blocks: Entries, ranges: Entries, num_full_ranges: int, members: Entries
) -> KVRanges:
    """The ranges within this call's rows, without the rows that share no segment with a KV tile.

    Args:
      blocks: int32 [entries], the lists of query rows.
      members: int32 [k, kv_tiles, blocks], -1 for none.
    """
    blocks, ranges, members = jnp.asarray(blocks), jnp.asarray(ranges), jnp.asarray(members)
    first_row = None if isinstance(grid.first, int) else grid.first
    query_ids = kv_ids = None
    if operands.query_segment_ids is not None and operands.kv_segment_ids is not None:
        size = operands.schedule.block_size
        query_ids, kv_ids = grid.edge_ids(operands.query_segment_ids), pad_blocks(operands.kv_segment_ids, size)
        kv_ids = kv_ids.reshape(len(kv_ids), -1, size)
        # An absent block has the ids of the tile's first one.
        present = jnp.maximum(jnp.where(members < 0, members[..., :1], members), 0)
        kv_ids = kv_ids[:, present].reshape(len(kv_ids), *members.shape[:2], -1)
        row = 0 if first_row is None else first_row[:, None, None]
        ranges = narrow_kv_tiles(blocks, ranges, num_full_ranges, query_ids, kv_ids, row)
        query_ids = query_ids.reshape(len(query_ids), -1)
    if first_row is not None:
        first = first_row.reshape(-1, *[1] * (ranges.ndim - 2))
        ranges = jnp.stack([find(blocks, ranges, edge) for edge in (first, first + grid.num_tiles)], -1)
    return KVRanges(ranges, query_ids, kv_ids, first_row)


def query_positions(operands: Operands, length: int) -> Int32[Array, "b length"]:
    """Positions of the queries among the keys, and of padding after them."""
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (operands.query.shape[0], length))
    return position if operands.query_offset is None else position + operands.query_offset[:, None]


def kv_tile_positions(operands: Operands, members: Entries) -> Int32[Array, "kv_tiles keys"]:
    """Positions of the keys of a selection's KV tiles, which are the same for all heads."""
    size = operands.schedule.block_size
    keys = jnp.asarray(members)[0, :, :, None] * size + jnp.arange(size, dtype=jnp.int32)
    return keys.reshape(len(keys), -1)
