"""The part of a pattern that its statistics and checks are computed from."""

import typing
from collections.abc import Hashable

import numpy as np

from s2jax.patterns.bands import Band
from s2jax.patterns.head_groups import HeadGroups


class Rule(typing.Protocol):
    """The methods of `s2jax.Pattern` that say what each head reads; documented there."""

    @property
    def causal(self) -> bool: ...

    def mask_fn(
        self, head: int, query_position: np.ndarray, key_position: np.ndarray, heads: HeadGroups
    ) -> np.ndarray: ...

    def bands(
        self, heads: HeadGroups, head: int, block_size: int, num_rows: int, num_columns: int
    ) -> tuple[Band, ...] | None: ...

    def block_states(
        self, heads: HeadGroups, head: int, block_size: int, rows: np.ndarray, num_columns: int
    ) -> np.ndarray: ...

    def token_tiles(
        self, heads: HeadGroups, head: int, block_size: int, rows: np.ndarray, columns: np.ndarray, query_stop: int,
        kv_stop: int,
    ) -> np.ndarray: ...  # fmt: skip

    def head_key(self, heads: HeadGroups, head: int) -> Hashable: ...

    def schedule_block_size(self) -> int: ...

    def is_strided(self) -> bool: ...

    def check(self, heads: HeadGroups, query_length: int, kv_length: int, query_offset: int) -> None: ...
