"""What the kernel of the keys' gradients reads: packs of keys, and the lists of the queries that read them."""

import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic_gpu.plan import ROWS, WORD
from pallas_kernels.schedule import BlockLists, BlockSchedule
from pallas_kernels.tiles import alike, merge


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyTables:
    """Packs that walk lists of rows of queries.

    Attributes:
      blocks: int32 [entries], the lists.
      masks: int32 [entries], the kind of mask of every entry.
      slices: int32 [1, k, packs, parts, 2]; the first `num_full` parts hold entries without a mask.
      words: int32 [kinds, ⌈block_size / WORD⌉, ROWS], the bits of the queries that see each key of a pack.
      members: int32 [k, packs, blocks of a pack], the blocks of keys in it; -1 for none.
    """

    blocks: Int32[np.ndarray, " entries"]
    masks: Int32[np.ndarray, " entries"]
    slices: Int32[np.ndarray, "1 k packs parts 2"]
    words: Int32[np.ndarray, "kinds words rows"]
    members: Int32[np.ndarray, "k packs blocks"]
    num_full: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyInputs:
    """The arrays that the kernel is called with.

    Attributes:
      query, dout: with the first query of a block in the first place, t rounded up.
      lse, delta: float32 [b, h, t], t rounded up to blocks; lse times log2(e), infinite where nothing is read.
      slices: see `KeyTables`; by batch element where offsets or segments have narrowed them.
      first_row: which row of the lists the first block of queries is, where it is known at run time only.
      query_segments: int32 [b, t], t rounded up to blocks.
      kv_segments: int32 [b, k, packs, ROWS], of every row of a pack.
    """

    query: Float[Array, "b t h d"]
    dout: Float[Array, "b t h e"]
    key: Float[Array, "b s k d"]
    value: Float[Array, "b s k e"]
    lse: Float[Array, "b h t"]
    delta: Float[Array, "b h t"]
    blocks: Int32[Array, " entries"]
    masks: Int32[Array, " entries"]
    slices: Int32[Array, "#b k packs parts 2"]
    words: Int32[Array, "kinds words rows"]
    members: Int32[Array, "k packs blocks"]
    first_row: Int32[Array, " b"] | None = None
    query_segments: Int32[Array, "b t"] | None = None
    kv_segments: Int32[Array, "b k packs rows"] | None = None


@functools.lru_cache(maxsize=64)
def key_tables(schedule: BlockSchedule) -> KeyTables:
    """The tables of a schedule whose groups read alike, in numpy."""
    lists = schedule.transposed
    tiles = merge(lists, _packs(lists, ROWS // schedule.block_size))
    # Blocks of threads start in the order of their numbers: the longest first.
    order = np.argsort(-tiles.lists.counts().sum(-1), axis=-1, kind="stable")
    slices = np.take_along_axis(tiles.lists.slices, order[:, :, None, None], 1)
    members = np.take_along_axis(tiles.members, order[:, :, None], 1)
    heads = schedule.head_index[:: schedule.num_heads // schedule.num_kv_heads]
    return KeyTables(
        tiles.lists.blocks, tiles.lists.masks, slices[heads][None], _words(schedule, tiles.masks), members[heads],
        tiles.lists.num_full,
    )  # fmt: skip


def _packs(lists: BlockLists, size: int) -> np.ndarray:
    """Every block of keys in a pack, also those that nobody reads: their gradients are zero."""
    read = alike(lists, size)
    packs = []
    for walker in range(lists.num_walkers):
        idle = np.setdiff1d(np.arange(lists.num_rows), read[walker])
        idle = np.append(idle, np.full(-len(idle) % size, -1)).reshape(-1, size)
        packs.append(np.concatenate([read[walker][(read[walker] >= 0).any(-1)], idle]))
    found = np.full((len(packs), max(map(len, packs)), size), -1, np.int32)
    for walker, each in enumerate(packs):
        found[walker, : len(each)] = each
    return found


def _words(schedule: BlockSchedule, kinds: np.ndarray) -> np.ndarray:
    """int32 [kinds, words, ROWS]."""
    size = schedule.block_size
    bits = schedule.token_masks.swapaxes(1, 2)[kinds].reshape(len(kinds), ROWS, size)  # [kinds, keys, queries]
    bits = np.pad(bits, ((0, 0), (0, 0), (0, -size % WORD)))
    packed = np.packbits(bits, axis=-1, bitorder="little").view("<i4")
    return np.ascontiguousarray(packed.swapaxes(1, 2)).astype(np.int32)
