"""Who reads whom: patterns, written as rules and composed with `|` and `&`."""

from s2jax.patterns.base import BlockPattern, Intersection, Pattern, Union
from s2jax.patterns.block_mask import BlockMask
from s2jax.patterns.heads import Heads
from s2jax.patterns.local_stride import LocalStride
from s2jax.patterns.per_head import PerHead
from s2jax.patterns.ranges import Ranges
from s2jax.patterns.relative_stride import RelativeStride
from s2jax.patterns.simple import Dense, FirstBlocks, FirstTokens, Local
from s2jax.patterns.statistics import PatternWarning
from s2jax.patterns.striped import Strided

__all__ = [
    "BlockMask",
    "BlockPattern",
    "Dense",
    "FirstBlocks",
    "FirstTokens",
    "Heads",
    "Intersection",
    "Local",
    "LocalStride",
    "Pattern",
    "PatternWarning",
    "PerHead",
    "Ranges",
    "RelativeStride",
    "Strided",
    "Union",
]
