"""What the kernel of the keys' gradients reads: packs of keys, and the lists of the queries that read them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic_gpu.sm90.config import ROWS
from pallas_kernels.mosaic_gpu.tables import pack_bits
from pallas_kernels.problem import Operands
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection
from pallas_kernels.tiling import make_kv_tiles, transpose_selection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVTables:
    """Packs that walk lists of rows of queries, in one round for all heads of a group, or in one for each.

    Attributes:
      blocks: int32 [entries], the lists.
      mask_ids: int32 [entries], the mask of every entry.
      ranges: int32 [b|1, k, kv_tiles, head_passes, ranges, 2]; the first `num_full_ranges` hold entries without a mask.
      mask_bits: int32 [masks, words of a row, ROWS], the bits of the queries that see each key of a pack.
      members: int32 [k, kv_tiles, blocks of a pack], the blocks of keys in it; -1 for none.
    """

    blocks: Int32[Array | np.ndarray, " entries"]
    mask_ids: Int32[Array | np.ndarray, " entries"]
    ranges: Int32[Array | np.ndarray, "#b k kv_tiles head_passes parts 2"]
    mask_bits: Int32[Array | np.ndarray, "masks mask_bits rows"]
    members: Int32[Array | np.ndarray, "k kv_tiles blocks"]
    num_full_ranges: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVInputs:
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
    tables: KVTables
    first_row: Int32[Array, " b"] | None = None
    query_segments: Int32[Array, "b t"] | None = None
    kv_segments: Int32[Array, "b k kv_tiles rows"] | None = None
    query_positions: Int32[Array, "b t"] | None = None
    kv_positions: Int32[Array, "kv_tiles rows"] | None = None


@functools.lru_cache(maxsize=64)
def kv_tables(schedule: BlockSchedule, width: int) -> KVTables:
    """The tables of a schedule, in numpy.

    Args:
      width: bits of a word.
    """
    kv_tiles = make_kv_tiles(schedule, ROWS)
    return KVTables(
        kv_tiles.blocks, kv_tiles.mask_ids, kv_tiles.ranges[kv_tiles.group_of][None], pack_bits(kv_tiles.seen, width),
        kv_tiles.members[kv_tiles.group_of], kv_tiles.num_full_ranges,
    )  # fmt: skip


def selection_kv_tables(selection: BlockSelection, operands: Operands, width: int) -> KVTables:
    """The tables of a traced selection: its transpose, made by one sort of its entries by pack and row.

    A pack is of neighbours. Entries of its blocks in one row become one; its kind of mask says which blocks they were.

    Args:
      width: bits of a word.
    """
    size = ROWS // selection.block_size
    num_heads, (kv_length, num_kv_heads) = operands.query.shape[2], operands.key.shape[1:3]
    num_blocks = -(-kv_length // selection.block_size)
    kv_tiles = -(-num_blocks // size)
    blocks, bits, ends = transpose_selection(selection, num_blocks, kv_tiles, size)
    # Of every head of a round, where it has lists of its own.
    batch, heads = ends.shape[:2]
    head_passes = num_heads // num_kv_heads if heads == num_heads else 1
    unique_head = np.arange(num_kv_heads * head_passes) % heads  # one for all, or each its own
    ranges = jnp.stack([ends[..., :-1], ends[..., 1:]], -1)[:, unique_head]
    ranges = ranges.reshape(batch, num_kv_heads, head_passes, kv_tiles, 1, 2).swapaxes(2, 3)
    members = np.arange(kv_tiles * size, dtype=np.int32).reshape(kv_tiles, size)
    members = np.broadcast_to(np.where(members < num_blocks, members, -1), (num_kv_heads, kv_tiles, size))
    seen = np.arange(1 << size)[:, None] >> np.arange(ROWS) // selection.block_size & 1  # [masks, rows]
    seen = np.concatenate([np.ones((1, ROWS), int), np.zeros((1, ROWS), int), seen])  # WHOLE and NOTHING first
    mask_bits = np.broadcast_to(np.where(seen, -1, 0)[:, None], (len(seen), selection.query_block // width, ROWS))
    return KVTables(blocks, bits + 2, ranges, mask_bits.astype(np.int32), members, 0)
