"""Conversion of functions, bool arrays and text to patterns."""

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
"""Anything that is accepted in the place of a pattern; see `as_pattern`."""


def as_pattern(given: PatternLike) -> Pattern:
    """Converts a function, a bool array or text to a pattern.

    Args:
      given: a pattern, which is returned unchanged; a function mask_mod(head, query_position, key_position) -> bool,
        which becomes `MaskMod(function)` and is causal; a concrete bool array [h or 1, t, s], which becomes
        `TokenMask(array)`; or text for `parse_pattern`, such as "LocalStride(64, 16, 8) | FirstTokens(4)".

    Raises:
      ValueError: the argument is none of these, or does not make a pattern.
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
