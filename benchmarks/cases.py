"""Shapes and patterns of the benchmarks."""

import dataclasses

import s2jax


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape and its pattern, whose window and stride are counted in blocks of 64 tokens.

    Without a window and a stride, both 0, the pattern is dense.
    """

    name: str
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    local_blocks: int
    vert_stride: int
    tokens: int

    @property
    def is_dense(self) -> bool:
        return not self.local_blocks

    def pattern(self, block_size: int = 64) -> s2jax.LocalStride | s2jax.Dense:
        """The pattern at another block size, with as many tokens in its window; a window of one block keeps one."""
        if self.is_dense:
            return s2jax.Dense()
        window = self.local_blocks * 64 // block_size if self.local_blocks > 1 else 1
        return s2jax.LocalStride(block_size, window, self.vert_stride)


CASES = (
    Case("dkernel-32k", 4, 16, 16, 128, 8, 16, 32 << 10),
    Case("dkernel-32k-v4", 4, 16, 16, 128, 8, 4, 32 << 10),
    Case("phi3-8k", 4, 32, 8, 128, 16, 8, 8 << 10),
    Case("phi3-128k", 1, 32, 8, 128, 16, 8, 128 << 10),
    Case("s2-1.3b-128k", 1, 16, 16, 128, 1, 16, 128 << 10),
    Case("s2-7b-128k", 1, 32, 32, 128, 1, 32, 128 << 10),
    Case("s2-70b-128k", 1, 64, 64, 128, 1, 64, 128 << 10),
)

DENSE_CASES = tuple(
    Case(f"dense-{tokens >> 10}k-d{head_dim}", (16 << 10) // tokens, heads, heads, head_dim, 0, 0, tokens)
    for tokens in (4 << 10, 16 << 10)
    for head_dim, heads in ((64, 32), (128, 16))
)
"""16k tokens in all, and heads · head dim = 2048: shapes for which peers publish figures."""

CPU_CASES = (
    Case("cpu-8k", 1, 8, 8, 128, 8, 16, 8 << 10),
    Case("cpu-8k-gqa", 1, 8, 2, 128, 16, 8, 8 << 10),
    Case("cpu-8k-l1", 1, 16, 16, 64, 1, 16, 8 << 10),
)
"""Patterns of DKernel, Phi-3-small and S2-Attention at a length that a CPU can compute."""
