"""Tiles: several rows of a schedule merged, so that a kernel's matrix unit has enough of them at a time."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int32

from pallas_kernels.schedule import NOTHING, WHOLE, BlockLists, BlockSchedule, expand


@dataclasses.dataclass(frozen=True, eq=False)
class Tiles:
    """Groups of rows and what they read together.

    Attributes:
      members: int32 [walkers, tiles, rows], the rows in every tile; -1 where a tile has fewer.
      lists: what the tiles walk; its masks index `masks`.
      masks: int32 [kinds, rows], the token mask of every row of a tile; the first kind masks nothing, the second
        everything.
    """

    members: Int32[np.ndarray, "walkers tiles rows"]
    lists: BlockLists
    masks: Int32[np.ndarray, "kinds rows"]

    def executed_blocks(self, capacity: int) -> np.ndarray:
        """Pairs of blocks computed for every walker, where entries are walked `capacity` at a time: int64 [walkers]."""
        steps = -(-self.lists.counts().astype(np.int64) // capacity)
        return steps.sum((1, 2)) * capacity * self.members.shape[2]


def neighbours(num_walkers: int, num_rows: int, size: int) -> np.ndarray:
    """Groups of consecutive rows: int32 [walkers, tiles, size]."""
    rows = np.arange(-(-num_rows // size) * size, dtype=np.int32).reshape(-1, size)
    return np.broadcast_to(np.where(rows < num_rows, rows, -1), (num_walkers, *rows.shape))


def alike(lists: BlockLists, size: int) -> np.ndarray:
    """Groups of rows that walk the same parts of the lists: int32 [walkers, tiles, size].

    Seen from the keys, a stripe is read by every later query and its neighbour by a window of them. Grouped by which
    parts they have, stripes stand with stripes and window blocks with window blocks, and the union of what a group
    walks is little more than each one's own. Rows that walk nothing are in no group.
    """
    lengths = lists.slices[..., 1] - lists.slices[..., 0]
    found = []
    for walker in range(lists.num_walkers):
        busy = np.flatnonzero(lengths[walker].any(-1))
        has = np.pad(lengths[walker, busy, : lists.num_full] > 0, ((0, 0), (0, 1)))  # there may be none
        kinds, kind = np.unique(has, axis=0, return_inverse=True)
        groups = []
        for each in range(len(kinds)):
            rows = busy[kind.reshape(-1) == each]
            padded = np.full(-(-len(rows) // size) * size, -1, np.int32)
            padded[: len(rows)] = rows
            groups.append(padded.reshape(-1, size))
        found.append(np.concatenate(groups) if groups else np.zeros((0, size), np.int32))
    tiles = np.full((len(found), max(1, *map(len, found)), size), -1, np.int32)
    for walker, groups in enumerate(found):
        tiles[walker, : len(groups)] = groups
    return tiles


def merge(lists: BlockLists, members: np.ndarray) -> Tiles:
    """What groups of rows read together.

    The slices of one list that the rows of a group share stay a slice, walked without a mask. What only some of the
    rows read is written out once, with the token mask of every row.

    Args:
      members: int32 [walkers, tiles, rows], -1 for no row.
    """
    walkers, tiles, size = members.shape
    cores = np.zeros((walkers, tiles, lists.num_full, 2), np.int32)
    loose = []
    for walker in range(walkers):
        slices = lists.slices[walker][members[walker]]  # [tiles, rows, parts, 2]
        absent = members[walker] < 0
        cores[walker], rest = _cores(slices[:, :, : lists.num_full], absent)
        loose.append(_margins(lists, rest, slices[:, :, lists.num_full :], absent))
    kinds, which = np.unique(np.concatenate([kind for _, _, kind in loose]), axis=0, return_inverse=True)
    masks = np.concatenate([np.full((1, size), WHOLE), np.full((1, size), NOTHING), kinds]).astype(np.int32)
    written = _written_out(loose, np.where((kinds == WHOLE).all(1), 0, np.arange(len(kinds)) + 2)[which.reshape(-1)])
    return Tiles(members, _with_written_out(lists, cores, written), masks)


def _cores(slices: np.ndarray, absent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of every slice that all rows share, int [tiles, parts, 2], and what is left, [tiles, rows, parts, 2, 2].

    Slices of different lists stand apart in memory, so that whatever overlaps is of one list.
    """
    low = np.where(absent[..., None], -1, slices[..., 0]).max(1)
    high = np.where(absent[..., None], np.iinfo(np.int32).max, slices[..., 1]).min(1)
    shared = (low < high) & ~absent.all(1)[:, None]
    core = np.where(shared[..., None], np.stack([low, high], -1), 0)
    start, stop = slices[..., 0], slices[..., 1]
    before = np.stack([start, np.where(shared[:, None], low[:, None], stop)], -1)
    after = np.stack([np.where(shared[:, None], high[:, None], stop), stop], -1)
    return core, np.where(absent[..., None, None, None], 0, np.stack([before, after], -2))


