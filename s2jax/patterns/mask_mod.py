"""A pattern from a function of head and positions."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from s2jax.messages import shown
from s2jax.patterns.base import DEFAULT_BLOCK_SIZE, Pattern
from s2jax.patterns.checks import check_block_size, check_flag
from s2jax.patterns.evaluation import outside_traces
from s2jax.patterns.function_key import function_key
from s2jax.patterns.mask_evaluation import MaskEvaluator
from s2jax.patterns.simple import lowest_distance

MaskFunction = Callable[[Any, Any, Any], Any]
"""mask_mod(head, query_position, key_position) -> bool, over integer arrays that broadcast."""


@dataclasses.dataclass(frozen=True, repr=False)
class MaskMod(Pattern):
    """Reads the tokens for which a function returns True, as FlexAttention's `mask_mod` does.

        MaskMod(lambda head, q, k: (q - k) % 2 == 0)  # every second token
        MaskMod(lambda head, q, k: (k < 100) | (k <= q), causal=False)  # prefix LM

    The function gets the query head (an integer scalar, 0 … h - 1) and integer arrays of absolute positions that
    broadcast against each other, and returns bools of the broadcast shape. It is made of operators, jax.numpy or
    numpy, and decides each pair by its head and positions alone. It may capture arrays, such as document ids, which
    must be as long as the positions: JAX clamps indices beyond an array's end. It is evaluated while the pattern is
    compiled, in tiles, over int64: by a compiled function if JAX can trace it, else by numpy.

    Two MaskMods are equal if their functions have equal code and capture equal values, so that a lambda in a loop
    compiles once. What it captures must not change afterwards.

    Attributes:
      mask_mod: the function.
      block_size: tokens in a block of the compiled pattern, a power of two from 16. Blocks that read nothing cost
        nothing; small blocks follow fine structure, large ones have less overhead.
      causal: True: additionally, no query reads a token after its own.
    """

    mask_mod: MaskFunction = dataclasses.field(compare=False)
    block_size: int = DEFAULT_BLOCK_SIZE
    causal: bool = True
    key: Hashable = dataclasses.field(init=False)  # of equal functions, see `function_key`

    def __post_init__(self):
        check_block_size(self.block_size)
        check_flag("causal", self.causal)
        _check_signature(self.mask_mod)
        object.__setattr__(self, "key", function_key(self.mask_mod))

    def __deepcopy__(self, memo) -> "MaskMod":
        return self

    def __repr__(self):
        causal = "" if self.causal else ", causal=False"
        return f"MaskMod({_name_of(self.mask_mod)}, block_size={self.block_size}{causal})"

    def own_block_size(self) -> int | None:
        return self.block_size

    def check(self, heads, query_length, kv_length, query_offset):
        if function_key(self.mask_mod) != self.key:
            raise ValueError(
                f"{self!r}: what its function captures has changed since the pattern was made; make another MaskMod"
            )

    @outside_traces
    def head_key(self, heads, head) -> Hashable:
        return _evaluator(self).head_key(head)

    @outside_traces
    def mask_fn(self, head, query_position, key_position, heads):
        found = _evaluator(self).pairs(head, np.asarray(query_position), np.asarray(key_position))
        return found & (query_position - key_position >= lowest_distance(self.causal))

    def bands(self, heads, head, block_size, num_rows, num_columns):
        return None

    def block_states(self, heads, head, block_size, rows, num_columns):
        """All blocks that causality allows are 1, perhaps read: the function is evaluated once, on tokens."""
        visible = (np.arange(num_columns) <= np.asarray(rows)[:, None]) | (not self.causal)
        return visible.astype(np.uint8)

    @outside_traces
    def token_tiles(self, heads, head, block_size, rows, columns, query_stop, kv_stop):
        return _evaluator(self).tiles(head, block_size, rows, columns, query_stop, kv_stop, self.causal)


@functools.lru_cache(maxsize=16)
def _evaluator(pattern: MaskMod) -> MaskEvaluator:
    """The evaluator of the pattern's function, with the programs that JAX compiled for it: so few are kept."""
    return MaskEvaluator(pattern.mask_mod, repr(pattern))


def _name_of(function: MaskFunction) -> str:
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", type(function).__name__).replace("<locals>.", "")
    return f"<{name.strip('<>')}{f', line {code.co_firstlineno}' if code else ''}>"


def _check_signature(function: MaskFunction) -> None:
    expected = "a MaskMod takes a function mask_mod(head, query_position, key_position) -> bool"
    if not callable(function) or isinstance(function, type):
        raise ValueError(f"{expected}, got {shown(function)}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in functions have none
        return
    try:
        signature.bind(0, 0, 0)
    except TypeError:
        try:
            signature.bind(0, 0, 0, 0)
            batch = (
                "; FlexAttention's mask_mod takes the batch index first, which no pattern depends on: pass "
                "lambda head, q, k: mask_mod(0, head, q, k), and documents as query_segment_ids and kv_segment_ids"
            )
        except TypeError:
            batch = ""
        raise ValueError(f"{expected}, got one that takes {signature}{batch}") from None
