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
