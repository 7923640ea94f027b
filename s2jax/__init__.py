"""Sparsely-sharded attention for JAX.

`attention` computes it by a pattern, which gives each query head the keys that it reads. `KVCache` keeps the keys and
values that later tokens will read. `s2jax.nnx` and `s2jax.linen` have the layers.
"""

import importlib
import typing

from pallas_kernels import BlockSchedule, BlockSelection, HopperConfig, TpuConfig, XlaConfig, block_sparse_attention
from s2jax.cache import CacheLayout, KVCache, compile_cache
from s2jax.compiler import compile_schedule
from s2jax.functional import attention, combine
from s2jax.patterns import (
    BlockMask,
    Dense,
    FirstBlocks,
    FirstTokens,
    Local,
    LocalStride,
    MaskMod,
    Pattern,
    PatternWarning,
    PerHead,
    Ranges,
    RelativeStride,
    Strided,
    TokenMask,
    as_pattern,
    parse_pattern,
)
from s2jax.rotary import RopeScaling

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "BlockSchedule",
    "BlockSelection",
    "CacheLayout",
    "Dense",
    "FirstBlocks",
    "FirstTokens",
    "HopperConfig",
    "KVCache",
    "Local",
    "LocalStride",
    "MaskMod",
    "Pattern",
    "PatternWarning",
    "PerHead",
    "Ranges",
    "RelativeStride",
    "RopeScaling",
    "Strided",
    "TokenMask",
    "TpuConfig",
    "XlaConfig",
    "as_pattern",
    "attention",
    "block_sparse_attention",
    "combine",
    "compile_cache",
    "compile_schedule",
    "parse_pattern",
]

if typing.TYPE_CHECKING:
    from s2jax import linen as linen
    from s2jax import nnx as nnx

LAYERS = ("linen", "nnx")
"""Modules that import Flax, and so are imported when they are first asked for."""


def __getattr__(name: str) -> typing.Any:
    if name not in LAYERS:
        raise AttributeError(f"module 's2jax' has no attribute {name!r}")
    try:
        return importlib.import_module(f"s2jax.{name}")
    except ModuleNotFoundError as error:
        if error.name != "flax":
            raise
        raise ImportError(f"s2jax.{name} needs Flax: pip install flax") from None


def __dir__() -> list[str]:
    return sorted([*globals(), *LAYERS])
