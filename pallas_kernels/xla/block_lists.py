"""Lists of blocks that the XLA passes loop over, for compiled schedules and traced selections alike.

A unit is one tile of one unique head of one batch element. Units of similar length are computed in chunks of bounded
memory; each chunk is a loop over its lists, some entries a step.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection
from pallas_kernels.tiling import Tiles, group_consecutive_rows, group_similar_rows, merge


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileLists:
    """Tiles of rows and the blocks that they read, forward (rows are queries) or backward (rows are keys).

    Attributes:
      blocks: int32 [entries], the lists.
      mask_ids: int32 [entries], the row of `tile_masks` of each entry.
      ranges: int32 [b|1, unique_heads, tiles, ranges, 2]; the first `num_full_ranges` hold full entries.
      tile_masks: int32 [masks, rows], the token mask of every row of a tile; None for traced selections.
      token_masks: bool [masks, block_size, block_size], query by key.
      members: int32 [unique_heads, tiles, rows], the rows of every tile, -1 for none; of backward lists only.
      places: int32 [unique_heads, rows], the place of a row among all tiles' rows, -1 for none; of backward lists only.
      longest: the most full and the most partial entries of a tile.
      per_step: full and partial entries in a step of the loop.
    """

    blocks: Int32[Array | np.ndarray, " entries"]
    mask_ids: Int32[Array | np.ndarray, " entries"]
    ranges: Int32[Array | np.ndarray, "#b unique_heads tiles ranges 2"]
    tile_masks: Int32[Array | np.ndarray, "masks rows"] | None
    token_masks: Bool[Array | np.ndarray, "token_masks block_size block_size"] | None
    members: Int32[Array | np.ndarray, "unique_heads tiles rows"] | None
    places: Int32[Array | np.ndarray, "unique_heads columns"] | None
    num_full_ranges: int = dataclasses.field(metadata={"static": True})
    longest: tuple[int, int] = dataclasses.field(metadata={"static": True})
    per_step: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def rows_per_tile(self) -> int:
        """Rows in a tile; selections are read row by row, and their keys block by block."""
        return 1 if self.tile_masks is None else self.tile_masks.shape[1]


def along(count: int, ndim: int) -> Array:
    """0 to count - 1 along the last of `ndim` axes."""
    return jnp.arange(count, dtype=jnp.int32).reshape(*[1] * (ndim - 1), count)


def unique_heads_per_kv_head(schedule: BlockSchedule) -> int:
    """1 if the query heads of every group read the same blocks, else the size of a group."""
    return 1 if schedule.shares_groups else schedule.num_heads // schedule.num_kv_heads


@functools.lru_cache(maxsize=64)
def forward_lists(schedule: BlockSchedule, rows_per_tile: int, most: int) -> TileLists:
    """Tiles of consecutive query blocks for every unique head, at most `most` entries a step (numpy arrays)."""
    lists = schedule.lists
    tiles = merge(lists, group_consecutive_rows(lists.num_unique_heads, lists.num_rows, rows_per_tile))
    return _of_heads(schedule, tiles, most, members=None, places=None)


@functools.lru_cache(maxsize=64)
def backward_lists(schedule: BlockSchedule, rows_per_tile: int, most: int) -> TileLists:
    """KV tiles for every unique head, at most `most` entries a step (numpy arrays)."""
    lists = schedule.transposed
    tiles = merge(lists, group_similar_rows(lists, rows_per_tile))
    places = np.full((lists.num_unique_heads, schedule.num_columns), -1, np.int32)
    unique_head, tile, row = np.nonzero(tiles.members >= 0)
    places[unique_head, tiles.members[unique_head, tile, row]] = tile * rows_per_tile + row
    return _of_heads(schedule, tiles, most, tiles.members, places)


def _of_heads(schedule: BlockSchedule, tiles: Tiles, most: int, members, places) -> TileLists:
    group = schedule.num_heads // schedule.num_kv_heads
    heads = schedule.head_index[:: group // unique_heads_per_kv_head(schedule)]
    counts = [np.bincount(each.reshape(-1), minlength=1) for each in np.moveaxis(tiles.lists.counts(), -1, 0)]
    full, partial = (len(tiles_by_length) - 1 for tiles_by_length in counts)
    per_step = [entries_per_step(each, most, schedule.block_size) for each in counts]
    return TileLists(
        tiles.lists.blocks, tiles.lists.mask_ids, tiles.lists.ranges[heads][None], tiles.tile_masks,
        schedule.token_masks, None if members is None else members[heads], None if places is None else places[heads],
        tiles.lists.num_full_ranges, (full, partial), (per_step[0], per_step[1]),
    )  # fmt: skip


STEP_TOKENS = 32
"""The cost of a step beside its products, in tokens of its entries."""


def entries_per_step(tiles_by_length: np.ndarray, most: int, block_size: int) -> int:
    """The number of entries a step, at most `most`, for which lists rounded up to whole steps cost the least.

    Args:
      tiles_by_length: numbers of tiles with no entry, with one, two, ….
    """
    longest = len(tiles_by_length) - 1
    sizes = np.arange(1, max(1, min(most, longest)) + 1)
    steps = tiles_by_length @ -(-np.arange(longest + 1)[:, None] // sizes)
    return int(sizes[np.argmin(steps * (sizes * block_size + STEP_TOKENS))])


def entries(ranges: Int32[Array, "units ranges 2"], first: Array, count: int) -> tuple[Array, Array]:
    """Positions in the lists of `count` entries of every unit from `first` on, and True where the entry exists.

    The ranges of a unit are read one after the other, like one list.
    """
    lengths = jnp.maximum(ranges[..., 1] - ranges[..., 0], 0)
    ends = jnp.cumsum(lengths, -1, dtype=jnp.int32)
    entry = first + along(count, 2)
    part = (entry[:, :, None] >= ends[:, None, :]).sum(-1, dtype=jnp.int32)
    shifts = ranges[..., 0] - (ends - lengths)
    valid = entry < ends[:, -1:]
    part = jnp.minimum(part, ranges.shape[1] - 1)
    return jnp.where(valid, jnp.take_along_axis(shifts, part, 1) + entry, 0), valid


def selection_lists(selection: BlockSelection, num_kv_heads: int, per_step: int) -> TileLists:
    """The lists of a traced selection, for every unique head."""
    batch, heads, rows, most = selection.kv_blocks.shape
    first = jnp.arange(batch * heads * rows, dtype=jnp.int32).reshape(batch, heads, rows) * most
    ranges = jnp.stack([first, first + jnp.clip(selection.counts, 0, most)], -1)[:, :, :, None]
    ranges = jnp.broadcast_to(ranges, (batch, max(heads, num_kv_heads), rows, 1, 2))
    return _unmasked(selection.kv_blocks.reshape(-1), ranges, most, per_step)


def transposed_selection_lists(
    selection: BlockSelection, num_kv_heads: int, num_blocks: int, per_step: int
) -> TileLists:
    """The readers of each key block of a traced selection, by one stable sort of its entries by head and block."""
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


def _unmasked(blocks: Array, ranges: Array, longest: int, per_step: int) -> TileLists:
    unique_heads, columns = ranges.shape[1:3]
    every = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), (unique_heads, columns))
    per_step = max(1, min(per_step, longest))
    return TileLists(
        blocks, jnp.zeros_like(blocks), ranges, None, None, every[..., None], every, 0, (0, longest), (1, per_step)
    )  # fmt: skip


class Step(typing.NamedTuple):
    """Some entries of every unit of a chunk.

    Attributes:
      blocks: int32 [units, entries].
      mask_ids: int32 [units, entries], rows of `TileLists.tile_masks`; None in a step of full entries.
      valid: bool [units, entries], False beyond a unit's last entry.
    """

    blocks: Int32[Array, "units entries"]
    mask_ids: Int32[Array, "units entries"] | None
    valid: Bool[Array, "units entries"]


def fold_lists(lists: TileLists, ranges: Int32[Array, "units ranges 2"], body, carry, *, bounded: bool):
    """Folds `body(carry, step)` over the lists of a chunk of units, full entries first.

    Args:
      bounded: makes as many steps as the longest list of all units needs, so that reverse-mode differentiation works;
        else as many as this chunk needs.
    """
    for full, longest, count in zip((True, False), lists.longest, lists.per_step, strict=True):
        parts = ranges[:, : lists.num_full_ranges] if full else ranges[:, lists.num_full_ranges :]
        if not parts.shape[1] or not longest:
            continue
        masked = not full and lists.tile_masks is not None

        def fold(index, carry, parts=parts, masked=masked, count=count):
            position, valid = entries(parts, index.astype(jnp.int32) * count, count)
            mask_ids = lists.mask_ids[position] if masked else None
            return body(carry, Step(lists.blocks[position], mask_ids, valid))

        if bounded:
            carry = jax.lax.fori_loop(0, -(-longest // count), jax.checkpoint(fold), carry)
        else:
            most = lengths(parts).max()
            carry = jax.lax.fori_loop(0, -(-most // count), fold, carry)
    return carry


def lengths(ranges: Int32[Array, "units ranges 2"]) -> Int32[Array, " units"]:
    """The number of entries of each unit."""
    return jnp.maximum(ranges[..., 1] - ranges[..., 0], 0).sum(-1, dtype=jnp.int32)


def in_chunks(function, lengths: Int32[Array, " units"], unit_bytes: int, chunk_bytes: int):
    """`function(unit numbers [chunk])` for all units, results [units, ...] in their order.

    A chunk holds units of similar length, so that none waits for a longer one.
    """
    return fold_chunks(lambda carry, units, _: (carry, function(units)), (), lengths, unit_bytes, chunk_bytes)[1]


def fold_chunks(function, carry, lengths: Int32[Array, " units"], unit_bytes: int, chunk_bytes: int):
    """`carry, results = function(carry, unit numbers [chunk], counts [chunk])` for all units, as in `in_chunks`.

    `counts` is False for padding: the last chunk is filled up with the shortest unit.
    """
    units = lengths.shape[0]
    size = max(1, chunk_bytes // unit_bytes)
    size = min(units, size) if isinstance(units, int) else size
    chunks = -(-units // size)
    order = jnp.argsort(-jax.lax.optimization_barrier(lengths), stable=True).astype(jnp.int32)
    place = jnp.arange(chunks * size, dtype=jnp.int32)
    last = jnp.asarray(units - 1, jnp.int32)
    padded, counts = order[jnp.minimum(place, last)], place <= last
    chunked = padded.reshape(chunks, size), counts.reshape(chunks, size)
    carry, results = jax.lax.scan(lambda carry, chunk: function(carry, *chunk), carry, chunked)
    back = jnp.argsort(order).astype(jnp.int32)
    return carry, jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[back], results)
