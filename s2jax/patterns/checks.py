"""Checks of a pattern's parameters: one clear error each."""

import numpy as np

from s2jax.messages import shown
from s2jax.patterns.bands import UNBOUNDED

Window = int | tuple[int, int]
"""The extent of a window: one number, or (left, right)."""

MOST_TOKENS = 1 << 30
"""Positions are int32, and lengths are added."""

LARGEST_BLOCK = 4096
"""The square of it is the size of a token mask."""


def is_integer(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_count(name: str, value, *, at_least: int) -> None:
    """Raises ValueError unless `value` is an integer of at least `at_least`."""
    if not is_integer(value) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {shown(value)}")
    if value > UNBOUNDED:
        raise ValueError(f"{name} must be an integer of at most 2**40, got {shown(value)}")


def check_length(name: str, value, *, at_least: int) -> None:
    """Raises ValueError unless `value` is a number of tokens of at least `at_least` and below 2**30."""
    if is_integer(value) and value >= MOST_TOKENS:
        raise ValueError(f"{name} must be an integer below 2**30, got {shown(value)}")
    check_count(name, value, at_least=at_least)


def check_counts(**values) -> None:
    """Raises ValueError unless each of the named values is an integer of at least 1."""
    for name, value in values.items():
        check_count(name, value, at_least=1)


def check_flag(name: str, value) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")


def check_block_size(value) -> None:
    """Raises ValueError unless `value` is a power of two from 16 to 4096."""
    if not is_integer(value) or not 16 <= value <= LARGEST_BLOCK or value & (value - 1):
        raise ValueError(
            f"block_size must be a power of two from 16 to {LARGEST_BLOCK} (16, 32, 64, 128, …), got {shown(value)}"
        )


def check_window(name: str, value, causal: bool) -> None:
    """Raises ValueError unless `value` is a count or, in a bidirectional pattern, a pair of counts (left, right)."""
    if isinstance(value, tuple):
        if causal:
            raise ValueError(f"{name} of a causal pattern has a left side only: give one integer, got {shown(value)}")
        if len(value) != 2:
            raise ValueError(f"{name} must be one integer or a pair (left, right), got {shown(value)}")
    for side in value if isinstance(value, tuple) else (value,):
        check_count(name, side, at_least=0)


def window_sides(value: Window, causal: bool) -> tuple[int, int]:
    """The extents of a window to the left and right; the right of a causal one is unbounded, as causality cuts it."""
    if isinstance(value, tuple):
        return value
    return value, UNBOUNDED if causal else value
