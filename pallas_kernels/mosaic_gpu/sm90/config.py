"""Tile sizes of the Hopper kernels, how they are chosen, and the static configuration that a kernel is traced with."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable

import numpy as np

from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection
from pallas_kernels.tiling import WORD_BITS

WARPGROUPS, WARPGROUP_ROWS = 2, 64
"""Compute warpgroups of a thread block, and rows of the tile that each of them computes."""

ROWS = WARPGROUPS * WARPGROUP_ROWS
"""Rows of a tile."""

SHARED_BYTES = 227 << 10
"""Shared memory of a thread block on Hopper."""

ALIGNMENT = 1 << 10
"""Alignment of every buffer in shared memory, in bytes."""

BARRIER_BYTES = 3 << 10
"""Shared memory for barriers and for Mosaic GPU itself."""


def bits_per_word(chunk_size: int) -> int:
    """Bits used in a mask word; chunks smaller than a word do not share one."""
    return min(chunk_size, WORD_BITS)


@dataclasses.dataclass(frozen=True)
class HopperConfig:
    """Tile sizes of the Hopper kernels. Gradients take only `heads_per_tile` from a caller's config.

    Attributes:
      heads_per_tile: query heads in a tile of 128 rows; they must read the same blocks.
      block_kv: keys of a step.
      num_stages: steps that are loaded ahead.
    """

    heads_per_tile: int = 1
    block_kv: int = 128
    num_stages: int = 2

    def __post_init__(self):
        for name, value, allowed in (
            ("heads_per_tile", self.heads_per_tile, (1, 2, 4, 8)),
            ("block_kv", self.block_kv, (16, 32, 64, 128, 256)),
            ("num_stages", self.num_stages, range(2, 9)),
        ):
            if type(value) is not int or value not in allowed:
                raise ValueError(f"{name} must be one of the integers {', '.join(map(str, allowed))}, got {value!r}")

    @property
    def block_q(self) -> int:
        """Queries of each head in a tile."""
        return ROWS // self.heads_per_tile

    def bits_per_word(self, block_size: int) -> int:
        """Bits used in a mask word."""
        return bits_per_word(min(block_size, self.block_kv))

    def shared_bytes(self, head_dim: int, value_dim: int, block_size: int, mask_arrays: int) -> int:
        """Upper bound of the forward kernel's shared memory, for 2-byte elements."""
        mask_bits = self.block_kv // self.bits_per_word(block_size) * ROWS * 4
        buffers = [
            ROWS * head_dim * 2,
            ROWS * value_dim * 2 if value_dim != head_dim else 0,
            self.num_stages * self.block_kv * head_dim * 2,
            self.num_stages * self.block_kv * value_dim * 2,
            self.num_stages * mask_bits,
            *[self.num_stages * self.block_kv * 4] * (mask_arrays - 1),
            ROWS * 4,
        ]
        return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in buffers) + BARRIER_BYTES


# Choice of a config.


def choose_config(
    head_dim: int, value_dim: int, block_size: int, kv_length: int, heads_per_tile: int, others: tuple[int, ...] = ()
) -> HopperConfig:
    """Config of the forward pass: the fastest measured one, else the default.

    Args:
      head_dim: features of queries and keys.
      value_dim: features of values.
      block_size: tokens of a block of the schedule or selection.
      kv_length: number of keys.
      heads_per_tile: heads of a tile, by default.
      others: further numbers of heads that a measured config may have.
    """
    measured = tuned_configs().get((head_dim, value_dim, block_size, heads_per_tile))
    if measured is not None:
        config = HopperConfig(*measured)
        if config.heads_per_tile in (heads_per_tile, *others) and config.block_kv < 2 * kv_length:
            return config
    return default_config(head_dim, value_dim, block_size, kv_length, heads_per_tile)


