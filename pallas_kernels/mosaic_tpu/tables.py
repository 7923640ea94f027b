"""What the TPU kernels walk: lists and slices in scalar memory, and the bits of masks.

Scalar memory holds the list of one head at a time, and the slices of its tiles.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from pallas_kernels.mosaic_tpu.config import LANES, KVGradConfig, TpuConfig
from pallas_kernels.problem import Operands
from pallas_kernels.schedule import NOTHING, WHOLE, BlockSchedule, expand
from pallas_kernels.selection import BlockSelection
from pallas_kernels.tiling import (
    WORD_BITS,
    group_consecutive_rows,
    make_kv_tiles,
    merge,
    seen_by_mask,
    transpose_selection,
    without_missing_keys,
)

EMPTY = NOTHING
"""The mask of a slot that holds no entry."""

OWN_BYTES = 128 << 10
"""Of scalar memory for lists in which every row has its own entries; where they share them, it may be more."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tables:
    """Tiles of rows that walk lists of blocks.

    Attributes:
      entries: int32 [lists, entries], each a piece of a block and, `piece_bits` higher, the kind of its mask.
      lists: int32 [b|1, heads], the list of every head of tiles.
      ranges: int32 [b|1, heads, tiles, ranges, 2], positions in the entries of all lists, one after the other; the
        first `num_full_ranges` parts hold entries without a mask.
      mask_bits: int32 [masks, words, keys], bits of the rows that see each key of a piece; pieces of fewer keys than
        there are lanes come as often as fit. None where positions say it.
      pieces: of a block, each brought by a copy of its own.
      in_steps: whether the entries of every row stand one after the other and fill whole steps, the last one with
        entries that are masked altogether and in no slice.
    """

    entries: Int32[Array | np.ndarray, "lists entries"]
    lists: Int32[Array | np.ndarray, "#b heads"]
    ranges: Int32[Array | np.ndarray, "#b heads tiles parts 2"]
    mask_bits: Int32[Array | np.ndarray, "masks mask_bits keys"] | None
    num_full_ranges: int = dataclasses.field(metadata={"static": True})
    piece_bits: int = dataclasses.field(metadata={"static": True})
    pieces: int = dataclasses.field(metadata={"static": True})
    in_steps: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def blocks(self) -> Array:
        """Of all entries, one list after the other."""
        return (jnp.asarray(self.entries).reshape(-1) & ((1 << self.piece_bits) - 1)) // self.pieces

    @property
    def nothing(self) -> int:
        """What stands above a piece that is masked altogether."""
        return EMPTY if self.mask_bits is None else EMPTY * self.pieces

    @property
    def scalar_bytes(self) -> int:
        """What scalar memory holds for one head."""
        rows, parts, _ = self.ranges.shape[2:]
        return 4 * (self.entries.shape[1] + rows * (2 * parts + 1))


def bits_of(pieces: int) -> int:
    return max(1, (pieces - 1).bit_length())


