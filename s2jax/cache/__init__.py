"""A KV cache that holds the blocks which later tokens will read, and nothing else."""

from s2jax.cache.kv_cache import KVCache
from s2jax.cache.layout import CacheLayout, compile_cache

__all__ = ["CacheLayout", "KVCache", "compile_cache"]
