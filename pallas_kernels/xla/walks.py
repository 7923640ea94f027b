"""What the XLA kernels walk: the schedule's tiles as arrays, for static schedules and for traced selections alike."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection
from pallas_kernels.tiling import Tiles, group_consecutive_rows, group_similar_rows, merge


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Walks:
    """Tiles of rows that walk lists of blocks, forward (rows are queries) or backward (rows are keys).

    Attributes:
      blocks: int32 [entries], the lists.
      mask_ids: int32 [entries], a row of `tile_masks` for each.
      ranges: int32 [b|1, walkers, tiles, ranges, 2]; the first `num_full_ranges` hold entries without a mask.
      tile_masks: int32 [masks, rows], the token mask of every row of a tile; None for traced selections.
      token_masks: bool [masks, block_size, block_size], query by key.
      members: int32 [unique_heads, tiles, rows], the rows of every tile, -1 for none; of backward walks only.
      places: int32 [unique_heads, rows], the place of a row among all tiles' rows, -1 for none; of backward walks only.
      num_full: see `slices`.
      longest: the most entries that a tile walks, without a mask and with one.
      per_step: how many of them are walked at a time.
    """

    blocks: Int32[Array | np.ndarray, " entries"]
    mask_ids: Int32[Array | np.ndarray, " entries"]
    ranges: Int32[Array | np.ndarray, "#b unique_heads tiles parts 2"]
    tile_masks: Int32[Array | np.ndarray, "masks rows"] | None
    token_masks: Bool[Array | np.ndarray, "mask_ids block_size block_size"] | None
    members: Int32[Array | np.ndarray, "unique_heads tiles rows"] | None
    places: Int32[Array | np.ndarray, "unique_heads columns"] | None
    num_full_ranges: int = dataclasses.field(metadata={"static": True})
    longest: tuple[int, int] = dataclasses.field(metadata={"static": True})
    per_step: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def rows_per_tile(self) -> int:
        """Selections are walked row by row, and their keys block by block."""
        return 1 if self.tile_masks is None else self.tile_masks.shape[1]


def along(count: int, ndim: int) -> Array:
    """0 to count - 1 along the last of so many axes."""
    return jnp.arange(count, dtype=jnp.int32).reshape(*[1] * (ndim - 1), count)


def unique_heads_per_kv_head(schedule: BlockSchedule) -> int:
    """1 where the query heads of a group walk as one, else as many as there are in a group."""
    return 1 if schedule.shares_groups else schedule.num_heads // schedule.num_kv_heads


@functools.lru_cache(maxsize=64)
def forward_walks(schedule: BlockSchedule, rows_per_tile: int, most: int) -> Walks:
    """Tiles of consecutive query blocks, for every walker of every KV head, `most` entries a step (numpy arrays)."""
    lists = schedule.lists
    tiles = merge(lists, group_consecutive_rows(lists.num_unique_heads, lists.num_rows, rows_per_tile))
    return _of_heads(schedule, tiles, most, members=None, places=None)


@functools.lru_cache(maxsize=64)
def backward_walks(schedule: BlockSchedule, rows_per_tile: int, most: int) -> Walks:
    """Packs of key blocks with like readers, for every walker of every KV head, `most` a step (numpy arrays)."""
    lists = schedule.transposed
    tiles = merge(lists, group_similar_rows(lists, rows_per_tile))
    places = np.full((lists.num_unique_heads, schedule.num_columns), -1, np.int32)
    unique_head, tile, row = np.nonzero(tiles.members >= 0)
    places[unique_head, tiles.members[unique_head, tile, row]] = tile * rows_per_tile + row
    return _of_heads(schedule, tiles, most, tiles.members, places)


def _of_heads(schedule: BlockSchedule, tiles: Tiles, most: int, members, places) -> Walks:
    heads = schedule.head_index[:: schedule.num_heads // schedule.num_kv_heads // unique_heads_per_kv_head(schedule)]
    counts = [np.bincount(each.reshape(-1), minlength=1) for each in np.moveaxis(tiles.lists.counts(), -1, 0)]
    full, partial = (len(tiles_by_length) - 1 for tiles_by_length in counts)
    per_step = [entries_per_step(each, most, schedule.block_size) for each in counts]
    return Walks(
        tiles.lists.blocks, tiles.lists.mask_ids, tiles.lists.ranges[heads][None], tiles.tile_masks,
        schedule.token_masks,
        None if members is None else members[heads], None if places is None else places[heads],
        tiles.lists.num_full_ranges, (full, partial), (per_step[0], per_step[1]),
    )  # fmt: skip


STEP_TOKENS = 32
"""What a step costs besides what it multiplies, in tokens of its entries."""


def entries_per_step(tiles_by_length: np.ndarray, most: int, block_size: int) -> int:
    """How many entries to walk at a time, at most so many, so that lists rounded up to whole steps cost the least.

    Args:
      tiles_by_length: how many tiles walk no entry, one, two, ….
    """
    longest = len(tiles_by_length) - 1
    sizes = np.arange(1, max(1, min(most, longest)) + 1)
    steps = tiles_by_length @ -(-np.arange(longest + 1)[:, None] // sizes)
    return int(sizes[np.argmin(steps * (sizes * block_size + STEP_TOKENS))])


def entries(ranges: Int32[Array, "units parts 2"], first: Array, count: int) -> tuple[Array, Array]:
    """Positions in the lists of `count` entries of every unit from `first` on, and whether there is such an entry.

    A unit's parts are walked one after the other, as if they were one list.
    """
    lengths = jnp.maximum(ranges[..., 1] - ranges[..., 0], 0)
    ends = jnp.cumsum(lengths, -1, dtype=jnp.int32)
    entry = first + along(count, 2)
    part = (entry[:, :, None] >= ends[:, None, :]).sum(-1, dtype=jnp.int32)
    shifts = ranges[..., 0] - (ends - lengths)
    valid = entry < ends[:, -1:]
    part = jnp.minimum(part, ranges.shape[1] - 1)
    return jnp.where(valid, jnp.take_along_axis(shifts, part, 1) + entry, 0), valid


def selection_walks(selection: BlockSelection, num_kv_heads: int, per_step: int) -> Walks:
    """The lists of a traced selection, for every walker."""
    batch, heads, rows, most = selection.kv_blocks.shape
    first = jnp.arange(batch * heads * rows, dtype=jnp.int32).reshape(batch, heads, rows) * most
    ranges = jnp.stack([first, first + jnp.clip(selection.counts, 0, most)], -1)[:, :, :, None]
    ranges = jnp.broadcast_to(ranges, (batch, max(heads, num_kv_heads), rows, 1, 2))
    return _unmasked(selection.kv_blocks.reshape(-1), ranges, most, per_step)


def transposed_selection_walks(selection: BlockSelection, num_kv_heads: int, num_blocks: int, per_step: int) -> Walks:
    """Who reads each key block of a traced selection: one stable sort of its entries by head and block."""
    batch, heads, rows, most = selection.kv_blocks.shape
    blocks = selection.kv_blocks.reshape(batch * heads, rows * most)
    used = along(most, 4) < selection.counts[..., None]
    used = used.reshape(blocks.shape) & (blocks >= 0) & (blocks < num_blocks)
    readers = jnp.broadcast_to((jnp.arange(rows * most, dtype=jnp.int32) // most)[None], blocks.shape)
    blocks, readers = jax.lax.sort((jnp.where(used, blocks, num_blocks), readers), num_keys=1, is_stable=True)
    columns = jnp.arange(num_blocks + 1, dtype=jnp.int32)
    ends = jax.vmap(lambda each: jnp.searchsorted(each, columns))(blocks).astype(jnp.int32)
    ends = ends + jnp.arange(batch * heads, dtype=jnp.int32)[:, None] * (rows * most)
    ranges = jnp.stack([ends[:, :-1], ends[:, 1:]], -1).reshape(batch, heads, num_blocks, 1, 2)
    ranges = jnp.broadcast_to(ranges, (batch, max(heads, num_kv_heads), num_blocks, 1, 2))
    return _unmasked(readers.reshape(-1), ranges, rows if most else 0, per_step)


def _unmasked(blocks: Array, ranges: Array, longest: int, per_step: int) -> Walks:
    unique_heads, columns = ranges.shape[1:3]
    every = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), (unique_heads, columns))
    per_step = max(1, min(per_step, longest))
    return Walks(
        blocks, jnp.zeros_like(blocks), ranges, None, None, every[..., None], every, 0, (0, longest), (1, per_step)
    )  # fmt: skip