def default_config(head_dim: int, value_dim: int, block_size: int, kv_length: int, heads_per_tile: int) -> HopperConfig:
    """Config of the forward pass with the largest steps whose accumulators and buffers fit."""
    return _first_that_fits(
        heads_per_tile,
        _halved_to(kv_length, 128 if max(head_dim, value_dim) <= 128 else 64),
        (4, 3, 2),
        lambda config: config.shared_bytes(head_dim, value_dim, block_size, 3),
    )


def choose_query_grad_config(
    head_dim: int, value_dim: int, block_size: int, kv_length: int, heads_per_tile: int
) -> HopperConfig:
    """Config of the dq kernel, which keeps twice the rows and one more product per step than the forward kernel."""
    # dout takes the place of the output buffer that `shared_bytes` counts if its shape is not the query's.
    dout = ROWS * value_dim * 2 if value_dim == head_dim else 0
    return _first_that_fits(
        heads_per_tile,
        _halved_to(kv_length, 64),
        (3, 2),
        lambda config: dout + config.shared_bytes(head_dim, value_dim, block_size, 3),
    )


def choose_kv_grad_config(head_dim: int, value_dim: int, query_block: int, query_length: int) -> HopperConfig:
    """Config of the dk/dv kernels, whose steps hold queries: `block_kv` of the result counts queries.

    Args:
      head_dim: features of queries and keys.
      value_dim: features of values.
      query_block: queries of a block; a whole number of steps, or several in a step.
      query_length: number of queries.
    """
    step_size = _halved_to(query_length, 64)
    while step_size > 16 and query_block % step_size and step_size % query_block:
        step_size //= 2
    token_bytes = 2 * (head_dim + value_dim)

    def shared_bytes(config: HopperConfig) -> int:
        stage_bytes = config.block_kv * token_bytes + 8 * ALIGNMENT
        return ROWS * token_bytes + config.num_stages * stage_bytes + BARRIER_BYTES

    return _first_that_fits(1, step_size, (3, 2), shared_bytes)


def _halved_to(length: int, step_size: int) -> int:
    """The step size, halved while half of it would hold all tokens, but at least 16."""
    while step_size > 16 and step_size >= 2 * length:
        step_size //= 2
    return step_size


def _first_that_fits(
    heads_per_tile: int, step_size: int, stages: Iterable[int], shared_bytes: Callable[[HopperConfig], int]
) -> HopperConfig:
    """The config with the largest step, then the most stages, that fits shared memory."""
    while True:
        for num_stages in stages:
            config = HopperConfig(heads_per_tile, step_size, num_stages)
            if shared_bytes(config) <= SHARED_BYTES:
                return config
        step_size //= 2  # HopperConfig rejects steps below 16