def _margins(lists: BlockLists, rest: np.ndarray, partial: np.ndarray, absent: np.ndarray):
    """What not all rows of a tile read whole: tile, block, and the token mask of every row, one entry each."""
    tiles, size = absent.shape
    partial = np.where(absent[..., None, None], 0, partial)
    slices = np.concatenate([rest.reshape(tiles, size, -1, 2), partial], 2)
    labels = np.broadcast_to(np.arange(tiles * size).reshape(tiles, size, 1), slices.shape[:3])
    label, position = expand(labels.reshape(-1), slices[..., 0].reshape(-1), slices[..., 1].reshape(-1))
    tile, row = label // size, label % size
    num_blocks = int(lists.blocks.max(initial=0)) + 1
    keys, entry = np.unique(tile * num_blocks + lists.blocks[position], return_inverse=True)
    kinds = np.where(absent, WHOLE, NOTHING)[keys // num_blocks]
    kinds[entry.reshape(-1), row] = lists.masks[position]
    return keys // num_blocks, keys % num_blocks, kinds


def _written_out(loose, ids: np.ndarray):
    """The entries with their ids, apart for each walker."""
    ends = np.cumsum([len(tile) for tile, _, _ in loose])
    return [(tile, block, part) for (tile, block, _), part in zip(loose, np.split(ids, ends[:-1]), strict=True)]


def _with_written_out(lists: BlockLists, cores: np.ndarray, written) -> BlockLists:
    walkers, tiles = cores.shape[:2]
    blocks, masks, offset = [lists.blocks], [np.zeros_like(lists.masks)], len(lists.blocks)
    extra = np.zeros((2, walkers, tiles, 2), np.int32)
    for walker, (tile, block, ids) in enumerate(written):
        for kind, chosen in enumerate((ids == WHOLE, ids != WHOLE)):
            ends = np.searchsorted(tile[chosen], np.arange(tiles + 1))
            extra[kind, walker] = offset + np.stack([ends[:-1], ends[1:]], -1)
            blocks.append(block[chosen].astype(np.int32))
            masks.append(ids[chosen].astype(np.int32))
            offset += chosen.sum()
    full, partial = extra[0][:, :, None], extra[1][:, :, None]
    if not (full[..., 1] > full[..., 0]).any():
        full = full[:, :, :0]
    offsets = np.append(lists.offsets, offset).astype(np.int32)
    slices = np.concatenate([cores, full, partial], 2)
    return BlockLists(np.concatenate(blocks), np.concatenate(masks), offsets, slices, lists.num_full + full.shape[2])


def without_missing_keys(schedule: BlockSchedule, tiles: Tiles):
    """The lists where the last block, if it is not filled with keys, has masks of its own.

    Returns:
      blocks, masks and slices, with one more part and one more entry where needed; the token masks of every kind, and
      whether it is for the last block.
    """
    lists, kinds, last = tiles.lists, tiles.masks, schedule.num_columns - 1
    slices, short = lists.slices.astype(np.int32), np.zeros(len(kinds), bool)
    if schedule.kv_length % schedule.block_size == 0 or len(lists.blocks) == 0:
        return lists.blocks, lists.masks, slices, kinds, short
    # Lists ascend: only the last entry of a slice without masks can be the last block.
    full = slices[..., : lists.num_full, :].copy()
    busy = full[..., 1] > full[..., 0]
    ends = busy & (lists.blocks[np.where(busy, full[..., 1] - 1, 0)] == last)
    full[..., 1] -= ends
    entry = len(lists.blocks)
    one = np.where(ends.any(-1)[..., None], np.array([entry, entry + 1], np.int32), np.int32(0))[..., None, :]
    found, which = np.unique(lists.masks[lists.blocks == last], return_inverse=True)
    masks = lists.masks.copy()
    masks[lists.blocks == last] = len(kinds) + 1 + which
    return (
        np.append(lists.blocks, last).astype(np.int32),
        np.append(masks, len(kinds)).astype(np.int32),
        np.concatenate([full, slices[..., lists.num_full :, :], one], -2).astype(np.int32),
        np.concatenate([kinds, np.full_like(kinds[:1], WHOLE), kinds[found]]),
        np.append(short, np.ones(len(found) + 1, bool)),
    )


def seen_by_kind(
    schedule: BlockSchedule, kinds: np.ndarray, short: np.ndarray
) -> Bool[np.ndarray, "kinds queries keys"]:
    """What each query of a tile sees of a block."""
    size = schedule.block_size
    bits = schedule.token_masks[kinds].reshape(len(kinds), -1, size)  # [kinds, queries, keys]
    remaining = schedule.kv_length - (schedule.num_columns - 1) * size
    return bits & (~short[:, None, None] | (np.arange(size) < remaining))
