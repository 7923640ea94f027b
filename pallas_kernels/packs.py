"""Packs: blocks of keys that are read by like queries, for the gradients of keys and values."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from pallas_kernels.schedule import BlockLists, BlockSchedule
from pallas_kernels.selection import BlockSelection
from pallas_kernels.tiles import alike, merge


@dataclasses.dataclass(frozen=True, eq=False)
class Packs:
    """Packs that walk lists of rows of queries, in one round for all heads of a group, or in one for each.

    Attributes:
      blocks, masks: the lists, rows of queries and the kinds of their masks.
      slices: [groups, packs, rounds, parts, 2]; the first `num_full` parts hold entries without a mask. The longest
        packs come first.
      members: the blocks of keys in every pack; -1 for none.
      group_of: which of the distinct groups every KV head has.
      seen: which queries of a row see each key of a pack, of every kind.
    """

    blocks: Int32[np.ndarray, " entries"]
    masks: Int32[np.ndarray, " entries"]
    slices: Int32[np.ndarray, "groups packs rounds parts 2"]
    members: Int32[np.ndarray, "groups packs blocks"]
    group_of: Int32[np.ndarray, " k"]
    seen: Bool[np.ndarray, "kinds keys queries"]
    num_full: int


@functools.lru_cache(maxsize=64)
def pack_keys(schedule: BlockSchedule, rows: int) -> Packs:
    """Packs of so many keys."""
    rounds = 1 if schedule.shares_groups else schedule.num_heads // schedule.num_kv_heads
    heads = schedule.head_index.reshape(schedule.num_kv_heads, -1)[:, :rounds]
    groups, group_of = np.unique(heads, axis=0, return_inverse=True)
    packs = _packs(schedule.transposed, groups, rows // schedule.block_size)
    every = dataclasses.replace(schedule.transposed, slices=schedule.transposed.slices[groups.reshape(-1)])
    tiles = merge(every, np.repeat(packs, rounds, 0))
    slices = tiles.lists.slices.reshape(len(groups), rounds, *tiles.lists.slices.shape[1:]).swapaxes(1, 2)
    order = np.argsort((slices[..., 0] - slices[..., 1]).sum((2, 3)), axis=-1, kind="stable")
    slices = np.take_along_axis(slices, order[:, :, None, None, None], 1)
    members = np.take_along_axis(packs, order[:, :, None], 1)
    seen = schedule.token_masks.swapaxes(1, 2)[tiles.masks].reshape(len(tiles.masks), rows, -1)
    lists = tiles.lists
    return Packs(lists.blocks, lists.masks, slices, members, group_of, seen, lists.num_full)


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


def transpose_selection(
    selection: BlockSelection, num_blocks: int, packs: int, size: int
) -> tuple[Array, Array, Array]:
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
