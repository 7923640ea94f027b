"""What the XLA kernels walk: the schedule's tiles as arrays, for static schedules and for traced selections alike."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection
from pallas_kernels.tiles import Tiles, alike, merge, neighbours


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Walks:
    """Tiles of rows that walk lists of blocks, forward (rows are queries) or backward (rows are keys).

    Attributes:
      blocks: int32 [entries], the lists.
      masks: int32 [entries], a row of `kinds` for each.
      slices: int32 [b|1, walkers, tiles, parts, 2]; the first `num_full` parts hold entries without a mask.
      kinds: int32 [kinds, rows], the token mask of every row of a tile; None for traced selections.
      token_masks: bool [masks, block_size, block_size], query by key.
      members: int32 [walkers, tiles, rows], the rows of every tile, -1 for none; of backward walks only.
      places: int32 [walkers, rows], where among all tiles' rows a row stands, -1 for nowhere; of backward walks only.
      num_full: see `slices`.
      longest: the most entries that a tile walks, without a mask and with one.
      per_step: how many of them are walked at a time.
    """

    blocks: Int32[Array | np.ndarray, " entries"]
    masks: Int32[Array | np.ndarray, " entries"]
    slices: Int32[Array | np.ndarray, "#b walkers tiles parts 2"]
    kinds: Int32[Array | np.ndarray, "kinds rows"] | None
    token_masks: Bool[Array | np.ndarray, "masks block_size block_size"] | None
    members: Int32[Array | np.ndarray, "walkers tiles rows"] | None
    places: Int32[Array | np.ndarray, "walkers columns"] | None
    num_full: int = dataclasses.field(metadata={"static": True})
    longest: tuple[int, int] = dataclasses.field(metadata={"static": True})
    per_step: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def rows_per_tile(self) -> int:
        """Selections are walked row by row, and their keys block by block."""
        return 1 if self.kinds is None else self.kinds.shape[1]


def along(count: int, ndim: int) -> Array:
    """0 to count - 1 along the last of so many axes."""
    return jnp.arange(count, dtype=jnp.int32).reshape(*[1] * (ndim - 1), count)


def walkers_per_kv_head(schedule: BlockSchedule) -> int:
    """1 where the query heads of a group walk as one, else as many as there are in a group."""
    return 1 if schedule.shares_groups else schedule.num_heads // schedule.num_kv_heads


@functools.lru_cache(maxsize=64)
def forward_walks(schedule: BlockSchedule, rows_per_tile: int, most: int) -> Walks:
    """Tiles of consecutive query blocks, for every walker of every KV head, `most` entries a step (numpy arrays)."""
    lists = schedule.lists
    tiles = merge(lists, neighbours(lists.num_walkers, lists.num_rows, rows_per_tile))
    return _of_heads(schedule, tiles, most, members=None, places=None)


@functools.lru_cache(maxsize=64)
def backward_walks(schedule: BlockSchedule, rows_per_tile: int, most: int) -> Walks:
    """Packs of key blocks with like readers, for every walker of every KV head, `most` a step (numpy arrays)."""
    lists = schedule.transposed
    tiles = merge(lists, alike(lists, rows_per_tile))
    places = np.full((lists.num_walkers, schedule.num_columns), -1, np.int32)
    walker, tile, row = np.nonzero(tiles.members >= 0)
    places[walker, tiles.members[walker, tile, row]] = tile * rows_per_tile + row
    return _of_heads(schedule, tiles, most, tiles.members, places)


def _of_heads(schedule: BlockSchedule, tiles: Tiles, most: int, members, places) -> Walks:
    heads = schedule.head_index[:: schedule.num_heads // schedule.num_kv_heads // walkers_per_kv_head(schedule)]
    counts = [np.bincount(each.reshape(-1), minlength=1) for each in np.moveaxis(tiles.lists.counts(), -1, 0)]
    full, partial = (len(tiles_by_length) - 1 for tiles_by_length in counts)
    per_step = [entries_per_step(each, most, schedule.block_size) for each in counts]
    return Walks(
        tiles.lists.blocks, tiles.lists.masks, tiles.lists.slices[heads][None], tiles.masks, schedule.token_masks,
        None if members is None else members[heads], None if places is None else places[heads],
        tiles.lists.num_full, (full, partial), (per_step[0], per_step[1]),
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


def entries(slices: Int32[Array, "units parts 2"], first: Array, count: int) -> tuple[Array, Array]:
    """Positions in the lists of `count` entries of every unit from `first` on, and whether there is such an entry.

    A unit's parts are walked one after the other, as if they were one list.
    """
    lengths = jnp.maximum(slices[..., 1] - slices[..., 0], 0)
    ends = jnp.cumsum(lengths, -1, dtype=jnp.int32)
    entry = first + along(count, 2)
    part = (entry[:, :, None] >= ends[:, None, :]).sum(-1, dtype=jnp.int32)
    shifts = slices[..., 0] - (ends - lengths)
    valid = entry < ends[:, -1:]
    part = jnp.minimum(part, slices.shape[1] - 1)
    return jnp.where(valid, jnp.take_along_axis(shifts, part, 1) + entry, 0), valid


def selection_walks(selection: BlockSelection, num_kv_heads: int, per_step: int) -> Walks:
    """The lists of a traced selection, for every walker."""
    batch, heads, rows, most = selection.kv_blocks.shape
    first = jnp.arange(batch * heads * rows, dtype=jnp.int32).reshape(batch, heads, rows) * most
    slices = jnp.stack([first, first + jnp.clip(selection.counts, 0, most)], -1)[:, :, :, None]
    slices = jnp.broadcast_to(slices, (batch, max(heads, num_kv_heads), rows, 1, 2))
    return _unmasked(selection.kv_blocks.reshape(-1), slices, most, per_step)


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
    slices = jnp.stack([ends[:, :-1], ends[:, 1:]], -1).reshape(batch, heads, num_blocks, 1, 2)
    slices = jnp.broadcast_to(slices, (batch, max(heads, num_kv_heads), num_blocks, 1, 2))
    return _unmasked(readers.reshape(-1), slices, rows if most else 0, per_step)


def _unmasked(blocks: Array, slices: Array, longest: int, per_step: int) -> Walks:
    walkers, columns = slices.shape[1:3]
    every = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), (walkers, columns))
    per_step = max(1, min(per_step, longest))
    return Walks(
        blocks, jnp.zeros_like(blocks), slices, None, None, every[..., None], every, 0, (0, longest), (1, per_step)
    )  # fmt: skip
