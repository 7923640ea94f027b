"""Patterns that are the same for every head: everything, a window, the first tokens or blocks."""

import dataclasses

import numpy as np

from s2jax.patterns.bands import UNBOUNDED, Band, all_columns
from s2jax.patterns.base import DEFAULT_BLOCK_SIZE, BlockPattern, Pattern
from s2jax.patterns.checks import Window, check_block_size, check_count, check_flag, check_window, window_sides


def lowest_distance(causal: bool) -> int:
    """The smallest q - k that is allowed."""
    return 0 if causal else -UNBOUNDED


@dataclasses.dataclass(frozen=True, repr=False)
class Dense(Pattern):
    """Reads every key, or every key up to the query's own position if `causal`."""

    causal: bool = True

    def __post_init__(self):
        check_flag("causal", self.causal)

    def head_key(self, heads, head):
        return None

    def mask_fn(self, head, query_position, key_position, heads):
        return query_position - key_position >= lowest_distance(self.causal)

    def bands(self, heads, head, block_size, num_rows, num_columns):
        return (Band(all_columns(num_columns, block_size), token_low=lowest_distance(self.causal)),)


@dataclasses.dataclass(frozen=True, repr=False)
class Local(BlockPattern):
    """Reads a sliding window, of whole blocks or of an exact number of tokens.

    With `blocks` = L, query block i reads the key blocks i - j < L; with `tokens` = w, query q reads the keys
    q - k < w: its own position counts, as in Mistral's `sliding_window`. If `causal`, no token after its own. If not,
    the window reaches as far ahead as behind, or for a pair (left, right): i - j < left and j - i < right. (The
    window sizes of FlashAttention and `jax.nn` leave out the query's own position: theirs plus one are ours.)

    Attributes:
      blocks: blocks in the window, or a pair (left, right) if not causal; the own block counts on both sides.
      tokens: the same in tokens. Exactly one of the two is given.
      block_size: tokens in a block, a power of two from 16, by default 64; for `blocks` only.
      causal: True: no query reads a token after its own.
    """

    blocks: Window | None = None
    tokens: Window | None = dataclasses.field(default=None, kw_only=True)
    block_size: int = dataclasses.field(default=None)  # type: ignore[assignment]
    causal: bool = True

    def __post_init__(self):
        check_flag("causal", self.causal)
        if (self.blocks is None) == (self.tokens is None):
            raise ValueError(f"Local takes either blocks or tokens, got blocks={self.blocks}, tokens={self.tokens}")
        if self.tokens is None:
            check_window("blocks", self.blocks, self.causal)
            if self.block_size is None:
                object.__setattr__(self, "block_size", DEFAULT_BLOCK_SIZE)
            check_block_size(self.block_size)
        else:
            check_window("tokens", self.tokens, self.causal)
            if self.block_size is not None:
                raise ValueError(f"a window of tokens has no blocks, got block_size={self.block_size}")

    def head_key(self, heads, head):
        return None

    def _sides(self) -> tuple[int, int]:
        extent = self.blocks if self.tokens is None else self.tokens
        assert extent is not None
        return window_sides(extent, self.causal)

    def mask_fn(self, head, query_position, key_position, heads):
        distance = query_position - key_position
        allowed = distance >= lowest_distance(self.causal)
        if self.tokens is None:
            distance = query_position // self.block_size - key_position // self.block_size
        left, right = self._sides()
        return (distance < left) & (-distance < right) & allowed

    def bands(self, heads, head, block_size, num_rows, num_columns):
        if self.tokens is None:
            return super().bands(heads, head, block_size, num_rows, num_columns)
        left, right = self._sides()
        low = 0 if self.causal else 1 - right
        return (Band(all_columns(num_columns, block_size), token_low=low, token_high=left),) if low < left else ()

    def block_bands(self, heads, head, num_rows, num_columns):
        left, right = self._sides()
        everything = all_columns(num_columns, self.block_size)
        low = max(1 - right, -UNBOUNDED)
        return (Band(everything, low, left, lowest_distance(self.causal)),) if low < left else ()


@dataclasses.dataclass(frozen=True, repr=False)
class FirstTokens(Pattern):
    """Reads the first `count` tokens: attention sinks (StreamingLLM, arXiv 2309.17453).

    The *logits* that are also called sinks read nothing; see `s2jax.attention`.
    """

    count: int
    causal: bool = True

    def __post_init__(self):
        check_count("count", self.count, at_least=0)
        check_flag("causal", self.causal)

    def head_key(self, heads, head):
        return None

    def mask_fn(self, head, query_position, key_position, heads):
        return (key_position < self.count) & (query_position - key_position >= lowest_distance(self.causal))

    def bands(self, heads, head, block_size, num_rows, num_columns):
        limit = np.clip(self.count - np.arange(num_columns) * block_size, 0, block_size)
        return (Band(limit[None].astype(np.int32), token_low=lowest_distance(self.causal)),)


@dataclasses.dataclass(frozen=True, repr=False)
class FirstBlocks(BlockPattern):
    """Reads the first `count` blocks: attention sinks (StreamingLLM, arXiv 2309.17453), by blocks."""

    count: int
    block_size: int = DEFAULT_BLOCK_SIZE
    causal: bool = True

    def __post_init__(self):
        check_count("count", self.count, at_least=0)
        check_block_size(self.block_size)
        check_flag("causal", self.causal)

    def head_key(self, heads, head):
        return None

    def mask_fn(self, head, query_position, key_position, heads):
        allowed = query_position - key_position >= lowest_distance(self.causal)
        return (key_position // self.block_size < self.count) & allowed

    def block_bands(self, heads, head, num_rows, num_columns):
        columns = np.where(np.arange(num_columns) < self.count, self.block_size, 0)
        return (Band(columns[None].astype(np.int32), token_low=lowest_distance(self.causal)),)
