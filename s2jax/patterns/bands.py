"""Bands: the closed form that the pattern families share, and its algebra.

A band lets query block i read key block j when their distance i - j lies in an interval and j lies in a set of
columns; inside a pair of blocks it may cut by exact token distance and by a number of leading tokens of the column.
Unions and intersections of bands are again bands, so that `|` and `&` of patterns stay O(n) per head.
"""

import dataclasses
import functools
import math

import numpy as np

UNBOUNDED = 1 << 40
"""Farther than any token or block is from any other."""

MAX_PERIOD = 4096
"""Bands whose columns depend on the row through a longer period than this are left to the general path."""


@dataclasses.dataclass(frozen=True, eq=False)
class Band:
    """The keys that one head reads at some distances.

    Query block i, token q, reads key block j, token k, where

        block_low <= i - j < block_high,  token_low <= q - k < token_high,  k - j * block_size < columns[i % period, j]

    Attributes:
      columns: int [period, blocks]: how many leading tokens of each key block may be read, 0 to block_size.
    """

    columns: np.ndarray
    block_low: int = -UNBOUNDED
    block_high: int = UNBOUNDED
    token_low: int = -UNBOUNDED
    token_high: int = UNBOUNDED

    def __post_init__(self):
        if self.columns.ndim != 2:
            raise ValueError(f"a band's columns have the shape [period, blocks], got {self.columns.shape}")

    @property
    def period(self) -> int:
        return self.columns.shape[0]

    def rows(self, block_row: np.ndarray) -> np.ndarray:
        """Column limits of the given query blocks: int [rows, blocks]."""
        return self.columns[np.asarray(block_row) % self.period]


def all_columns(num_columns: int, block_size: int) -> np.ndarray:
    """Columns of a band that reads every block whole."""
    return np.full((1, num_columns), block_size, np.int32)


def with_period(columns: np.ndarray, period: int) -> np.ndarray:
    return np.tile(columns, (period // columns.shape[0], 1))


def refine(band: Band, ratio: int, block_size: int, num_columns: int) -> tuple[Band, ...]:
    """The bands that read the same over blocks `ratio` times smaller.

    With I = i // R, J = j // R and the phase a = i mod R, the coarse I - J < high is the fine
    i - j < (high - 1) R + 1 + a, and I - J >= low is i - j >= (low - 1) R + 1 + a. So the distances at which the
    phase decides are R - 1 at each end of the interval; there, it decides by comparing j mod R with a.

    Args:
      band: the band over coarse blocks.
      ratio: fine blocks in a coarse block.
      block_size: tokens in a fine block.
      num_columns: fine key blocks.
    """
    low, high = band.block_low, band.block_high
    if low >= high:
        return ()
    column = np.arange(num_columns)
    limit = np.clip(band.columns[:, column // ratio] - column % ratio * block_size, 0, block_size)
    if band.period > 1:
        limit = np.repeat(limit, ratio, axis=0)
    phase = np.arange(len(limit) if band.period > 1 else ratio)[:, None] % ratio
    low_bound, high_bound = abs(low) < UNBOUNDED, abs(high) < UNBOUNDED
    core = (low * ratio if low_bound else low, (high - 1) * ratio + 1 if high_bound else high)
    pieces = [(limit, *core)]
    if low_bound:
        pieces.append((np.where(column % ratio > phase, limit, 0), core[0] - ratio + 1, core[0]))
    if high_bound:
        pieces.append((np.where(column % ratio < phase, limit, 0), core[1], core[1] + ratio - 1))
    fine = (dataclasses.replace(band, columns=table, block_low=a, block_high=b) for table, a, b in pieces)
    return tuple(each for each in fine if not is_empty(each, block_size))


def is_empty(band: Band, block_size: int) -> bool:
    """True if the band reads nothing: its intervals do not meet, or it has no columns."""
    nearest, farthest = band.block_low * block_size - block_size + 1, band.block_high * block_size - 1
    reachable = nearest < band.token_high and farthest >= band.token_low
    return band.block_low >= band.block_high or not reachable or not band.columns.any()


def intersect(first: Band, second: Band) -> Band | None:
    """The band that both read, or None if their intervals do not meet."""
    band = Band(
        functools.reduce(np.minimum, _same_period(first, second)),
        max(first.block_low, second.block_low),
        min(first.block_high, second.block_high),
        max(first.token_low, second.token_low),
        min(first.token_high, second.token_high),
    )
    empty = band.block_low >= band.block_high or band.token_low >= band.token_high or not band.columns.any()
    return None if empty else band


def _same_period(*bands: Band) -> list[np.ndarray]:
    period = math.lcm(*(band.period for band in bands))
    return [with_period(band.columns, period) for band in bands]


def intersect_all(first: tuple[Band, ...], second: tuple[Band, ...]) -> tuple[Band, ...] | None:
    """The intersection of two unions of bands; None if a period would exceed `MAX_PERIOD`."""
    met = []
    for a in first:
        for b in second:
            if math.lcm(a.period, b.period) > MAX_PERIOD:
                return None
            band = intersect(a, b)
            if band is not None:
                met.append(band)
    return tuple(met)


def block_states(bands: tuple[Band, ...], block_size: int, rows: np.ndarray, num_columns: int) -> np.ndarray:
    """The states of pairs of blocks.

    Args:
      bands: bands of one head.
      block_size: tokens in a block.
      rows: int [rows], absolute query blocks.
      num_columns: count of key blocks.

    Returns:
      uint8 [rows, num_columns]: 0 = nothing, 1 = a part or maybe nothing, 2 = every token by every token.
    """
    distance = np.asarray(rows)[:, None] - np.arange(num_columns)[None, :]
    nearest, farthest = distance * block_size - (block_size - 1), distance * block_size + (block_size - 1)
    states = np.zeros(distance.shape, np.uint8)
    for band in bands:
        limit = band.rows(rows)[:, :num_columns]
        inside = (distance >= band.block_low) & (distance < band.block_high)
        some = inside & (farthest >= band.token_low) & (nearest < band.token_high) & (limit > 0)
        whole = inside & (nearest >= band.token_low) & (farthest < band.token_high) & (limit >= block_size)
        np.maximum(states, np.where(whole, 2, some).astype(np.uint8), out=states)
    return states