@functools.lru_cache(maxsize=64)
def schedule_tables(schedule: BlockSchedule, config: TpuConfig) -> Tables:
    """The tables of a schedule, in numpy."""
    lists, size = schedule.lists, schedule.block_size
    merged = merge(lists, group_consecutive_rows(lists.num_unique_heads, lists.num_rows, config.block_q // size))
    blocks, mask_ids, ranges, tile_masks, short = without_missing_keys(schedule, merged)
    lists = Lists(blocks, mask_ids, ranges, merged.lists.num_full_ranges)
    seen, heads = seen_by_mask(schedule, tile_masks, short), schedule.head_index[:: config.heads_per_tile]
    slot = config.chunk_size(size)
    return _tables(lists, seen, schedule.num_columns, slot, config.block_kv // slot, heads)


class Lists(typing.NamedTuple):
    """Blocks, their mask ids, and the ranges of both that rows read, int [unique_heads, rows, ranges, 2]."""

    blocks: np.ndarray
    mask_ids: np.ndarray
    ranges: np.ndarray
    num_full_ranges: int


def _tables(lists: Lists, seen: np.ndarray, num_blocks: int, slot: int, slots: int, heads: np.ndarray) -> Tables:
    """What a kernel walks by lists of blocks.

    Args:
      seen: bool [masks, rows, tokens of a block].
      slot, slots: tokens that one copy brings, and copies of a step.
      heads: the walker of every head.
    """
    masks, rows, size = seen.shape
    pieces = size // slot
    seen = seen.reshape(masks, rows, pieces, slot).swapaxes(1, 2).reshape(masks * pieces, rows, slot)
    bits = bits_of(num_blocks * pieces)
    lists = _in_pieces(lists, pieces)
    if lists.mask_ids.max(initial=0) >> (31 - bits):
        raise NotImplementedError(f"{lists.mask_ids.max() + 1} kinds of masks do not fit beside block numbers")
    lengths = np.maximum(lists.ranges[..., 1] - lists.ranges[..., 0], 0).sum(2, dtype=np.int64)
    in_steps = bool(4 * slots * (-(-lengths // slots)).sum(1).max(initial=0) <= OWN_BYTES)
    each = functools.partial(_in_steps, slots=slots, nothing=EMPTY * pieces) if in_steps else _shared
    entries, ranges = apart(lists, each, bits, slots)
    num_full_ranges = 1 if in_steps else lists.num_full_ranges
    heads = heads.astype(np.int32)
    return Tables(entries, heads[None], ranges[heads][None], pack_rows(seen), num_full_ranges, bits, pieces, in_steps)


def _in_pieces(lists: Lists, pieces: int) -> Lists:
    blocks, mask_ids = (
        (each.astype(np.int64)[:, None] * pieces + np.arange(pieces)).reshape(-1)
        for each in (lists.blocks, lists.mask_ids)
    )
    return Lists(blocks, mask_ids, lists.ranges * pieces, lists.num_full_ranges)


def apart(
    lists: Lists, list_of: typing.Callable[..., tuple[np.ndarray, np.ndarray]], piece_bits: int, slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """A list of its own for every walker, int32 [unique_heads, entries], and the slices in all of them.

    Args:
      list_of: `_in_steps` or `_shared`.
      slots: entries that there are at least after each place where a slice can begin.
    """
    found = [list_of(lists, each, piece_bits) for each in lists.ranges]
    length = -(-(slots + max(len(entries) for entries, _ in found)) // LANES) * LANES
    entries = np.stack([np.pad(each, (0, length - len(each))) for each, _ in found])
    first = np.arange(len(found)).reshape(-1, 1, 1, 1) * length
    return entries.astype(np.int32), (np.stack([each for _, each in found]) + first).astype(np.int32)


def _in_steps(
    lists: Lists, ranges: np.ndarray, piece_bits: int, slots: int, nothing: int
) -> tuple[np.ndarray, np.ndarray]:
    """A walker's entries row by row in whole steps, and slices [rows, 2, 2] of that, without a mask and with one.

    It takes few instructions to find an entry so, and more memory than what rows share.
    """
    rows, parts = ranges.shape[:2]
    part, position = expand(np.arange(rows * parts), ranges[..., 0].reshape(-1), ranges[..., 1].reshape(-1))
    column = 2 * (part // parts) + (part % parts >= lists.num_full_ranges)
    position = position[np.lexsort((lists.blocks[position], column))]
    counts = np.bincount(column, minlength=2 * rows).reshape(rows, 2)
    total = counts.sum(1)
    room, ends = -(-total // slots) * slots, np.cumsum(total)
    start = np.cumsum(room) - room
    last = lists.blocks[position[ends[total > 0] - 1]] | nothing << piece_bits
    entries = np.repeat(last, room[total > 0])
    entries[np.arange(len(position)) + np.repeat(start - (ends - total), total)] = (
        lists.blocks[position] | lists.mask_ids[position] << piece_bits
    )
    edges = start[:, None] + np.stack([0 * total, counts[:, 0], total], 1)
    return entries, np.stack([edges[:, :2], edges[:, 1:]], -1)


def _shared(lists: Lists, ranges: np.ndarray, piece_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """All entries that a walker reads, in the order of the lists, and its slices of that."""
    flat = ranges.reshape(-1, 2)
    used = np.zeros(len(lists.blocks) + 1, bool)
    used[expand(np.arange(len(flat)), flat[:, 0], flat[:, 1])[1]] = True
    # How many are kept before each position: where it comes to stand.
    moved, used = np.append(0, np.cumsum(used))[:-1][ranges], used[:-1]
    return lists.blocks[used] | lists.mask_ids[used] << piece_bits, moved


def pack_rows(seen: np.ndarray) -> Int32[np.ndarray, "masks mask_bits keys"]:
    """bool [masks, rows, keys] as bits of rows, so many in a word as there are, at most WORD."""
    masks, rows, keys = seen.shape
    width = min(rows, WORD_BITS)
    bits = np.pad(seen.reshape(masks, -1, width, keys), ((0, 0), (0, 0), (0, WORD_BITS - width), (0, 0)))
    packed = np.packbits(np.ascontiguousarray(bits.swapaxes(2, 3)), axis=-1, bitorder="little").view("<i4")[..., 0]
    return np.tile(packed, (1, 1, max(1, LANES // keys))).astype(np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVTables:
    """Packs of keys that walk lists of rows of queries.

    Attributes:
      walked: `slices` is [b|1, k, packs · rounds, ranges, 2]; `words` are bits of keys, or None where every entry has a
        bit for each block of the pack.
      members: int32 [k, kv_tiles, blocks of a pack], the blocks of keys in it; -1 for none.
    """

    walked: Tables
    members: Int32[Array | np.ndarray, "k kv_tiles blocks"]


@functools.lru_cache(maxsize=64)
def kv_tables(schedule: BlockSchedule, config: KVGradConfig) -> KVTables:
    """Those of a schedule, in numpy."""
    kv_tiles = make_kv_tiles(schedule, config.block_kv)
    groups, num_kv_tiles, head_passes = kv_tiles.ranges.shape[:3]
    ranges = kv_tiles.ranges.reshape(groups, num_kv_tiles * head_passes, *kv_tiles.ranges.shape[3:])
    lists, heads = (
        Lists(kv_tiles.blocks, kv_tiles.mask_ids, ranges, kv_tiles.num_full_ranges),
        kv_tiles.group_of.reshape(-1),
    )
    slot = config.chunk_size(schedule.block_size)
    walked = _tables(
        lists, kv_tiles.seen, schedule.lists.num_rows, slot, config.step_size // (slot * config.heads_per_step), heads
    )
    return KVTables(walked, kv_tiles.members[heads].astype(np.int32))


def selection_kv_tables(operands: Operands, selection: BlockSelection, config: KVGradConfig) -> KVTables:
    """Those of a traced selection: its transpose, made by one sort of its entries by pack and row."""
    size, pieces = (
        config.block_kv // selection.block_size,
        selection.query_block // config.chunk_size(selection.query_block),
    )
    num_heads, (kv_length, num_kv_heads) = operands.query.shape[2], operands.key.shape[1:3]
    num_blocks = -(-kv_length // selection.block_size)
    kv_tiles, bits = -(-num_blocks // size), bits_of(selection.kv_blocks.shape[2] * pieces)
    row, members, ends = transpose_selection(selection, num_blocks, kv_tiles, size)
    batch, heads = ends.shape[:2]
    # One list for all heads, or one for each KV head, in which those of its query heads follow one another.
    head_passes = num_heads // num_kv_heads if heads == num_heads else 1
    lists = heads // head_passes
    entries = _pieces_beside(row, members, pieces, bits).reshape(batch * lists, -1)
    length = entries.shape[1]
    entries = _with_place(entries)
    number, mine = np.arange(batch * lists, dtype=np.int32).reshape(batch, lists), np.arange(num_kv_heads) % lists
    ranges = pieces * jnp.stack([ends[..., :-1], ends[..., 1:]], -1).reshape(batch, lists, head_passes, kv_tiles, 2)
    ranges = ranges + (number * (entries.shape[1] - length))[..., None, None, None]
    ranges = ranges.swapaxes(2, 3).reshape(batch, lists, kv_tiles * head_passes, 1, 2)[:, mine]
    blocks = np.arange(kv_tiles * size, dtype=np.int32).reshape(kv_tiles, size)
    blocks = np.broadcast_to(np.where(blocks < num_blocks, blocks, -1), (num_kv_heads, kv_tiles, size))
    return KVTables(Tables(entries, number[:, mine], ranges, None, 0, bits, pieces), blocks)


def selection_tables(operands: Operands, selection: BlockSelection, config: TpuConfig) -> Tables:
    """The tables of a traced selection: a list for every head, a slice of it for every row of queries."""
    batch, heads, rows, most = selection.kv_blocks.shape
    num_blocks = -(-operands.key.shape[1] // selection.block_size)
    inside = (selection.kv_blocks >= 0) & (selection.kv_blocks < num_blocks)
    pieces = selection.block_size // config.chunk_size(selection.block_size)
    bits = bits_of(num_blocks * pieces)
    blocks, mask_ids = jnp.where(inside, selection.kv_blocks, 0), jnp.where(inside, WHOLE, EMPTY)
    entries = _with_place(_pieces_beside(blocks, mask_ids, pieces, bits).reshape(batch * heads, -1))
    num_heads, length = operands.query.shape[2], operands.query.shape[1]
    head = np.arange(0, num_heads, config.heads_per_tile, dtype=np.int32) * heads // num_heads
    lists = np.arange(batch, dtype=np.int32)[:, None] * heads + head
    first = jnp.arange(rows, dtype=jnp.int32) * most
    ranges = pieces * jnp.stack(jnp.broadcast_arrays(first, first + jnp.clip(selection.counts, 0, most)), -1)
    row = np.arange(-(-length // config.block_q)) * config.block_q // selection.query_block
    ranges = ranges[:, head][:, :, row] + lists[:, :, None, None] * entries.shape[1]
    return Tables(entries, lists, ranges[:, :, :, None], None, 0, bits, pieces)


def _pieces_beside(blocks: Array, above: Array, pieces: int, bits: int) -> Array:
    """Blocks piece by piece, with the same above every piece: int32 [..., pieces]."""
    piece = blocks[..., None] * pieces + jnp.arange(pieces, dtype=jnp.int32)
    return (piece | above[..., None] << bits).astype(jnp.int32)


def _with_place(entries: Array) -> Array:
    """Whole lanes, with at least one entry more: a row without entries has its place there, too."""
    return jnp.pad(entries, ((0, 0), (0, LANES - entries.shape[1] % LANES)))
