"""s2jax: sparsely-sharded attention for JAX.

`attention` computes it, a pattern says who reads whom, `s2jax.nnx` and `s2jax.linen` hold the layers.
"""

from pallas_kernels import BlockSchedule, BlockSelection, HopperTiles, TpuTiles, XlaTiles, block_sparse_attention
from s2jax.compiler import compile_schedule
from s2jax.functional import attention, combine
from s2jax.patterns import (
    BlockMask,
    Dense,
    FirstBlocks,
    FirstTokens,
    Local,
    LocalStride,
    Pattern,
    PatternWarning,
    PerHead,
    Ranges,
    RelativeStride,
    Strided,
)

__all__ = [
    "BlockMask",
    "BlockSchedule",
    "BlockSelection",
    "Dense",
    "FirstBlocks",
    "FirstTokens",
    "HopperTiles",
    "Local",
    "LocalStride",
    "Pattern",
    "PatternWarning",
    "PerHead",
    "Ranges",
    "RelativeStride",
    "Strided",
    "TpuTiles",
    "XlaTiles",
    "attention",
    "block_sparse_attention",
    "combine",
    "compile_schedule",
]
