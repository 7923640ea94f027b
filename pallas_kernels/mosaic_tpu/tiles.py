"""Tile sizes of the TPU kernels, and which to take."""

import dataclasses
import functools

import numpy as np

from pallas_kernels.packs import pack_keys
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection

LANES = 128
"""Columns of a vector register."""

MOST_ROWS = 512
"""Rows of a tile, and keys of a step: enough for the matrix units to hide all that is not a product."""

PACK_ROWS = (512, 256)
"""Keys of a pack: the fewer there are, the fewer queries are walked that only some of them are read by."""

PACK_OVERHEAD = 40
"""Rows that would take as long as what a step takes besides its rows, by the schedules of the compiler."""

LEAST_ROWS = 16
"""Rows of bfloat16 that lie together."""


@dataclasses.dataclass(frozen=True)
class TpuTiles:
    """Tile sizes of the TPU kernels whose tiles are queries: of the forward pass, and of their gradient.

    Attributes:
      heads: query heads in a tile; they must read the same blocks.
      queries: of each of them; at most 1024 rows in all.
      keys: keys of a step.
    """

    heads: int = 1
    queries: int = 512
    keys: int = 512

    def __post_init__(self):
        for name, value, allowed in (
            ("heads", self.heads, (1, 2, 4, 8, 16)),
            ("queries", self.queries, (16, 32, 64, 128, 256, 512, 1024)),
            ("keys", self.keys, (128, 256, 512, 1024)),
        ):
            if type(value) is not int or value not in allowed:
                raise ValueError(f"{name} must be one of the integers {', '.join(map(str, allowed))}, got {value!r}")

        if self.rows > 1024:
            raise ValueError(f"heads · queries must be at most 1024, got {self.heads} · {self.queries}")

    @property
    def rows(self) -> int:
        return self.heads * self.queries

    def slot(self, block_size: int) -> int:
        """Keys that one copy brings: a block, or as much of it as a step holds."""
        return min(block_size, self.keys)


@dataclasses.dataclass(frozen=True)
class KeyTiles:
    """Of the kernel of the keys' gradients.

    Attributes:
      rows: keys of a pack.
      step: queries of a step, of all its heads.
      heads: in a step.
    """

    rows: int
    step: int
    heads: int

    def slot(self, block_size: int) -> int:
        """Queries of each head that one copy brings: a block, or as much of it as a step holds."""
        return min(block_size, self.step // self.heads)


def choose_key_tiles(
    schedule: BlockSchedule | None,
    selection: BlockSelection | None,
    num_heads: int,
    num_kv_heads: int,
    query_length: int,
    kv_length: int,
) -> KeyTiles:
    """As many heads of a group at once as read the same; packs that are small enough to be of like blocks."""
    group = num_heads // num_kv_heads
    if selection is not None:
        size, query_block = selection.block_size, selection.query_block
        alike = selection.counts.shape[1] != num_heads or group == 1
        # Every block of a pack takes a bit of an entry.
        most = min(PACK_ROWS[0], size * (30 - max(1, (selection.kv_blocks.shape[2] - 1).bit_length())))
    else:
        assert schedule is not None  # one of the two says what is read
        size = query_block = schedule.block_size
        alike, most = schedule.shares_groups, PACK_ROWS[0]
    most = max(size, min(1 << most.bit_length() - 1, power_of_two(kv_length)))
    rows = most if schedule is None else best_rows(schedule, most)
    step = max(LANES, min(MOST_ROWS, power_of_two(query_length * group)))
    fitting = [heads for heads in (1, 2, 4, 8) if group % heads == 0 and heads * query_block <= step]
    return KeyTiles(rows, step, fitting[-1] if alike and fitting else 1)


@functools.lru_cache(maxsize=64)
def best_rows(schedule: BlockSchedule, most: int) -> int:
    """Of the sizes of packs that fit, that which takes the least time."""
    sizes = [rows for rows in PACK_ROWS if schedule.block_size <= rows <= most] or [most]

    def cost(rows: int) -> int:
        slices = pack_keys(schedule, rows).slices.astype(np.int64)
        return (rows + PACK_OVERHEAD) * int((slices[..., 1] - slices[..., 0]).sum())

    return min(sizes, key=cost) if len(sizes) > 1 else sizes[0]


def choose_tiles(
    schedule: BlockSchedule | None,
    selection: BlockSelection | None,
    num_heads: int,
    num_kv_heads: int,
    query_length: int,
    kv_length: int,
    heads: int | None = None,
) -> TpuTiles:
    """As many heads of a group as read the same, for then few rows of blocks are merged; and large tiles.

    Args:
      heads: of a tile, where it is not to be the best number.
    """
    heads = heads or choose_heads(schedule, selection, num_heads, num_kv_heads)[-1]
    most = MOST_ROWS // heads
    if selection is not None:
        most = min(most, selection.query_block & -selection.query_block)
    least = schedule.block_size if schedule is not None else LEAST_ROWS
    queries = max(least, min(most, power_of_two(query_length)))
    return TpuTiles(heads, queries, max(LANES, min(MOST_ROWS, power_of_two(kv_length))))


def choose_heads(
    schedule: BlockSchedule | None, selection: BlockSelection | None, num_heads: int, num_kv_heads: int
) -> tuple[int, ...]:
    """How many query heads a tile can have, the best last."""
    group = num_heads // num_kv_heads
    if selection is not None:
        shared, least = selection.counts.shape[1] != num_heads or group == 1, LEAST_ROWS
    else:
        assert schedule is not None  # one of the two says what is read
        shared, least = schedule.shares_groups, schedule.block_size
    return tuple(
        heads
        for heads in (1, 2, 4, 8, 16)
        if heads == 1 or (group % heads == 0 and shared and MOST_ROWS // heads >= least)
    )


def power_of_two(number: int) -> int:
    """The least one that is not below the number."""
    return 1 << (number - 1).bit_length()
