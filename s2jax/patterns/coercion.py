"""Patterns out of what people have at hand: functions, bool arrays, text."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool

from s2jax.messages import shown
from s2jax.patterns.base import Pattern
from s2jax.patterns.mask_mod import MaskMod
from s2jax.patterns.parsing import parse_pattern
from s2jax.patterns.token_mask import TokenMask

PatternLike = Pattern | Callable[[Any, Any, Any], Any] | Bool[Array, "#h t s"] | Bool[np.ndarray, "#h t s"] | str
"""What is taken wherever a pattern is; see `as_pattern`."""


def as_pattern(given: PatternLike) -> Pattern:
    """The pattern that something stands for.

    Args:
      given: a pattern; a function mask_mod(head, query_position, key_position) -> bool, for `MaskMod(function)`, which
        is causal; a concrete bool array [h or 1, t, s], for `TokenMask(array)`; or text, such as
        "LocalStride(64, 16, 8) | FirstTokens(4)", for `parse_pattern(text)`.

    Raises:
      ValueError: it is none of these, or does not make a pattern.
    """
    if isinstance(given, Pattern):
        try:
            hash(given)
        except TypeError as error:
            raise ValueError(
                f"{type(given).__name__} is no pattern, as it cannot be hashed ({error}): make it a frozen dataclass "
                "of hashable fields, @dataclasses.dataclass(frozen=True)"
            ) from None
        return given
    if isinstance(given, str):
        return parse_pattern(given)
    if isinstance(given, (np.ndarray, jax.Array)):
        return TokenMask(given)
    if isinstance(given, type) and issubclass(given, Pattern):
        raise ValueError(f"expected a pattern, got the class {given.__name__}: call it, as in {given.__name__}(...)")
    if callable(given) and not isinstance(given, type):
        return MaskMod(given)
    raise ValueError(
        "pattern must be one such as s2jax.LocalStride(), a function (head, query_position, key_position) -> bool, a "
        f"bool array [heads or 1, t, s], or text; got {type(given).__name__} {shown(given)}"
    )
