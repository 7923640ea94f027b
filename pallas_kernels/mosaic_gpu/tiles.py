"""Tile sizes of the Hopper kernels, and which to take."""

import dataclasses

from pallas_kernels.mosaic_gpu.plan import ROWS, bits_per_word
from pallas_kernels.mosaic_gpu.tuned import tuned_configs
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection

SHARED_BYTES = 227 << 10
"""Shared memory of a block of threads on Hopper."""

ALIGNMENT = 1 << 10
"""Of every buffer in shared memory."""

BARRIER_BYTES = 3 << 10
"""Room for barriers and for what Mosaic GPU itself needs."""


@dataclasses.dataclass(frozen=True)
class HopperConfig:
    """Tile sizes of the Hopper kernels. Of those that a caller asks for, the gradients take the heads alone.

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
        """Queries of every head in a tile."""
        return ROWS // self.heads_per_tile

    def bits_per_word(self, block_size: int) -> int:
        """How many bits of a word of a mask are used."""
        return bits_per_word(min(block_size, self.block_kv))

    def shared_bytes(self, head_dim: int, value_dim: int, block_size: int, mask_arrays: int) -> int:
        """Shared memory of the forward kernel, for 2-byte elements: as much as it takes, or a little more."""
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


def choose_config(
    head_dim: int, value_dim: int, block_size: int, kv_length: int, heads: int, others: tuple[int, ...] = ()
) -> HopperConfig:
    """Tiles for a head dim and block size: those measured best, else the usual ones.

    Args:
      heads: of a tile, the best as long as nothing was measured.
      others: numbers of heads that a tile can have too.
    """
    measured = tuned_configs().get((head_dim, value_dim, block_size, heads))
    if measured is not None:
        config = HopperConfig(*measured)
        if config.heads_per_tile in (heads, *others) and config.block_kv < 2 * kv_length:
            return config
    return default_config(head_dim, value_dim, block_size, kv_length, heads)


def default_config(head_dim: int, value_dim: int, block_size: int, kv_length: int, heads: int) -> HopperConfig:
    """The largest steps whose accumulators and buffers fit."""
    block_kv = 128 if max(head_dim, value_dim) <= 128 else 64
    while block_kv > 16 and block_kv >= 2 * kv_length:
        block_kv //= 2
    while True:
        for num_stages in (4, 3, 2):
            config = HopperConfig(heads, block_kv, num_stages)
            if config.shared_bytes(head_dim, value_dim, block_size, 3) <= SHARED_BYTES:
                return config
        block_kv //= 2  # HopperConfig refuses what no kernel is for


def choose_query_grad_config(
    head_dim: int, value_dim: int, block_size: int, kv_length: int, heads: int
) -> HopperConfig:
    """Tiles for the gradient of the queries, which has twice the rows and one more product of a step in registers."""
    block_kv = 64
    while block_kv > 16 and block_kv >= 2 * kv_length:
        block_kv //= 2
    while True:
        for num_stages in (3, 2):
            config = HopperConfig(heads, block_kv, num_stages)
            # Where the forward pass has an output of its own shape, there is dout.
            dout = ROWS * value_dim * 2 if value_dim == head_dim else 0
            if dout + config.shared_bytes(head_dim, value_dim, block_size, 3) <= SHARED_BYTES:
                return config
        block_kv //= 2


def choose_kv_grad_config(head_dim: int, value_dim: int, query_block: int, query_length: int) -> HopperConfig:
    """Tiles for the gradients of keys and values, whose steps are queries.

    Args:
      query_block: queries that are walked together; whole steps of them, or several in a step.
    """
    block_kv = 64
    while block_kv > 16 and (block_kv >= 2 * query_length or (query_block % block_kv and block_kv % query_block)):
        block_kv //= 2
    while True:
        for num_stages in (3, 2):
            rows, step = 2 * ROWS * (head_dim + value_dim), 2 * block_kv * (head_dim + value_dim)
            if rows + num_stages * (step + 8 * ALIGNMENT) + BARRIER_BYTES <= SHARED_BYTES:
                return HopperConfig(1, block_kv, num_stages)
        block_kv //= 2  # HopperConfig refuses what no kernel is for


def choose_heads(
    schedule: BlockSchedule | None, selection: BlockSelection | None, num_heads: int, num_kv_heads: int
) -> tuple[int, ...]:
    """How many query heads a tile can have, the best last: the more there are, the fewer rows are merged."""
    group = num_heads // num_kv_heads
    if selection is not None:
        shared = selection.counts.shape[1] != num_heads or group == 1
        return tuple(
            heads
            for heads in (8, 4, 2, 1)
            if group % heads == 0 and (shared or heads == 1) and selection.query_block % (ROWS // heads) == 0
        )
    assert schedule is not None
    return tuple(
        heads
        for heads in (1, 2, 4, 8)
        if heads == 1 or (group % heads == 0 and schedule.shares_groups and ROWS // heads >= schedule.block_size)
    )
