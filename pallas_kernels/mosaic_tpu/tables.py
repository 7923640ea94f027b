"""What the TPU kernels walk: lists and slices in scalar memory, and the bits of masks.

Scalar memory holds the list of one head at a time, and the slices of its tiles.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from pallas_kernels.mosaic_tpu.tiles import LANES, TpuTiles
from pallas_kernels.packs import pack_keys, transpose_selection
from pallas_kernels.problem import Operands
from pallas_kernels.schedule import NOTHING, WHOLE, BlockSchedule, expand
from pallas_kernels.selection import BlockSelection
from pallas_kernels.tiles import merge, neighbours, seen_by_kind, without_missing_keys

WORD = 32
EMPTY = NOTHING
"""The kind of mask of a slot that holds no entry."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tables:
    """Tiles of rows that walk lists of blocks.

    Attributes:
      entries: int32 [lists, entries], each a block and, `block_bits` higher, the kind of its mask.
      lists: int32 [b|1, heads], the list of every head of tiles.
      slices: int32 [b|1, heads, tiles, parts, 2], positions in the entries of all lists, one after the other; the
        first `num_full` parts hold entries without a mask.
      words: int32 [kinds, words, keys], the bits of the rows that see each key of a block; blocks of fewer keys than
        there are lanes come as often as fit. None where positions say it.
    """

    entries: Int32[Array | np.ndarray, "lists entries"]
    lists: Int32[Array | np.ndarray, "#b heads"]
    slices: Int32[Array | np.ndarray, "#b heads tiles parts 2"]
    words: Int32[Array | np.ndarray, "kinds words keys"] | None
    num_full: int = dataclasses.field(metadata={"static": True})
    block_bits: int = dataclasses.field(metadata={"static": True})

    @property
    def blocks(self) -> Array:
        """Of all entries, one list after the other."""
        return jnp.asarray(self.entries).reshape(-1) & ((1 << self.block_bits) - 1)

    @property
    def scalar_bytes(self) -> int:
        """What scalar memory holds for one head."""
        return 4 * (self.entries.shape[1] + int(np.prod(self.slices.shape[2:])))


def bits_of(blocks: int) -> int:
    return max(1, (blocks - 1).bit_length())


