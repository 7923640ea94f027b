"""Lists of entries in the scalar memory of a TPU, and the bits of their masks.

An entry is the number of a chunk, which one DMA copies, and the id of its mask. SMEM holds the list of one head at a
time, and the ranges of its tiles.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from pallas_kernels.kernel_tables import EMPTY, selected_blocks, selected_readers
from pallas_kernels.mosaic_tpu.config import LANES, KVGradConfig, TpuConfig
from pallas_kernels.problem import Operands
from pallas_kernels.schedule import BlockSchedule, expand
from pallas_kernels.tiling import WORD_BITS, make_kv_tiles, make_q_tiles

MAX_PADDED_BYTES = 128 << 10
"""SMEM for the lists of one head that are written out row by row; lists that rows share may be larger."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EntryLists:
    """Tiles and the entries that they read.

    Attributes:
      entries: int32 [lists, entries], each the number of a chunk and, `chunk_bits` higher, a mask id.
      list_ids: int32 [b|1, head tiles], the list of every head tile.
      ranges: int32 [b|1, head tiles, tiles, ranges, 2], positions in the entries of all lists, one after the other; the
        first `num_full_ranges` hold full entries. For KV tiles an axis of head passes is before the ranges.
      mask_bits: int32 [masks, words, columns], one bit for each row that sees a column of a chunk; chunks of fewer
        columns than lanes are repeated to fill them. None if positions or member bits say it.
      chunks_per_block: chunks in a block.
      padded_to_steps: True if each row's entries are contiguous and padded to whole steps with masked entries.
    """

    entries: Int32[Array | np.ndarray, "lists entries"]
    list_ids: Int32[Array | np.ndarray, "#b head_tiles"]
    ranges: Int32[Array | np.ndarray, "#b head_tiles tiles *passes ranges 2"]
    mask_bits: Int32[Array | np.ndarray, "masks words columns"] | None
    num_full_ranges: int = dataclasses.field(metadata={"static": True})
    chunk_bits: int = dataclasses.field(metadata={"static": True})
    chunks_per_block: int = dataclasses.field(metadata={"static": True})
    padded_to_steps: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def blocks(self) -> Int32[Array | np.ndarray, " entries"]:
        """The blocks of all entries, one list after the other."""
        return (self.entries.reshape(-1) & ((1 << self.chunk_bits) - 1)) // self.chunks_per_block

    @property
    def empty_mask_id(self) -> int:
        """The mask id of a chunk that is masked altogether."""
        return EMPTY if self.mask_bits is None else EMPTY * self.chunks_per_block

    @property
    def scalar_bytes(self) -> int:
        """Bytes of SMEM for one head."""
        *passes, ranges, _ = self.ranges.shape[2:]
        return 4 * (self.entries.shape[1] + int(np.prod(passes)) * (2 * ranges + 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVTables:
    """KV tiles and the query rows that they loop over.

    Attributes:
      queries: lists of query rows; without `mask_bits` an entry has one bit for each block of the KV tile.
      members: int32 [k, kv_tiles, blocks], the blocks of each KV tile, -1 for none.
    """

    queries: EntryLists
    members: Int32[Array | np.ndarray, "k kv_tiles blocks"]


class Lists(typing.NamedTuple):
    """Chunks, their mask ids, and the ranges of both that rows read, int [unique_heads, rows, ranges, 2]."""

    chunks: np.ndarray
    mask_ids: np.ndarray
    ranges: np.ndarray
    num_full_ranges: int


@functools.lru_cache(maxsize=64)
def q_tables(schedule: BlockSchedule, config: TpuConfig) -> EntryLists:
    """Lists of a schedule for query tiles (numpy arrays).

    Raises:
      NotImplementedError: mask ids do not fit beside chunk numbers.
    """
    tiles = make_q_tiles(schedule, config.block_q)
    lists = Lists(tiles.blocks, tiles.mask_ids, tiles.ranges, tiles.num_full_ranges)
    chunk_size = config.chunk_size(schedule.block_size)
    heads = schedule.head_index[:: config.heads_per_tile]
    return _entry_lists(lists, tiles.seen, schedule.num_columns, chunk_size, config.block_kv // chunk_size, heads)


@functools.lru_cache(maxsize=64)
def kv_tables(schedule: BlockSchedule, config: KVGradConfig) -> KVTables:
    """Lists of a schedule for KV tiles (numpy arrays); raises as `q_tables` does."""
    tiles = make_kv_tiles(schedule, config.block_kv)
    groups, num_tiles, passes = tiles.ranges.shape[:3]
    ranges = tiles.ranges.reshape(groups, num_tiles * passes, *tiles.ranges.shape[3:])
    lists, heads = Lists(tiles.blocks, tiles.mask_ids, ranges, tiles.num_full_ranges), tiles.group_of.reshape(-1)
    chunk_size = config.chunk_size(schedule.block_size)
    per_step = config.step_size // (chunk_size * config.heads_per_step)
    queries = _entry_lists(lists, tiles.seen, schedule.lists.num_rows, chunk_size, per_step, heads)
    ranges = queries.ranges.reshape(1, len(heads), num_tiles, passes, *queries.ranges.shape[3:])
    return KVTables(dataclasses.replace(queries, ranges=ranges), tiles.members[heads].astype(np.int32))


def _entry_lists(
    lists: Lists,
    seen: Bool[np.ndarray, "masks rows columns"],
    num_blocks: int,
    chunk_size: int,
    chunks_per_step: int,
    heads: np.ndarray,
) -> EntryLists:
    """Entries of lists of blocks.

    Args:
      seen: the columns of a block that each row sees, by mask id.
      heads: the unique head of every head tile.
    """
    masks, rows, size = seen.shape
    chunks = size // chunk_size
    seen = seen.reshape(masks, rows, chunks, chunk_size).swapaxes(1, 2).reshape(masks * chunks, rows, chunk_size)
    chunk_bits = _bits_of(num_blocks * chunks)
    lists = _in_chunks(lists, chunks)
    if lists.mask_ids.max(initial=0) >> (31 - chunk_bits):
        raise NotImplementedError(f"{lists.mask_ids.max() + 1} kinds of masks do not fit beside block numbers")
    lengths = np.maximum(lists.ranges[..., 1] - lists.ranges[..., 0], 0).sum(2, dtype=np.int64)
    padded_bytes = 4 * chunks_per_step * (-(-lengths // chunks_per_step)).sum(1).max(initial=0)
    padded_to_steps = bool(padded_bytes <= MAX_PADDED_BYTES)
    list_of = _shared
    if padded_to_steps:
        list_of = functools.partial(_padded_to_steps, chunks_per_step=chunks_per_step, empty_mask_id=EMPTY * chunks)
    entries, ranges = split_per_head(lists, list_of, chunk_bits, chunks_per_step)
    num_full_ranges = 1 if padded_to_steps else lists.num_full_ranges
    heads = heads.astype(np.int32)
    return EntryLists(
        entries, heads[None], ranges[heads][None], pack_rows(seen), num_full_ranges, chunk_bits, chunks, padded_to_steps
    )


def _bits_of(count: int) -> int:
    """The number of bits that numbers below `count` take."""
    return max(1, (count - 1).bit_length())


def _in_chunks(lists: Lists, chunks: int) -> Lists:
    """Lists of blocks as lists of chunks."""
    numbers, mask_ids = (
        (each.astype(np.int64)[:, None] * chunks + np.arange(chunks)).reshape(-1)
        for each in (lists.chunks, lists.mask_ids)
    )
    return Lists(numbers, mask_ids, lists.ranges * chunks, lists.num_full_ranges)


def split_per_head(
    lists: Lists, list_of: Callable[..., tuple[np.ndarray, np.ndarray]], chunk_bits: int, chunks_per_step: int
) -> tuple[np.ndarray, np.ndarray]:
    """A separate list for every unique head, int32 [unique_heads, entries], and the ranges in all of them.

    Every range is followed by a whole step of entries at least, as kernels read beyond its end.

    Args:
      list_of: `_padded_to_steps` or `_shared`.
    """
    found = [list_of(lists, each, chunk_bits) for each in lists.ranges]
    length = -(-(chunks_per_step + max(len(entries) for entries, _ in found)) // LANES) * LANES
    entries = np.stack([np.pad(each, (0, length - len(each))) for each, _ in found])
    first = np.arange(len(found)).reshape(-1, 1, 1, 1) * length
    return entries.astype(np.int32), (np.stack([each for _, each in found]) + first).astype(np.int32)


def _padded_to_steps(
    lists: Lists, ranges: np.ndarray, chunk_bits: int, chunks_per_step: int, empty_mask_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """A head's entries row by row in whole steps, and its ranges [rows, 2, 2] of that, full and partial.

    A kernel finds such an entry in few instructions, but they take more memory than lists that rows share.
    """
    rows, num_ranges = ranges.shape[:2]
    label, position = expand(np.arange(rows * num_ranges), ranges[..., 0].reshape(-1), ranges[..., 1].reshape(-1))
    column = 2 * (label // num_ranges) + (label % num_ranges >= lists.num_full_ranges)
    position = position[np.lexsort((lists.chunks[position], column))]
    counts = np.bincount(column, minlength=2 * rows).reshape(rows, 2)
    total = counts.sum(1)
    room, ends = -(-total // chunks_per_step) * chunks_per_step, np.cumsum(total)
    start = np.cumsum(room) - room
    last = lists.chunks[position[ends[total > 0] - 1]] | empty_mask_id << chunk_bits
    entries = np.repeat(last, room[total > 0])
    entries[np.arange(len(position)) + np.repeat(start - (ends - total), total)] = (
        lists.chunks[position] | lists.mask_ids[position] << chunk_bits
    )
    edges = start[:, None] + np.stack([0 * total, counts[:, 0], total], 1)
    return entries, np.stack([edges[:, :2], edges[:, 1:]], -1)


def _shared(lists: Lists, ranges: np.ndarray, chunk_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """All entries that a head reads, in the order of the lists, and its ranges of that."""
    flat = ranges.reshape(-1, 2)
    used = np.zeros(len(lists.chunks) + 1, bool)
    used[expand(np.arange(len(flat)), flat[:, 0], flat[:, 1])[1]] = True
    # The number of entries kept before a position is its new position.
    moved, used = np.append(0, np.cumsum(used))[:-1][ranges], used[:-1]
    return lists.chunks[used] | lists.mask_ids[used] << chunk_bits, moved


def pack_rows(seen: Bool[np.ndarray, "masks rows columns"]) -> Int32[np.ndarray, "masks words lanes"]:
    """Rows packed into words of as many bits as there are rows, at most WORD_BITS."""
    masks, rows, columns = seen.shape
    width = min(rows, WORD_BITS)
    bits = np.pad(seen.reshape(masks, -1, width, columns), ((0, 0), (0, 0), (0, WORD_BITS - width), (0, 0)))
    packed = np.packbits(np.ascontiguousarray(bits.swapaxes(2, 3)), axis=-1, bitorder="little").view("<i4")[..., 0]
    return np.tile(packed, (1, 1, max(1, LANES // columns))).astype(np.int32)


def selection_q_tables(operands: Operands, config: TpuConfig) -> EntryLists:
    """Lists of a traced selection for query tiles: one for every head that has its own."""
    selected, size = selected_blocks(operands, config.block_q, config.heads_per_tile), operands.schedule.block_size
    chunks = size // config.chunk_size(size)
    chunk_bits = _bits_of(-(-operands.key.shape[1] // size) * chunks)
    batch, lists = selected.blocks.shape[:2]
    entries = _chunk_entries(selected.blocks, selected.mask_ids, chunks, chunk_bits).reshape(batch * lists, -1)
    entries = _pad_list(entries)
    ranges = chunks * selected.ranges + (selected.list_ids * entries.shape[1])[:, :, None, None]
    return EntryLists(entries, selected.list_ids, ranges[:, :, :, None], None, 0, chunk_bits, chunks)


def selection_kv_tables(operands: Operands, config: KVGradConfig) -> KVTables:
    """Lists of a traced selection for KV tiles.

    There is one list for all heads, or one for each KV head, in which those of its query heads follow one another.
    """
    readers, query_block = selected_readers(operands, config.block_kv), operands.schedule.query_block
    chunks = query_block // config.chunk_size(query_block)
    chunk_bits = _bits_of(-(-operands.query.shape[1] // query_block) * chunks)
    batch, lists, passes = readers.ends.shape[0], readers.ends.shape[1] // readers.head_passes, readers.head_passes
    entries = _chunk_entries(readers.rows, readers.member_bits, chunks, chunk_bits).reshape(batch * lists, -1)
    length = entries.shape[1]
    entries = _pad_list(entries)
    list_ids = np.arange(batch * lists, dtype=np.int32).reshape(batch, lists)
    own_list = np.arange(len(readers.members)) % lists
    ends = chunks * readers.ends.reshape(batch, lists, passes, -1)
    ranges = jnp.stack([ends[..., :-1], ends[..., 1:]], -1)
    ranges = ranges + (list_ids * (entries.shape[1] - length))[..., None, None, None]
    ranges = ranges.swapaxes(2, 3)[:, own_list, :, :, None]
    queries = EntryLists(entries, list_ids[:, own_list], ranges, None, 0, chunk_bits, chunks)
    return KVTables(queries, readers.members)


def _chunk_entries(blocks: Array, mask_ids: Array, chunks: int, chunk_bits: int) -> Int32[Array, "*shape chunks"]:
    """The entries of every chunk of blocks, all with the block's mask id."""
    numbers = blocks[..., None] * chunks + jnp.arange(chunks, dtype=jnp.int32)
    return (numbers | mask_ids[..., None] << chunk_bits).astype(jnp.int32)


def _pad_list(entries: Array) -> Array:
    """Lists padded to whole lanes, with at least one entry more: a row without entries has a position, too."""
    return jnp.pad(entries, ((0, 0), (0, LANES - entries.shape[1] % LANES)))
