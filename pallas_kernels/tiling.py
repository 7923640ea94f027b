"""Tiles of merged rows: rows of queries for the forward pass, blocks of keys for the gradients of keys and values.

A matrix unit needs more rows at a time than one block has. Consecutive query blocks are merged for the forward pass;
for the gradients of keys and values, key blocks with similar readers are merged into a KV tile.
"""

import dataclasses
import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from pallas_kernels.schedule import NOTHING, WHOLE, BlockLists, BlockSchedule, expand
from pallas_kernels.selection import BlockSelection

WORD_BITS = 32
"""Bits in a word of mask bits, one per row or key."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tiles:
    """Groups of rows and the blocks that they read together.

    Attributes:
      members: int32 [unique_heads, tiles, rows], the rows in every tile; -1 for none.
      lists: the blocks that tiles read; its mask ids index `tile_masks`.
      tile_masks: int32 [mask_ids, rows], the token mask of every row of a tile; the first masks nothing, the second
        everything.
    """

    members: Int32[np.ndarray, "unique_heads tiles rows"]
    lists: BlockLists
    tile_masks: Int32[np.ndarray, "mask_ids rows"]

    def executed_blocks(self, capacity: int) -> np.ndarray:
        """Pairs of blocks that every unique head computes with steps of `capacity` entries: int64 [unique_heads]."""
        steps = -(-self.lists.counts().astype(np.int64) // capacity)
        return steps.sum((1, 2)) * capacity * self.members.shape[2]


def group_consecutive_rows(num_unique_heads: int, num_rows: int, size: int) -> np.ndarray:
    """Groups of consecutive rows: int32 [unique_heads, tiles, size]."""
    rows = np.arange(-(-num_rows // size) * size, dtype=np.int32).reshape(-1, size)
    return np.broadcast_to(np.where(rows < num_rows, rows, -1), (num_unique_heads, *rows.shape))


def group_similar_rows(lists: BlockLists, size: int) -> np.ndarray:
    """Groups of rows that read the same lists: int32 [unique_heads, tiles, size].

    Every later query reads a key block in a stripe, and only a window of them reads its neighbour. A group has stripes
    or window blocks only, so that its rows together read little more than each row alone. Rows without entries are in
    no group.
    """
    lengths = lists.ranges[..., 1] - lists.ranges[..., 0]
    found = []
    for unique_head in range(lists.num_unique_heads):
        busy = np.flatnonzero(lengths[unique_head].any(-1))
        has = np.pad(lengths[unique_head, busy, : lists.num_full_ranges] > 0, ((0, 0), (0, 1)))  # there may be none
        kinds, kind = np.unique(has, axis=0, return_inverse=True)
        groups = []
        for each in range(len(kinds)):
            rows = busy[kind.reshape(-1) == each]
            padded = np.full(-(-len(rows) // size) * size, -1, np.int32)
            padded[: len(rows)] = rows
            groups.append(padded.reshape(-1, size))
        found.append(np.concatenate(groups) if groups else np.zeros((0, size), np.int32))
    tiles = np.full((len(found), max(1, *map(len, found)), size), -1, np.int32)
    for unique_head, groups in enumerate(found):
        tiles[unique_head, : len(groups)] = groups
    return tiles


def merge(lists: BlockLists, members: np.ndarray) -> Tiles:
    """Tiles of groups of rows.

    A range of a list that all rows of a group share stays a range of full entries. Blocks that only some of the rows
    read are written out once, with the token mask of every row.

    Args:
      members: int32 [unique_heads, tiles, rows], -1 for no row.
    """
    unique_heads, tiles, size = members.shape
    cores = np.zeros((unique_heads, tiles, lists.num_full_ranges, 2), np.int32)
    loose = []
    for unique_head in range(unique_heads):
        ranges = lists.ranges[unique_head][members[unique_head]]  # [tiles, rows, ranges, 2]
        absent = members[unique_head] < 0
        cores[unique_head], rest = _cores(ranges[:, :, : lists.num_full_ranges], absent)
        loose.append(_margins(lists, rest, ranges[:, :, lists.num_full_ranges :], absent))
    distinct, which = np.unique(np.concatenate([kind for _, _, kind in loose]), axis=0, return_inverse=True)
    tile_masks = np.concatenate([np.full((1, size), WHOLE), np.full((1, size), NOTHING), distinct]).astype(np.int32)
    written = _written_out(
        loose, np.where((distinct == WHOLE).all(1), 0, np.arange(len(distinct)) + 2)[which.reshape(-1)]
    )
    return Tiles(members, _with_written_out(lists, cores, written), tile_masks)


def _cores(ranges: np.ndarray, absent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of every range that all rows share, int [tiles, ranges, 2], and the rest, [tiles, rows, ranges, 2, 2].

    Lists do not overlap in memory, so overlapping ranges are of one list.
    """
    low = np.where(absent[..., None], -1, ranges[..., 0]).max(1)
    high = np.where(absent[..., None], np.iinfo(np.int32).max, ranges[..., 1]).min(1)
    shared = (low < high) & ~absent.all(1)[:, None]
    core = np.where(shared[..., None], np.stack([low, high], -1), 0)
    start, stop = ranges[..., 0], ranges[..., 1]
    before = np.stack([start, np.where(shared[:, None], low[:, None], stop)], -1)
    after = np.stack([np.where(shared[:, None], high[:, None], stop), stop], -1)
    return core, np.where(absent[..., None, None, None], 0, np.stack([before, after], -2))


