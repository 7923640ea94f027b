"""A pattern from a bool array over tokens."""

import dataclasses
import functools
import hashlib

import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool

from s2jax.patterns.base import DEFAULT_BLOCK_SIZE, Pattern
from s2jax.patterns.checks import check_block_size, check_count


@dataclasses.dataclass(frozen=True, repr=False)
class TokenMask(Pattern):
    """Reads the tokens that are True in a mask, which takes t · s bytes for each head.

    The mask is copied; patterns of equal masks are equal and hash equal.

    Attributes:
      mask: bool [h or 1, t, s], query by key, a concrete array; 1: the same for every head. It must cover the input and
        may be longer.
      block_size: tokens in a block of the compiled pattern, a power of two from 16.
      query_offset: absolute position of the mask's first query.
    """

    mask: Bool[np.ndarray | Array, "h t s"] = dataclasses.field(compare=False)
    block_size: int = DEFAULT_BLOCK_SIZE
    query_offset: int = 0
    content: tuple[tuple[int, ...], tuple[bytes, ...]] = dataclasses.field(init=False)  # shape, digests of heads

    def __post_init__(self):
        check_block_size(self.block_size)
        check_count("query_offset", self.query_offset, at_least=0)
        if isinstance(self.mask, Tracer):
            raise ValueError(
                "a mask that JAX is tracing cannot be a pattern, which is compiled before it is run: pass a concrete "
                "array; for documents known at run time only there are query_segment_ids and kv_segment_ids, for "
                "blocks chosen at run time s2jax.BlockSelection"
            )
        mask = np.asarray(self.mask)
        if mask.dtype != bool or mask.ndim != 3 or not mask.size:
            hint = ""
            if mask.dtype == bool and mask.ndim in (2, 4):
                hint = "; pass mask[None]" if mask.ndim == 2 else "; one mask serves the whole batch: pass mask[0]"
            raise ValueError(f"a mask is bool [heads or 1, t, s], got {mask.dtype} {list(mask.shape)}{hint}")
        # Over immutable bytes an array cannot be made writeable again.
        mask = np.frombuffer(mask.tobytes(), bool).reshape(mask.shape)
        object.__setattr__(self, "mask", mask)
        digests = tuple(hashlib.blake2b(each, digest_size=16).digest() for each in mask)
        object.__setattr__(self, "content", (mask.shape, digests))

    @property
    def nbytes(self) -> int:
        return self.mask.nbytes

    def __repr__(self):
        content = hashlib.blake2b(b"".join(self.content[1]), digest_size=4).hexdigest()
        offset = f", query_offset={self.query_offset}" if self.query_offset else ""
        return f"TokenMask(<bool {list(self.mask.shape)} {content}>, block_size={self.block_size}{offset})"

    @functools.cached_property
    def causal(self) -> bool:
        """True if no query of the mask reads a later token."""
        key = np.arange(self.mask.shape[2])
        rows = enumerate(self.mask.swapaxes(0, 1), self.query_offset)
        return not any(mine[:, key > position].any() for position, mine in rows)

    def own_block_size(self) -> int | None:
        return self.block_size

    def check(self, heads, query_length, kv_length, query_offset):
        num_heads, rows, columns = self.mask.shape
        if num_heads not in (1, heads.num_heads):
            raise ValueError(f"this mask is for {num_heads} heads, got {heads.num_heads} query heads")
        if query_offset < self.query_offset or query_offset + query_length > self.query_offset + rows:
            raise ValueError(
                f"this mask [heads, t, s] = {list(self.mask.shape)} is for the queries {self.query_offset} to "
                f"{self.query_offset + rows - 1}, the input has {query_offset} to {query_offset + query_length - 1}"
            )
        if columns < kv_length:
            raise ValueError(
                f"this mask [heads, t, s] = {list(self.mask.shape)} is for {columns} keys, the input has {kv_length}"
            )

    def head_key(self, heads, head):
        return self.content[1][self._index(head)]

    def _index(self, head: int) -> int:
        return head if len(self.mask) > 1 else 0

    def mask_fn(self, head, query_position, key_position, heads):
        row = np.asarray(query_position) - self.query_offset
        inside = (row >= 0) & (row < self.mask.shape[1]) & (key_position < self.mask.shape[2])
        row, column = np.clip(row, 0, self.mask.shape[1] - 1), np.minimum(key_position, self.mask.shape[2] - 1)
        return np.asarray(self.mask)[self._index(head), row, column] & inside

    def bands(self, heads, head, block_size, num_rows, num_columns):
        return None

    def block_states(self, heads, head, block_size, rows, num_columns):
        mask, states = self.mask[self._index(head)], np.zeros((len(rows), num_columns), np.uint8)
        for index, row in enumerate(np.asarray(rows).tolist()):
            low = row * block_size - self.query_offset
            mine = mask[max(low, 0) : max(low + block_size, 0), : num_columns * block_size]
            if not mine.size:
                continue
            starts = np.arange(0, mine.shape[1], block_size)
            some = np.logical_or.reduceat(mine.any(0), starts)
            whole = np.logical_and.reduceat(mine.all(0), starts)
            # A block that the mask ends in is looked at token by token.
            whole &= (starts + block_size <= mine.shape[1]) & (len(mine) == block_size)
            states[index, : len(starts)] = some.astype(np.uint8) + whole
        return states
