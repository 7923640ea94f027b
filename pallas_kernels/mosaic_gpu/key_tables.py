"""What the kernel of the keys' gradients reads: packs of keys, and the lists of the queries that read them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic_gpu.plan import ROWS
from pallas_kernels.mosaic_gpu.tables import pack_bits
from pallas_kernels.problem import Operands
from pallas_kernels.schedule import BlockLists, BlockSchedule
from pallas_kernels.selection import BlockSelection
from pallas_kernels.tiles import alike, merge


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyTables:
    """Packs that walk lists of rows of queries, in one round for all heads of a group, or in one for each.

    Attributes:
      blocks: int32 [entries], the lists.
      masks: int32 [entries], the kind of mask of every entry.
      slices: int32 [b|1, k, packs, rounds, parts, 2]; the first `num_full` parts hold entries without a mask.
      words: int32 [kinds, words of a row, ROWS], the bits of the queries that see each key of a pack.
      members: int32 [k, packs, blocks of a pack], the blocks of keys in it; -1 for none.
    """

    blocks: Int32[Array | np.ndarray, " entries"]
    masks: Int32[Array | np.ndarray, " entries"]
    slices: Int32[Array | np.ndarray, "#b k packs rounds parts 2"]
    words: Int32[Array | np.ndarray, "kinds words rows"]
    members: Int32[Array | np.ndarray, "k packs blocks"]
    num_full: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyInputs:
    """The arrays that the kernel is called with.

    Attributes:
      query, dout: with the first query of a block in the first place, t rounded up.
      lse, delta: float32 [b, h, t], t rounded up to blocks; lse times log2(e), inf where there is no query.
      tables: those of the call, their slices by batch element where offsets or segments have narrowed them.
      first_row: which row of the lists the first block of queries is, where it is known at run time only.
      query_segments: int32 [b, t], t rounded up to blocks.
      kv_segments: int32 [b, k, packs, ROWS], of every row of a pack.
      query_positions: int32 [b, t], where masks do not say what comes after a query.
      kv_positions: int32 [packs, ROWS].
    """

    query: Float[Array, "b t h d"]
    dout: Float[Array, "b t h e"]
    key: Float[Array, "b s k d"]
    value: Float[Array, "b s k e"]
    lse: Float[Array, "b h t"]
    delta: Float[Array, "b h t"]
    tables: KeyTables
    first_row: Int32[Array, " b"] | None = None
    query_segments: Int32[Array, "b t"] | None = None
    kv_segments: Int32[Array, "b k packs rows"] | None = None
    query_positions: Int32[Array, "b t"] | None = None
    kv_positions: Int32[Array, "packs rows"] | None = None


@functools.lru_cache(maxsize=64)
def key_tables(schedule: BlockSchedule, width: int) -> KeyTables:
    """The tables of a schedule, in numpy.

    Args:
      width: bits of a word.
    """
    rounds = 1 if schedule.shares_groups else schedule.num_heads // schedule.num_kv_heads
    heads = schedule.head_index.reshape(schedule.num_kv_heads, -1)[:, :rounds]
    groups, group_of = np.unique(heads, axis=0, return_inverse=True)
    packs = _packs(schedule.transposed, groups, ROWS // schedule.block_size)
    every = dataclasses.replace(schedule.transposed, slices=schedule.transposed.slices[groups.reshape(-1)])
    tiles = merge(every, np.repeat(packs, rounds, 0))
    slices = tiles.lists.slices.reshape(len(groups), rounds, *tiles.lists.slices.shape[1:]).swapaxes(1, 2)
    # Blocks of threads start in the order of their numbers: the longest first.
    order = np.argsort((slices[..., 0] - slices[..., 1]).sum((2, 3)), axis=-1, kind="stable")
    slices = np.take_along_axis(slices, order[:, :, None, None, None], 1)
    members = np.take_along_axis(packs, order[:, :, None], 1)
    seen = schedule.token_masks.swapaxes(1, 2)[tiles.masks].reshape(len(tiles.masks), ROWS, -1)  # by keys, queries
    return KeyTables(
        tiles.lists.blocks, tiles.lists.masks, slices[group_of][None], pack_bits(seen, width), members[group_of],
        tiles.lists.num_full,
    )  # fmt: skip


def _packs(lists: BlockLists, groups: np.ndarray, size: int) -> np.ndarray:
    """Blocks of keys that the heads of a group read alike: int32 [groups, packs, size].

    Every block is in a pack, also those that nobody reads: their gradients are zero.

    Args:
      groups: int [groups, rounds], walkers.
    """
    full, partial = (
        np.concatenate([lists.slices[groups[:, each]][:, :, parts] for each in range(groups.shape[1])], 2)
        for parts in (slice(0, lists.num_full), slice(lists.num_full, None))
    )
    of_groups = dataclasses.replace(lists, slices=np.concatenate([full, partial], 2), num_full=full.shape[2])
    packs = []
    for read in alike(of_groups, size):
        idle = np.setdiff1d(np.arange(lists.num_rows), read)
        idle = np.append(idle, np.full(-len(idle) % size, -1)).reshape(-1, size)
        packs.append(np.concatenate([read[(read >= 0).any(-1)], idle]))
    found = np.full((len(packs), max(map(len, packs)), size), -1, np.int32)
    for group, each in enumerate(packs):
        found[group, : len(each)] = each
    return found


def selection_key_tables(selection: BlockSelection, operands: Operands, width: int) -> KeyTables:
    """The tables of a traced selection: its transpose, made by one sort of its entries by pack and row.

    A pack is of neighbours. Entries of its blocks in one row become one; its kind of mask says which blocks they were.

    Args:
      width: bits of a word.
    """
    size = ROWS // selection.block_size
    num_heads, (kv_length, num_kv_heads) = operands.query.shape[2], operands.key.shape[1:3]
    num_blocks = -(-kv_length // selection.block_size)
    packs = -(-num_blocks // size)
    blocks, bits, ends = _transposed(selection, num_blocks, packs, size)
    # Of every head of a round, where it has lists of its own.
    batch, heads = ends.shape[:2]
    rounds = num_heads // num_kv_heads if heads == num_heads else 1
    walker = np.arange(num_kv_heads * rounds) % heads  # one for all, or each its own
    slices = jnp.stack([ends[..., :-1], ends[..., 1:]], -1)[:, walker]
    slices = slices.reshape(batch, num_kv_heads, rounds, packs, 1, 2).swapaxes(2, 3)
    members = np.arange(packs * size, dtype=np.int32).reshape(packs, size)
    members = np.broadcast_to(np.where(members < num_blocks, members, -1), (num_kv_heads, packs, size))
    seen = np.arange(1 << size)[:, None] >> np.arange(ROWS) // selection.block_size & 1  # [kinds, rows]
    seen = np.concatenate([np.ones((1, ROWS), int), np.zeros((1, ROWS), int), seen])  # WHOLE and NOTHING first
    words = np.broadcast_to(np.where(seen, -1, 0)[:, None], (len(seen), selection.query_block // width, ROWS))
    return KeyTables(blocks, bits + 2, slices, words.astype(np.int32), members, 0)


def _transposed(selection: BlockSelection, num_blocks: int, packs: int, size: int) -> tuple[Array, Array, Array]:
    """The rows that read each pack.

    Returns:
      int32 [entries], rows; int32 [entries], which blocks of the pack they read, in bits; and where the rows of every
      pack begin, and those of the last one end, int32 [b|1, h|k|1, packs + 1].
    """
    batch, heads, rows, most = selection.kv_blocks.shape
    used = jnp.arange(most, dtype=jnp.int32) < selection.counts[..., None]
    used &= (selection.kv_blocks >= 0) & (selection.kv_blocks < num_blocks)
    block = jnp.where(used, selection.kv_blocks, packs * size)
    row = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], block.shape)
    pack, row, place = sort_entries(
        *(each.reshape(batch * heads, -1) for each in (block // size, row, block % size)), (packs + 1, rows, size)
    )
    again = _as_before(pack) & _as_before(row)
    # Blocks of a row are distinct; one that is not counts once.
    bit = jnp.where((pack == packs) | (again & _as_before(place)), 0, jnp.int32(1) << place)
    entry = jnp.cumsum(~again, 1, dtype=jnp.int32) - 1

    def merged(entry, pack, row, bit):
        ends = jnp.searchsorted(jnp.full_like(pack, packs).at[entry].set(pack), np.arange(packs + 1, dtype=np.int32))
        return jnp.zeros_like(row).at[entry].set(row), jnp.zeros_like(bit).at[entry].add(bit), ends.astype(jnp.int32)

    row, bits, ends = jax.vmap(merged)(entry, pack, row, bit)
    ends = ends + jnp.arange(batch * heads, dtype=jnp.int32)[:, None] * (rows * most)
    return row.reshape(-1), bits.reshape(-1), ends.reshape(batch, heads, -1)


def sort_entries(pack: Array, row: Array, place: Array, most: tuple[int, int, int]) -> list[Array]:
    """Sorted along the last axis by all three, which are below `most`; as one number, where they fit into one."""
    if math.prod(most) > np.iinfo(np.int32).max:
        return list(jax.lax.sort([pack, row, place], num_keys=3))
    _, rows, places = most
    number = jnp.sort((pack * rows + row) * places + place, axis=-1)
    return [number // (rows * places), number // places % rows, number % places]


def _as_before(array: Array) -> Array:
    """Whether each is what the one before it along the last axis is; the first is not."""
    return (array == jnp.roll(array, 1, -1)) & (np.arange(array.shape[-1]) > 0)
