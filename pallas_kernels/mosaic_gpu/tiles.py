"""Tile sizes of the Hopper kernels, and which to take."""

import dataclasses

from pallas_kernels.mosaic_gpu.plan import ROWS, word_bits
from pallas_kernels.mosaic_gpu.tuned import tuned_tiles
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection

SHARED_BYTES = 227 << 10
"""Shared memory of a block of threads on Hopper."""

ALIGNMENT = 1 << 10
"""Of every buffer in shared memory."""

BARRIER_BYTES = 3 << 10
"""Room for barriers and for what Mosaic GPU itself needs."""


@dataclasses.dataclass(frozen=True)
class HopperTiles:
    """Tile sizes of the Hopper kernels. Of those that a caller asks for, the gradients take the heads alone.

    Attributes:
      heads: query heads in a tile of 128 rows; they must read the same blocks.
      keys: keys of a step.
      stages: steps that are loaded ahead.
    """

    heads: int = 1
    keys: int = 128
    stages: int = 2

    def __post_init__(self):
        for name, value, allowed in (
            ("heads", self.heads, (1, 2, 4, 8)),
            ("keys", self.keys, (16, 32, 64, 128, 256)),
            ("stages", self.stages, range(2, 9)),
        ):
            if type(value) is not int or value not in allowed:
                raise ValueError(f"{name} must be one of the integers {', '.join(map(str, allowed))}, got {value!r}")

    @property
    def queries(self) -> int:
        """Queries of every head in a tile."""
        return ROWS // self.heads

    def word_bits(self, block_size: int) -> int:
        """How many bits of a word of a mask are used."""
        return word_bits(min(block_size, self.keys))

    def shared_bytes(self, head_dim: int, value_dim: int, block_size: int, mask_arrays: int) -> int:
        """Shared memory of the forward kernel, for 2-byte elements: as much as it takes, or a little more."""
        words = self.keys // self.word_bits(block_size) * ROWS * 4
        buffers = [
            ROWS * head_dim * 2,
            ROWS * value_dim * 2 if value_dim != head_dim else 0,
            self.stages * self.keys * head_dim * 2,
            self.stages * self.keys * value_dim * 2,
            self.stages * words,
            *[self.stages * self.keys * 4] * (mask_arrays - 1),
            ROWS * 4,
        ]
        return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in buffers) + BARRIER_BYTES


def choose_tiles(
    head_dim: int, value_dim: int, block_size: int, kv_length: int, heads: int, others: tuple[int, ...] = ()
) -> HopperTiles:
    """Tiles for a head dim and block size: those measured best, else the usual ones.

    Args:
      heads: of a tile, the best as long as nothing was measured.
      others: numbers of heads that a tile can have too.
    """
    measured = tuned_tiles().get((head_dim, value_dim, block_size, heads))
    if measured is not None:
        tiles = HopperTiles(*measured)
        if tiles.heads in (heads, *others) and tiles.keys < 2 * kv_length:
            return tiles
    return usual_tiles(head_dim, value_dim, block_size, kv_length, heads)


def usual_tiles(head_dim: int, value_dim: int, block_size: int, kv_length: int, heads: int) -> HopperTiles:
    """The largest steps whose accumulators and buffers fit."""
    keys = 128 if max(head_dim, value_dim) <= 128 else 64
    while keys > 16 and keys >= 2 * kv_length:
        keys //= 2
    while True:
        for stages in (4, 3, 2):
            tiles = HopperTiles(heads, keys, stages)
            if tiles.shared_bytes(head_dim, value_dim, block_size, 3) <= SHARED_BYTES:
                return tiles
        keys //= 2  # HopperTiles refuses what no kernel is for


def choose_gradient_tiles(head_dim: int, value_dim: int, block_size: int, kv_length: int, heads: int) -> HopperTiles:
    """Tiles for the gradient of the queries, which has twice the rows and one more product of a step in registers."""
    keys = 64
    while keys > 16 and keys >= 2 * kv_length:
        keys //= 2
    while True:
        for stages in (3, 2):
            tiles = HopperTiles(heads, keys, stages)
            # Where the forward pass has an output of its own shape, there is dout.
            dout = ROWS * value_dim * 2 if value_dim == head_dim else 0
            if dout + tiles.shared_bytes(head_dim, value_dim, block_size, 3) <= SHARED_BYTES:
                return tiles
        keys //= 2


def choose_key_tiles(head_dim: int, value_dim: int, query_block: int, query_length: int) -> HopperTiles:
    """Tiles for the gradients of keys and values, whose steps are queries.

    Args:
      query_block: queries that are walked together; whole steps of them, or several in a step.
    """
    keys = 64
    while keys > 16 and (keys >= 2 * query_length or (query_block % keys and keys % query_block)):
        keys //= 2
    while True:
        for stages in (3, 2):
            rows, step = 2 * ROWS * (head_dim + value_dim), 2 * keys * (head_dim + value_dim)
            if rows + stages * (step + 8 * ALIGNMENT) + BARRIER_BYTES <= SHARED_BYTES:
                return HopperTiles(1, keys, stages)
        keys //= 2  # HopperTiles refuses what no kernel is for


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