def allowed_heads_per_tile(
    schedule: BlockSchedule | BlockSelection, num_heads: int, num_kv_heads: int
) -> tuple[int, ...]:
    """Possible numbers of query heads in a tile, the best last: with more heads, fewer rows of blocks are merged."""
    group_size = num_heads // num_kv_heads
    if isinstance(schedule, BlockSelection):
        shared = schedule.counts.shape[1] != num_heads or group_size == 1
        return tuple(
            heads
            for heads in (8, 4, 2, 1)
            if group_size % heads == 0 and (shared or heads == 1) and schedule.query_block % (ROWS // heads) == 0
        )
    return tuple(
        heads
        for heads in (1, 2, 4, 8)
        if heads == 1 or (group_size % heads == 0 and schedule.shares_groups and ROWS // heads >= schedule.block_size)
    )


# Measured configs. `python -m benchmarks.tile_search` writes the file; without it, defaults are used.

TUNED_PATH = pathlib.Path(__file__).parent / "tuned.json"

Key = tuple[int, int, int, int]
"""Head dim, value dim, block size, and the largest number of heads that a tile can have."""


@functools.cache
def tuned_configs(path: pathlib.Path | None = None) -> dict[Key, tuple[int, int, int]]:
    """The fields of the fastest measured `HopperConfig` by key; empty if there is no file.

    Raises:
      ValueError: the file is not in the format of benchmarks/tile_search.py.
    """
    path = path or TUNED_PATH
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())["rows"]
        return {
            (entry["head_dim"], entry["value_dim"], entry["block_size"], entry["most_heads"]): (
                entry["config"]["heads_per_tile"], entry["config"]["block_kv"], entry["config"]["num_stages"]
            )
            for entry in entries
        }  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected tiles as benchmarks/tile_search.py writes them in {path}: {error!r}") from error


# Static configuration of a kernel.


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """Static configuration shared by all kernels: shapes, step size, and layout of the block lists.

    Attributes:
      batch: number of sequences.
      num_heads: number of query heads.
      num_kv_heads: number of key and value heads.
      head_dim: features of queries and keys, padded.
      value_dim: features of values, padded.
      dtype: dtype of all arrays that products read.
      step_size: tokens of a step.
      num_stages: steps that are loaded ahead.
      block_size: tokens of a block in the lists.
      num_ranges: number of ranges of the block lists that a tile reads.
      num_full_ranges: ranges with full blocks, which need no mask; they come first.
      scale: multiplier of the logits, positive.
      soft_cap: logits become soft_cap · tanh(logits / soft_cap), if not None.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: np.dtype
    step_size: int
    num_stages: int
    block_size: int
    num_ranges: int
    num_full_ranges: int
    scale: float
    soft_cap: float | None

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of thread blocks along tiles, sequences and groups of heads."""
        raise NotImplementedError

    @property
    def chunk_size(self) -> int:
        """Tokens that one TMA copy brings: a block, or the part of a longer block that fills a step."""
        return min(self.block_size, self.step_size)

    @property
    def chunks_per_step(self) -> int:
        return self.step_size // self.chunk_size

    @property
    def chunks_per_block(self) -> int:
        return self.block_size // self.chunk_size

    @property
    def words_per_chunk(self) -> int:
        """Mask words of a row for one chunk."""
        return self.chunk_size // bits_per_word(self.chunk_size)

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class QKernelSpec(KernelSpec):
    """Static configuration of the forward and dq kernels, which tile queries and loop over keys.

    Attributes:
      block_q: queries of each head in a tile.
      num_tiles: tiles of each head.
    """

    block_q: int
    num_tiles: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.num_tiles, self.batch, self.num_heads // self.heads_per_tile

    @property
    def heads_per_tile(self) -> int:
        """Query heads in a tile, which together fill ROWS rows."""
        return ROWS // self.block_q

    @property
    def rows_per_copy(self) -> int:
        """Rows of a warpgroup that one TMA copy brings: consecutive queries of one head."""
        return min(self.block_q, WARPGROUP_ROWS)

    @property
    def copies_per_warpgroup(self) -> int:
        return WARPGROUP_ROWS // self.rows_per_copy


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVKernelSpec(KernelSpec):
    """Static configuration of the dk/dv kernels, which tile keys and loop over queries.

    Attributes:
      num_kv_tiles: tiles of each KV head.
      kv_block_size: keys of a block; `block_size` counts queries.
      head_passes: passes over the block lists. 1 if the heads of a group share their lists; else the number of heads in
        a group, and each pass has its own lists.
      gradients: gradients that the kernel computes, of "key" and "value".
    """

    num_kv_tiles: int
    kv_block_size: int
    head_passes: int
    gradients: tuple[str, ...] = ("key", "value")

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.num_kv_tiles, self.batch, self.num_kv_heads

    @property
    def group_heads(self) -> int:
        """Query heads visited in one pass."""
        return self.group_size // self.head_passes

    @property
    def rows_per_copy(self) -> int:
        """Rows of a warpgroup that one TMA copy brings: consecutive keys of one block."""
        return min(self.kv_block_size, WARPGROUP_ROWS)

    @property
    def copies_per_warpgroup(self) -> int:
        return WARPGROUP_ROWS // self.rows_per_copy
