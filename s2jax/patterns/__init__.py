"""Patterns of attention, written as rules and composed with `|` and `&`."""

from s2jax.patterns.base import BlockPattern, Intersection, Pattern, Union
from s2jax.patterns.block_mask import BlockMask
from s2jax.patterns.coercion import PatternLike, as_pattern
from s2jax.patterns.head_groups import HeadGroups
from s2jax.patterns.local_stride import LocalStride
from s2jax.patterns.mask_mod import MaskMod
from s2jax.patterns.parsing import parse_pattern
from s2jax.patterns.per_head import PerHead
from s2jax.patterns.ranges import Ranges
from s2jax.patterns.relative_stride import RelativeStride
from s2jax.patterns.simple import Dense, FirstBlocks, FirstTokens, Local
from s2jax.patterns.statistics import PatternWarning
from s2jax.patterns.striped import Strided
from s2jax.patterns.token_mask import TokenMask

__all__ = [
    "BlockMask",
    "BlockPattern",
    "Dense",
    "FirstBlocks",
    "FirstTokens",
    "HeadGroups",
    "Intersection",
    "Local",
    "LocalStride",
    "MaskMod",
    "Pattern",
    "PatternLike",
    "PatternWarning",
    "PerHead",
    "Ranges",
    "RelativeStride",
    "Strided",
    "TokenMask",
    "Union",
    "as_pattern",
    "parse_pattern",
]