@functools.lru_cache(maxsize=64)
def schedule_tables(schedule: BlockSchedule, tiles: TpuTiles) -> Tables:
    """The tables of a schedule, in numpy."""
    lists, size = schedule.lists, schedule.block_size
    merged = merge(lists, neighbours(lists.num_walkers, lists.num_rows, tiles.queries // size))
    blocks, masks, slices, kinds, short = without_missing_keys(schedule, merged)
    entries, slices = apart(blocks, masks, slices, bits_of(schedule.num_columns))
    words = pack_rows(seen_by_kind(schedule, kinds, short))
    heads = schedule.head_index[:: tiles.heads]
    return Tables(
        entries, heads[None].astype(np.int32), slices[heads][None], words, merged.lists.num_full,
        bits_of(schedule.num_columns),
    )  # fmt: skip


def apart(blocks: np.ndarray, masks: np.ndarray, slices: np.ndarray, block_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A list of its own for every walker, of the entries that it reads: [walkers, entries], and the slices in them.

    Args:
      slices: int [walkers, ..., 2].
    """
    if masks.max(initial=0) >> (31 - block_bits):
        raise NotImplementedError(f"{masks.max() + 1} kinds of masks do not fit beside block numbers")
    packed = blocks | masks << block_bits
    mine, moved = [], []
    for each in slices:
        flat = each.reshape(-1, 2)
        used = np.zeros(len(blocks) + 1, bool)
        used[expand(np.arange(len(flat)), flat[:, 0], flat[:, 1])[1]] = True
        # How many are kept before each position: where it comes to stand.
        before = np.append(0, np.cumsum(used))[:-1]
        mine.append(packed[used[:-1]])
        moved.append(before[each])
    length = -(-max(1, *map(len, mine)) // LANES) * LANES
    entries = np.stack([np.pad(each, (0, length - len(each))) for each in mine]).astype(np.int32)
    first = np.arange(len(mine)).reshape(-1, *[1] * (slices.ndim - 1)) * length
    return entries, (np.stack(moved) + first).astype(np.int32)


def pack_rows(seen: np.ndarray) -> Int32[np.ndarray, "kinds words keys"]:
    """bool [kinds, rows, keys] as bits of rows, so many in a word as there are, at most WORD."""
    kinds, rows, keys = seen.shape
    width = min(rows, WORD)
    bits = np.pad(seen.reshape(kinds, -1, width, keys), ((0, 0), (0, 0), (0, WORD - width), (0, 0)))
    packed = np.packbits(np.ascontiguousarray(bits.swapaxes(2, 3)), axis=-1, bitorder="little").view("<i4")[..., 0]
    return np.tile(packed, (1, 1, max(1, LANES // keys))).astype(np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyTables:
    """Packs of keys that walk lists of rows of queries.

    Attributes:
      walked: `slices` is [b|1, k, packs · rounds, parts, 2]; `words` are bits of keys, or None where every entry has a
        bit for each block of the pack.
      members: int32 [k, packs, blocks of a pack], the blocks of keys in it; -1 for none.
    """

    walked: Tables
    members: Int32[Array | np.ndarray, "k packs blocks"]


@functools.lru_cache(maxsize=64)
def key_tables(schedule: BlockSchedule, rows: int) -> KeyTables:
    """Those of a schedule, in numpy, for packs of so many keys."""
    packs = pack_keys(schedule, rows)
    num_rows = schedule.lists.num_rows
    groups, num_packs, rounds = packs.slices.shape[:3]
    slices = packs.slices.reshape(groups, num_packs * rounds, *packs.slices.shape[3:])
    entries, slices = apart(packs.blocks, packs.masks, slices, bits_of(num_rows))
    walked = Tables(
        entries, packs.group_of.reshape(1, -1).astype(np.int32), slices[packs.group_of][None], pack_rows(packs.seen),
        packs.num_full, bits_of(num_rows),
    )  # fmt: skip
    return KeyTables(walked, packs.members[packs.group_of].astype(np.int32))


def selection_key_tables(operands: Operands, selection: BlockSelection, rows: int) -> KeyTables:
    """Those of a traced selection: its transpose, made by one sort of its entries by pack and row."""
    size = rows // selection.block_size
    num_heads, (kv_length, num_kv_heads) = operands.query.shape[2], operands.key.shape[1:3]
    num_blocks = -(-kv_length // selection.block_size)
    packs, block_bits = -(-num_blocks // size), bits_of(selection.kv_blocks.shape[2])
    row, members, ends = transpose_selection(selection, num_blocks, packs, size)
    batch, heads = ends.shape[:2]
    # One list for all heads, or one for each KV head, in which those of its query heads follow one another.
    rounds = num_heads // num_kv_heads if heads == num_heads else 1
    lists = heads // rounds
    entries = (row | members << block_bits).reshape(batch * lists, -1)
    length = entries.shape[1]
    entries = jnp.pad(entries, ((0, 0), (0, -length % LANES)))
    number, mine = np.arange(batch * lists, dtype=np.int32).reshape(batch, lists), np.arange(num_kv_heads) % lists
    slices = jnp.stack([ends[..., :-1], ends[..., 1:]], -1).reshape(batch, lists, rounds, packs, 2)
    slices = slices + (number * (entries.shape[1] - length))[..., None, None, None]
    slices = slices.swapaxes(2, 3).reshape(batch, lists, packs * rounds, 1, 2)[:, mine]
    blocks = np.arange(packs * size, dtype=np.int32).reshape(packs, size)
    blocks = np.broadcast_to(np.where(blocks < num_blocks, blocks, -1), (num_kv_heads, packs, size))
    return KeyTables(Tables(entries, number[:, mine], slices, None, 0, block_bits), blocks)


def selection_tables(operands: Operands, selection: BlockSelection, tiles: TpuTiles) -> Tables:
    """The tables of a traced selection: a list for every head, a slice of it for every row of queries."""
    batch, heads, rows, most = selection.kv_blocks.shape
    num_blocks = -(-operands.key.shape[1] // selection.block_size)
    inside = (selection.kv_blocks >= 0) & (selection.kv_blocks < num_blocks)
    block_bits = bits_of(num_blocks)
    entries = jnp.where(inside, selection.kv_blocks, 0) | jnp.where(inside, WHOLE, EMPTY) << block_bits
    entries = entries.astype(jnp.int32).reshape(batch * heads, rows * most)
    entries = jnp.pad(entries, ((0, 0), (0, -entries.shape[1] % LANES)))
    num_heads, length = operands.query.shape[2], operands.query.shape[1]
    head = np.arange(0, num_heads, tiles.heads, dtype=np.int32) * heads // num_heads
    lists = np.arange(batch, dtype=np.int32)[:, None] * heads + head
    first = jnp.arange(rows, dtype=jnp.int32) * most
    slices = jnp.stack(jnp.broadcast_arrays(first, first + jnp.clip(selection.counts, 0, most)), -1)
    row = np.arange(-(-length // tiles.queries)) * tiles.queries // selection.query_block
    slices = slices[:, head][:, :, row] + lists[:, :, None, None] * entries.shape[1]
    return Tables(entries, lists, slices[:, :, :, None], None, 0, block_bits)
