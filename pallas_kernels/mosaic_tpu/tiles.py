"""Tile sizes of the TPU kernels, and which to take."""

import dataclasses
import functools

import numpy as np

from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection
from pallas_kernels.tiling import make_kv_tiles

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
class TpuConfig:
    """Tile sizes of the TPU kernels whose tiles are queries: of the forward pass, and of their gradient.

    Attributes:
      heads_per_tile: query heads in a tile; they must read the same blocks.
      block_q: of each of them; at most 1024 rows in all.
      block_kv: keys of a step.
    """

    heads_per_tile: int = 1
    block_q: int = 512
    block_kv: int = 512

    def __post_init__(self):
        for name, value, allowed in (
            ("heads_per_tile", self.heads_per_tile, (1, 2, 4, 8, 16)),
            ("block_q", self.block_q, (16, 32, 64, 128, 256, 512, 1024)),
            ("block_kv", self.block_kv, (128, 256, 512, 1024)),
        ):
            if type(value) is not int or value not in allowed:
                raise ValueError(f"{name} must be one of the integers {', '.join(map(str, allowed))}, got {value!r}")

        if self.rows > 1024:
            raise ValueError(
                f"heads_per_tile · block_q must be at most 1024, got {self.heads_per_tile} · {self.block_q}"
            )

    @property
    def rows(self) -> int:
        return self.heads_per_tile * self.block_q

    def slot(self, block_size: int) -> int:
        """Keys that one copy brings: a block, or as much of it as a step holds."""
        return min(block_size, self.block_kv)


@dataclasses.dataclass(frozen=True)
class KVGradConfig:
    """Of the kernel of the keys' gradients.

    Attributes:
      block_kv: keys of a pack.
      step_size: queries of a step, of all its heads.
      heads_per_step: heads in a step.
    """

    block_kv: int
    step_size: int
    heads_per_step: int

    def slot(self, block_size: int) -> int:
        """Queries of each head that one copy brings: a block, or as much of it as a step holds."""
        return min(block_size, self.step_size // self.heads_per_step)


def choose_kv_grad_config(
    schedule: BlockSchedule | None,
    selection: BlockSelection | None,
    num_heads: int,
    num_kv_heads: int,
    query_length: int,
    kv_length: int,
) -> KVGradConfig:
    """As many heads of a group at once as read the same; packs that are small enough to be of like blocks."""
    group = num_heads // num_kv_heads
    if selection is not None:
        size, query_block = selection.block_size, selection.query_block
        shared_lists = selection.counts.shape[1] != num_heads or group == 1
        # Every block of a pack takes a bit of an entry.
        most = min(PACK_ROWS[0], size * (30 - max(1, (selection.kv_blocks.shape[2] - 1).bit_length())))
    else:
        assert schedule is not None  # one of the two says what is read
        size = query_block = schedule.block_size
        shared_lists, most = schedule.shares_groups, PACK_ROWS[0]
    most = max(size, min(1 << most.bit_length() - 1, power_of_two(kv_length)))
    rows = most if schedule is None else best_rows(schedule, most)
    step = max(LANES, min(MOST_ROWS, power_of_two(query_length * group)))
    fitting = [heads for heads in (1, 2, 4, 8) if group % heads == 0 and heads * query_block <= step]
    return KVGradConfig(rows, step, fitting[-1] if shared_lists and fitting else 1)


@functools.lru_cache(maxsize=64)
def best_rows(schedule: BlockSchedule, most: int) -> int:
    """Of the sizes of packs that fit, that which takes the least time."""
    sizes = [rows for rows in PACK_ROWS if schedule.block_size <= rows <= most] or [most]

    def cost(rows: int) -> int:
        ranges = make_kv_tiles(schedule, rows).ranges.astype(np.int64)
        return (rows + PACK_OVERHEAD) * int((ranges[..., 1] - ranges[..., 0]).sum())

    return min(sizes, key=cost) if len(sizes) > 1 else sizes[0]


def choose_config(
    schedule: BlockSchedule | None,
    selection: BlockSelection | None,
    num_heads: int,
    num_kv_heads: int,
    query_length: int,
    kv_length: int,
    heads: int | None = None,
) -> TpuConfig:
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
    return TpuConfig(heads, queries, max(LANES, min(MOST_ROWS, power_of_two(kv_length))))


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
