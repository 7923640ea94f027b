"""Configuration of the TPU kernels: tile sizes, their choice, and the static specification of one kernel."""

import dataclasses
import functools

import numpy as np

from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection
from pallas_kernels.tiling import make_kv_tiles

LANES, SUBLANES = 128, 8
"""Columns and rows of a 32-bit vector register."""

STEPS_PER_GROUP = 2
"""Steps computed in one basic block, so that the matrix products of one overlap the softmax of the other."""

MIN_ROWS, MAX_ROWS = 16, 512
"""Rows of a tile and columns of a step: at least one packed bfloat16 register, at most what keeps the MXU busy."""

KV_TILE_SIZES = (512, 256)
"""Keys in a KV tile. A smaller tile loops over fewer queries that only some of its blocks are read by."""

STEP_OVERHEAD = 40
"""Fixed cost of a dk/dv step, in rows that would take as long, from the compiler's schedules."""


@dataclasses.dataclass(frozen=True)
class TpuConfig:
    """Tile sizes of the forward and dq kernels, which tile queries and loop over keys.

    Attributes:
      heads_per_tile: query heads in a tile; they must read the same blocks.
      block_q: queries of each head in a tile; a tile has at most 1024 rows in all.
      block_kv: keys in a step.
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

    def chunk_size(self, block_size: int) -> int:
        """Keys per DMA: a block, or as much of it as a step holds."""
        return min(block_size, self.block_kv)


@dataclasses.dataclass(frozen=True)
class KVGradConfig:
    """Tile sizes of the dk/dv kernel, which tiles keys and loops over queries.

    Attributes:
      block_kv: keys in a KV tile.
      step_size: rows of queries in a step, over all its heads.
      heads_per_step: query heads in a step.
    """

    block_kv: int
    step_size: int
    heads_per_step: int

    def chunk_size(self, block_size: int) -> int:
        """Queries of each head per DMA: a block, or as much of it as a step holds."""
        return min(block_size, self.step_size // self.heads_per_step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """Static description of a kernel: everything known while tracing that its code depends on.

    A tile of `tile_rows` rows stays in VMEM; the kernel loops over steps of `step_size` rows streamed from HBM. In the
    forward and dq kernels the tile is of queries and the steps are of keys. In the dk/dv kernel it is the reverse.

    Attributes:
      batch: sequences.
      num_head_tiles: tiles along the heads; the second axis of the grid.
      num_tiles: tiles along the tokens; the third axis of the grid.
      head_passes: passes over each tile, each with block lists of its own.
      tile_heads: heads in a tile.
      tile_tokens: tokens of each head in a tile.
      group_size: query heads per KV head.
      head_dim: of queries and keys, padded to lanes.
      value_dim: of values, padded to lanes.
      dtype: of queries, keys and values.
      step_size: streamed rows in a step; the columns of its logits.
      step_heads: heads in a step.
      chunk_size: tokens per DMA.
      chunk_bits: low bits of an entry, which hold the number of its chunk; the higher bits hold the mask id.
      empty_mask_id: the mask id of entries that are masked altogether.
      num_ranges: ranges of entries that a pass reads.
      num_full_ranges: how many of them, the first ones, hold entries without a mask.
      entries_per_list: entries of a list, padding included.
      padded_to_steps: True if the entries of each pass are contiguous and padded to whole steps with masked entries.
      scale: factor of the logits.
      soft_cap: bound of the logits; None for none.
      rows_are_queries: True in the forward and dq kernels, where the rows of the logits are queries.
      member_block_size: tokens of a block of the KV tile, if an entry has one bit per block instead of a mask id.
    """

    batch: int
    num_head_tiles: int
    num_tiles: int
    head_passes: int
    tile_heads: int
    tile_tokens: int
    group_size: int
    head_dim: int
    value_dim: int
    dtype: np.dtype
    step_size: int
    step_heads: int
    chunk_size: int
    chunk_bits: int
    empty_mask_id: int
    num_ranges: int
    num_full_ranges: int
    entries_per_list: int
    padded_to_steps: bool
    scale: float
    soft_cap: float | None
    rows_are_queries: bool
    member_block_size: int | None = None

    @property
    def tile_rows(self) -> int:
        return self.tile_heads * self.tile_tokens

    @property
    def chunks_per_step(self) -> int:
        return self.step_size // (self.chunk_size * self.step_heads)

    @property
    def scalars_per_pass(self) -> int:
        """int32 scalars per pass in SMEM: the ends of its ranges, and the next pass that reads anything."""
        return 2 * self.num_ranges + 1


def choose_config(
    schedule: BlockSchedule | BlockSelection,
    num_heads: int,
    num_kv_heads: int,
    query_length: int,
    kv_length: int,
    heads_per_tile: int | None = None,
) -> TpuConfig:
    """The largest tile, with as many heads as may share it, so that few rows of blocks are merged.

    Args:
      heads_per_tile: heads in a tile; None for the most that may share one.
    """
    heads = heads_per_tile or allowed_heads_per_tile(schedule, num_heads, num_kv_heads)[-1]
    max_block_q = MAX_ROWS // heads
    if isinstance(schedule, BlockSelection):
        max_block_q = min(max_block_q, schedule.query_block & -schedule.query_block)
    block_q = max(_min_block_q(schedule), min(max_block_q, next_power_of_two(query_length)))
    return TpuConfig(heads, block_q, max(LANES, min(MAX_ROWS, next_power_of_two(kv_length))))


def allowed_heads_per_tile(
    schedule: BlockSchedule | BlockSelection, num_heads: int, num_kv_heads: int
) -> tuple[int, ...]:
    """Numbers of query heads that a tile may have, ascending."""
    group_size, shared = num_heads // num_kv_heads, _groups_share_lists(schedule, num_heads, num_kv_heads)
    max_heads = MAX_ROWS // _min_block_q(schedule) if shared else 1
    return tuple(heads for heads in (1, 2, 4, 8, 16) if heads == 1 or (group_size % heads == 0 and heads <= max_heads))


def choose_kv_grad_config(
    schedule: BlockSchedule | BlockSelection, num_heads: int, num_kv_heads: int, query_length: int, kv_length: int
) -> KVGradConfig:
    """The fastest KV tile, and as many heads of a group per step as read the same blocks."""
    group_size, size, max_block_kv = num_heads // num_kv_heads, schedule.block_size, KV_TILE_SIZES[0]
    if isinstance(schedule, BlockSelection):
        # Every block of a KV tile takes a bit of an entry.
        max_block_kv = min(max_block_kv, size * (30 - max(1, (schedule.kv_blocks.shape[2] - 1).bit_length())))
    max_block_kv = max(size, min(1 << max_block_kv.bit_length() - 1, next_power_of_two(kv_length)))
    block_kv = max_block_kv if isinstance(schedule, BlockSelection) else _fastest_block_kv(schedule, max_block_kv)
    step_size = max(LANES, min(MAX_ROWS, next_power_of_two(query_length * group_size)))
    max_heads = step_size // schedule.query_block if _groups_share_lists(schedule, num_heads, num_kv_heads) else 1
    heads = max(heads for heads in (1, 2, 4, 8) if heads == 1 or (group_size % heads == 0 and heads <= max_heads))
    return KVGradConfig(block_kv, step_size, heads)


@functools.lru_cache(maxsize=64)
def _fastest_block_kv(schedule: BlockSchedule, max_block_kv: int) -> int:
    """The KV tile size with the least estimated time for the whole schedule."""
    sizes = [size for size in KV_TILE_SIZES if schedule.block_size <= size <= max_block_kv] or [max_block_kv]

    def cost(size: int) -> int:
        ranges = make_kv_tiles(schedule, size).ranges.astype(np.int64)
        return (size + STEP_OVERHEAD) * int((ranges[..., 1] - ranges[..., 0]).sum())

    return min(sizes, key=cost) if len(sizes) > 1 else sizes[0]


def _groups_share_lists(schedule: BlockSchedule | BlockSelection, num_heads: int, num_kv_heads: int) -> bool:
    """True if all query heads of a KV head read the same blocks."""
    if isinstance(schedule, BlockSelection):
        return schedule.counts.shape[1] != num_heads or num_heads == num_kv_heads
    return schedule.shares_groups


def _min_block_q(schedule: BlockSchedule | BlockSelection) -> int:
    """The fewest queries in a tile: a schedule's block, as tiles merge whole blocks; a selection's may be divided."""
    return MIN_ROWS if isinstance(schedule, BlockSelection) else schedule.block_size


def next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
