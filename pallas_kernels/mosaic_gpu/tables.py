"""What the Hopper kernels read besides queries, keys and values: lists, bits of masks, segments and positions."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.mosaic_gpu.sm90.config import ROWS, WORD_BITS, HopperConfig
from pallas_kernels.problem import Operands
from pallas_kernels.schedule import NOTHING, WHOLE, BlockSchedule
from pallas_kernels.tiling import group_consecutive_rows, merge, seen_by_mask, without_missing_keys

EMPTY = NOTHING
"""The mask of a slot that holds no entry."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tables:
    """Tiles of rows that walk lists of blocks.

    Attributes:
      blocks: int32 [entries], the lists.
      mask_ids: int32 [entries], the mask of every entry: 0 masks nothing, EMPTY everything.
      ranges: int32 [b|1, h / heads of a tile, tiles, ranges, 2]; the first `num_full_ranges` hold full entries.
      mask_bits: int32 [masks, words of a block, ROWS], the bits of the keys that each row of a tile sees; None where
        positions say it.
    """

    blocks: Int32[Array | np.ndarray, " entries"]
    mask_ids: Int32[Array | np.ndarray, " entries"]
    ranges: Int32[Array | np.ndarray, "#b heads tiles parts 2"]
    mask_bits: Int32[Array | np.ndarray, "masks mask_bits rows"] | None
    num_full_ranges: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardTables:
    """What a call needs to know of its schedule.

    Attributes:
      walked: by its tiles.
      unread: bool [k, s], keys that nobody reads in blocks that are loaded; None where there are none.
      walks: XLA's tables, where it takes more than the schedule to know what is read; else None.
    """

    walked: Tables
    unread: Bool[Array | np.ndarray, "k s"] | None
    walks: typing.Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays that a kernel is called with; what is absent is None.

    Attributes:
      blocks, mask_ids, ranges, mask_bits: see `Tables`.
      query_segments, query_positions: int32 [b, tiles, ROWS], of every row of a tile.
      kv_segments: int32 [b, s], s rounded up to blocks.
      kv_positions: int32 [s + block_size], s rounded up to blocks; the greatest int32 where there is no key.
      sinks: float32 [h / heads of a tile, ROWS], of every row.
      dout: of the backward pass.
      lse, delta: float32 [b, h / heads of a tile, tiles, ROWS], of every row; lse times log2(e), inf where there is no
        query.
    """

    query: Float[Array, "b t h d"]
    key: Float[Array, "b s k d"]
    value: Float[Array, "b s k e"]
    blocks: Int32[Array, " entries"]
    mask_ids: Int32[Array, " entries"]
    ranges: Int32[Array, "#b heads tiles parts 2"]
    mask_bits: Int32[Array, "masks mask_bits rows"] | None = None
    query_segments: Int32[Array, "b tiles rows"] | None = None
    kv_segments: Int32[Array, "b s"] | None = None
    query_positions: Int32[Array, "b tiles rows"] | None = None
    kv_positions: Int32[Array, " s"] | None = None
    sinks: Float[Array, "heads rows"] | None = None
    dout: Float[Array, "b t h e"] | None = None
    lse: Float[Array, "b heads tiles rows"] | None = None
    delta: Float[Array, "b heads tiles rows"] | None = None

    @property
    def num_mask_arrays(self) -> int:
        """How many arrays say what a masked step may see, each copied once for every slot."""
        return sum(array is not None for array in (self.mask_bits, self.kv_segments, self.kv_positions))


@functools.lru_cache(maxsize=64)
def schedule_tables(schedule: BlockSchedule, queries: int, width: int) -> Tables:
    """The tables of a schedule for tiles of `queries` tokens, in numpy.

    Args:
      width: bits of a word.
    """
    lists, size = schedule.lists, schedule.block_size
    tiles = merge(lists, group_consecutive_rows(lists.num_unique_heads, lists.num_rows, queries // size))
    blocks, mask_ids, ranges, tile_masks, short = without_missing_keys(schedule, tiles)
    heads = schedule.head_index[:: ROWS // queries]
    seen = seen_by_mask(schedule, tile_masks, short)
    mask_bits = pack_bits(np.tile(seen, (1, ROWS // seen.shape[1], 1)), width)
    return Tables(blocks, mask_ids, ranges[heads][None], mask_bits, tiles.lists.num_full_ranges)


def pack_bits(seen: Bool[np.ndarray, "masks rows columns"], width: int) -> Int32[np.ndarray, "masks mask_bits rows"]:
    """Bits of columns in words of `width` of them."""
    bits = seen.reshape(*seen.shape[:2], -1, width)
    bits = np.pad(bits, ((0, 0), (0, 0), (0, 0), (0, WORD_BITS - width)))
    packed = np.packbits(bits, axis=-1, bitorder="little").view("<i4")[..., 0]
    return np.ascontiguousarray(packed.swapaxes(1, 2)).astype(np.int32)


def selection_tables(operands: Operands, config: HopperConfig) -> Tables:
    """The tables of a traced selection: a list for every row of queries, all of it with masks."""
    selection = operands.selection
    assert selection is not None
    batch, heads, rows, most = selection.kv_blocks.shape
    num_blocks = -(-operands.key.shape[1] // selection.block_size)
    inside = (selection.kv_blocks >= 0) & (selection.kv_blocks < num_blocks)
    blocks, mask_ids = jnp.where(inside, selection.kv_blocks, 0), jnp.where(inside, WHOLE, EMPTY)
    first = jnp.arange(batch * heads * rows, dtype=jnp.int32).reshape(batch, heads, rows) * most
    ranges = jnp.stack([first, first + jnp.clip(selection.counts, 0, most)], -1)
    num_heads, length = operands.query.shape[2], operands.query.shape[1]
    head = jnp.arange(0, num_heads, config.heads_per_tile) * heads // num_heads
    row = jnp.arange(-(-length // config.block_q)) * config.block_q // selection.query_block
    ranges = ranges[:, head][:, :, row][:, :, :, None]
    return Tables(blocks.reshape(-1), mask_ids.reshape(-1).astype(jnp.int32), ranges, None, 0)