def _margins(lists: BlockLists, rest: np.ndarray, partial: np.ndarray, absent: np.ndarray):
    """The blocks that not all rows of a tile read whole: tile, block, and the token mask of every row, by entry."""
    tiles, size = absent.shape
    partial = np.where(absent[..., None, None], 0, partial)
    ranges = np.concatenate([rest.reshape(tiles, size, -1, 2), partial], 2)
    labels = np.broadcast_to(np.arange(tiles * size).reshape(tiles, size, 1), ranges.shape[:3])
    label, position = expand(labels.reshape(-1), ranges[..., 0].reshape(-1), ranges[..., 1].reshape(-1))
    tile, row = label // size, label % size
    num_blocks = int(lists.blocks.max(initial=0)) + 1
    keys, entry = np.unique(tile * num_blocks + lists.blocks[position], return_inverse=True)
    row_masks = np.where(absent, WHOLE, NOTHING)[keys // num_blocks]
    row_masks[entry.reshape(-1), row] = lists.mask_ids[position]
    return keys // num_blocks, keys % num_blocks, row_masks


def _written_out(loose, ids: np.ndarray):
    """The entries of each unique head, with their mask ids."""
    ends = np.cumsum([len(tile) for tile, _, _ in loose])
    return [(tile, block, part) for (tile, block, _), part in zip(loose, np.split(ids, ends[:-1]), strict=True)]


def _with_written_out(lists: BlockLists, cores: np.ndarray, written) -> BlockLists:
    unique_heads, tiles = cores.shape[:2]
    blocks, mask_ids, offset = [lists.blocks], [np.zeros_like(lists.mask_ids)], len(lists.blocks)
    extra = np.zeros((2, unique_heads, tiles, 2), np.int32)
    for unique_head, (tile, block, ids) in enumerate(written):
        for kind, chosen in enumerate((ids == WHOLE, ids != WHOLE)):
            ends = np.searchsorted(tile[chosen], np.arange(tiles + 1))
            extra[kind, unique_head] = offset + np.stack([ends[:-1], ends[1:]], -1)
            blocks.append(block[chosen].astype(np.int32))
            mask_ids.append(ids[chosen].astype(np.int32))
            offset += chosen.sum()
    full, partial = extra[0][:, :, None], extra[1][:, :, None]
    if not (full[..., 1] > full[..., 0]).any():
        full = full[:, :, :0]
    offsets = np.append(lists.offsets, offset).astype(np.int32)
    ranges = np.concatenate([cores, full, partial], 2)
    return BlockLists(
        np.concatenate(blocks), np.concatenate(mask_ids), offsets, ranges, lists.num_full_ranges + full.shape[2]
    )


class QTiles(typing.NamedTuple):
    """Query tiles and the lists of blocks that they read.

    Attributes:
      blocks, mask_ids: int32 [entries], the lists.
      ranges: int32 [unique_heads, tiles, ranges, 2]; the first `num_full_ranges` hold full entries.
      seen: the keys of a block that each query of a tile sees, by mask id.
    """

    blocks: Int32[np.ndarray, " entries"]
    mask_ids: Int32[np.ndarray, " entries"]
    ranges: Int32[np.ndarray, "unique_heads tiles ranges 2"]
    num_full_ranges: int
    seen: Bool[np.ndarray, "masks queries keys"]


def make_q_tiles(schedule: BlockSchedule, block_q: int) -> QTiles:
    """Tiles of `block_q` consecutive queries; a last block with fewer keys than the others has masks of its own."""
    lists, size, last = schedule.lists, schedule.block_size, schedule.num_columns - 1
    tiles = merge(lists, group_consecutive_rows(lists.num_unique_heads, lists.num_rows, block_q // size))
    lists, tile_masks = tiles.lists, tiles.tile_masks
    blocks, mask_ids, ranges = lists.blocks, lists.mask_ids, lists.ranges.astype(np.int32)
    is_short = np.zeros(len(tile_masks), bool)
    if schedule.kv_length % size and len(blocks):
        # Lists ascend: only the last entry of a full range can be the last block.
        full = ranges[..., : lists.num_full_ranges, :].copy()
        ends = (full[..., 1] > full[..., 0]) & (blocks[np.maximum(full[..., 1] - 1, 0)] == last)
        full[..., 1] -= ends
        entry = len(blocks)
        one = np.where(ends.any(-1)[..., None], np.array([entry, entry + 1], np.int32), np.int32(0))[..., None, :]
        ranges = np.concatenate([full, ranges[..., lists.num_full_ranges :, :], one], -2).astype(np.int32)
        found, which = np.unique(mask_ids[blocks == last], return_inverse=True)
        mask_ids = mask_ids.copy()
        mask_ids[blocks == last] = len(tile_masks) + 1 + which
        mask_ids = np.append(mask_ids, len(tile_masks)).astype(np.int32)
        blocks = np.append(blocks, last).astype(np.int32)
        is_short = np.append(is_short, np.ones(len(found) + 1, bool))
        tile_masks = np.concatenate([tile_masks, np.full_like(tile_masks[:1], WHOLE), tile_masks[found]])
    seen = schedule.token_masks[tile_masks].reshape(len(tile_masks), -1, size)
    seen = seen & (~is_short[:, None, None] | (np.arange(size) < schedule.kv_length - last * size))
    return QTiles(blocks, mask_ids, ranges, lists.num_full_ranges, seen)


@dataclasses.dataclass(frozen=True, eq=False)
class KVTiles:
    """KV tiles and the lists of query rows that read them, in one pass for all heads of a group or one for each.

    Attributes:
      blocks, mask_ids: the lists, query rows and their masks.
      ranges: [groups, kv_tiles, head_passes, ranges, 2]; the first `num_full_ranges` hold full entries. The
        longest tiles come first.
      members: the key blocks of every KV tile; -1 for none.
      group_of: the unique group of every KV head.
      seen: the queries of a row that see each key of a KV tile, by mask id.
    """

    blocks: Int32[np.ndarray, " entries"]
    mask_ids: Int32[np.ndarray, " entries"]
    ranges: Int32[np.ndarray, "groups kv_tiles head_passes ranges 2"]
    members: Int32[np.ndarray, "groups kv_tiles blocks"]
    group_of: Int32[np.ndarray, " k"]
    seen: Bool[np.ndarray, "masks keys queries"]
    num_full_ranges: int


@functools.lru_cache(maxsize=64)
def make_kv_tiles(schedule: BlockSchedule, rows: int) -> KVTiles:
    """KV tiles of `rows` keys."""
    head_passes = 1 if schedule.shares_groups else schedule.num_heads // schedule.num_kv_heads
    heads = schedule.head_index.reshape(schedule.num_kv_heads, -1)[:, :head_passes]
    groups, group_of = np.unique(heads, axis=0, return_inverse=True)
    kv_tiles = _group_blocks(schedule.transposed, groups, rows // schedule.block_size)
    every = dataclasses.replace(schedule.transposed, ranges=schedule.transposed.ranges[groups.reshape(-1)])
    tiles = merge(every, np.repeat(kv_tiles, head_passes, 0))
    ranges = tiles.lists.ranges.reshape(len(groups), head_passes, *tiles.lists.ranges.shape[1:]).swapaxes(1, 2)
    order = np.argsort((ranges[..., 0] - ranges[..., 1]).sum((2, 3)), axis=-1, kind="stable")
    ranges = np.take_along_axis(ranges, order[:, :, None, None, None], 1)
    members = np.take_along_axis(kv_tiles, order[:, :, None], 1)
    seen = schedule.token_masks.swapaxes(1, 2)[tiles.tile_masks].reshape(len(tiles.tile_masks), rows, -1)
    lists = tiles.lists
    return KVTiles(lists.blocks, lists.mask_ids, ranges, members, group_of, seen, lists.num_full_ranges)


def _group_blocks(lists: BlockLists, groups: np.ndarray, size: int) -> np.ndarray:
    """Blocks of keys that the heads of a group read alike: int32 [groups, kv_tiles, size].

    Every block is in a KV tile, unread ones too: their gradients are zero.

    Args:
      groups: int [groups, head_passes], unique heads.
    """
    full, partial = (
        np.concatenate([lists.ranges[groups[:, each]][:, :, parts] for each in range(groups.shape[1])], 2)
        for parts in (slice(0, lists.num_full_ranges), slice(lists.num_full_ranges, None))
    )
    of_groups = dataclasses.replace(lists, ranges=np.concatenate([full, partial], 2), num_full_ranges=full.shape[2])
    kv_tiles = []
    for read in group_similar_rows(of_groups, size):
        idle = np.setdiff1d(np.arange(lists.num_rows), read)
        idle = np.append(idle, np.full(-len(idle) % size, -1)).reshape(-1, size)
        kv_tiles.append(np.concatenate([read[(read >= 0).any(-1)], idle]))
    found = np.full((len(kv_tiles), max(map(len, kv_tiles)), size), -1, np.int32)
    for group, each in enumerate(kv_tiles):
        found[group, : len(each)] = each
    return found


def transpose_selection(
    selection: BlockSelection, num_blocks: int, kv_tiles: int, size: int
) -> tuple[Array, Array, Array]:
    """The rows that read each KV tile of consecutive blocks.

    Returns:
      int32 [entries], rows; int32 [entries], one bit for each block of the tile that the row reads; and int32
      [b|1, h|k|1, kv_tiles + 1], where the rows of every KV tile begin, and those of the last one end.
    """
    batch, heads, rows, most = selection.kv_blocks.shape
    used = jnp.arange(most, dtype=jnp.int32) < selection.counts[..., None]
    used &= (selection.kv_blocks >= 0) & (selection.kv_blocks < num_blocks)
    block = jnp.where(used, selection.kv_blocks, kv_tiles * size)
    row = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], block.shape)
    kv_tile, row, place = sort_entries(
        *(each.reshape(batch * heads, -1) for each in (block // size, row, block % size)), (kv_tiles + 1, rows, size)
    )
    again = _as_before(kv_tile) & _as_before(row)
    # Blocks of a row are distinct; one that is not counts once.
    bit = jnp.where((kv_tile == kv_tiles) | (again & _as_before(place)), 0, jnp.int32(1) << place)
    entry = jnp.cumsum(~again, 1, dtype=jnp.int32) - 1

    def merged(entry, kv_tile, row, bit):
        ends = jnp.searchsorted(
            jnp.full_like(kv_tile, kv_tiles).at[entry].set(kv_tile), np.arange(kv_tiles + 1, dtype=np.int32)
        )
        return jnp.zeros_like(row).at[entry].set(row), jnp.zeros_like(bit).at[entry].add(bit), ends.astype(jnp.int32)

    row, bits, ends = jax.vmap(merged)(entry, kv_tile, row, bit)
    ends = ends + jnp.arange(batch * heads, dtype=jnp.int32)[:, None] * (rows * most)
    return row.reshape(-1), bits.reshape(-1), ends.reshape(batch, heads, -1)


def sort_entries(kv_tile: Array, row: Array, place: Array, most: tuple[int, int, int]) -> list[Array]:
    """All three, sorted along the last axis in this order; as one number, if the bounds `most` allow it."""
    if math.prod(most) > np.iinfo(np.int32).max:
        return list(jax.lax.sort([kv_tile, row, place], num_keys=3))
    _, rows, places = most
    number = jnp.sort((kv_tile * rows + row) * places + place, axis=-1)
    return [number // (rows * places), number // places % rows, number % places]


def _as_before(array: Array) -> Array:
    """True where an element equals the one before it along the last axis; False for the first."""
    return (array == jnp.roll(array, 1, -1)) & (np.arange(array.shape[-1]) > 0)
