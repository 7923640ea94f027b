"""A pattern from a bool array over blocks."""

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Bool

from s2jax.patterns.base import DEFAULT_BLOCK_SIZE, BlockPattern
from s2jax.patterns.checks import check_block_size, check_flag
from s2jax.patterns.simple import lowest_distance


@dataclasses.dataclass(frozen=True, repr=False)
class BlockMask(BlockPattern):
    """Reads the blocks that are True in a mask.

    The mask is copied; patterns of equal masks are equal and hash equal.

    Attributes:
      mask: bool [h or 1, n, n], query blocks by key blocks at absolute positions; 1: the same for every head. It must
        cover the input, n · block_size >= query_offset + t and >= s, and may be longer.
      block_size: tokens in a block, a power of two from 16.
      causal: True: additionally, no query reads a token after its own.
    """

    mask: Bool[np.ndarray, "h n n"] = dataclasses.field(compare=False)
    block_size: int = DEFAULT_BLOCK_SIZE
    causal: bool = True
    content: tuple[tuple[int, ...], bytes] = dataclasses.field(init=False)  # of equal masks: shape and digest

    def __post_init__(self):
        check_block_size(self.block_size)
        check_flag("causal", self.causal)
        mask = np.asarray(self.mask)
        if mask.dtype != bool or mask.ndim != 3 or mask.shape[1] != mask.shape[2] or not mask.size:
            raise ValueError(f"a BlockMask takes bool [heads or 1, n, n], got {mask.dtype} {list(mask.shape)}")
        # Over immutable bytes an array cannot be made writeable again.
        content = mask.tobytes()
        object.__setattr__(self, "mask", np.frombuffer(content, bool).reshape(mask.shape))
        object.__setattr__(self, "content", (mask.shape, hashlib.blake2b(content, digest_size=16).digest()))

    @property
    def nbytes(self) -> int:
        return self.mask.nbytes

    def __repr__(self):
        causal = "" if self.causal else ", causal=False"
        shape, digest = self.content
        return f"BlockMask(<bool {list(shape)} {digest.hex()[:8]}>, block_size={self.block_size}{causal})"

    def check(self, heads, query_length, kv_length, query_offset):
        if len(self.mask) not in (1, heads.num_heads):
            raise ValueError(f"this BlockMask is for {len(self.mask)} heads, got {heads.num_heads} query heads")
        needed, reach = max(query_offset + query_length, kv_length), self.mask.shape[1] * self.block_size
        if reach < needed:
            raise ValueError(
                f"this BlockMask reaches {reach} tokens ({self.mask.shape[1]} blocks of {self.block_size}), shorter "
                f"than the input: expected at least {needed}"
            )

    def head_key(self, heads, head):
        return head if len(self.mask) > 1 else 0

    def mask_fn(self, head, query_position, key_position, heads):
        i, j = query_position // self.block_size, key_position // self.block_size
        # Positions beyond the mask occur in padding only.
        last = self.mask.shape[1] - 1
        found = self.mask[self.head_key(heads, head), np.minimum(i, last), np.minimum(j, last)]
        inside = (i <= last) & (j <= last)
        return found & inside & (query_position - key_position >= lowest_distance(self.causal))

    def block_bands(self, heads, head, num_rows, num_columns):
        return None

    def block_states(self, heads, head, block_size, rows, num_columns):
        ratio = self._ratio(block_size)
        reach = self.mask.shape[1] * ratio
        known, width = rows < reach, min(num_columns, reach)
        i, j = rows[known, None], np.arange(width)
        some = np.repeat(self.mask[self.head_key(heads, head)][rows[known] // ratio], ratio, axis=1)[:, :width]
        some = some & ((j <= i) | (not self.causal))
        states = np.zeros((len(rows), num_columns), np.uint8)
        states[known, :width] = some.astype(np.uint8) + (some & ((j < i) | (not self.causal)))
        return states
