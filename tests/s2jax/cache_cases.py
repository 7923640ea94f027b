"""What the tests of the KV cache share: patterns, tokens, and a cache for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2jax import (
    BlockMask,
    Dense,
    FirstBlocks,
    FirstTokens,
    KVCache,
    Local,
    LocalStride,
    PerHead,
    Ranges,
    Strided,
    attention,
)

LENGTH = 180
STRIDE = LocalStride(16, 2, 3)
PATTERNS = {
    "dense": Dense(),
    "local stride": STRIDE,
    "stripes by query head": LocalStride(16, 1, 4, 1, 1, residues="query_head"),
    "dense heads": LocalStride(16, 2, 4, num_dense_heads=1),
    "nothing": BlockMask(np.zeros((1, 12, 12), bool), 16),
    "rows that read nothing": LocalStride(16, 0, 4, head_offset=1),
    "ranges": Ranges(((2, 1), (None, 3)), 16),
    "read again after a while": Ranges(((2, 2), (None, 3)), 16),
    "first tokens": FirstTokens(5) | Local(tokens=18) | FirstBlocks(0, 16),
    "any mask": BlockMask(np.random.default_rng(1).random((4, 12, 12)) < 0.4, 16),
    "by head": PerHead([Dense(), LocalStride(16, 1, 3), Local(tokens=9), Strided(16, 2)]),
}
BOUNDED = {
    "blocks": Local(2, block_size=16),
    "tokens": Local(tokens=40) & Local(8, block_size=16),
    "stripes": Ranges(((2, 1), (6, 2)), 16),
}


def slow_but(quick: tuple[str, ...], names=PATTERNS) -> list:
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


@functools.cache
def arrays(batch=2, length=LENGTH, kv_heads=2, dtype="float32", seed=0):
    """Query, key and value; four query heads."""
    rng = np.random.default_rng(seed)
    shapes = ((4, 16), (kv_heads, 16), (kv_heads, 8))
    return tuple(jnp.asarray(rng.normal(size=(batch, length, *each)), dtype) for each in shapes)


def cache_for(pattern, batch=2, max_length=LENGTH, **settings):
    given = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "value_dim": 8, "dtype": jnp.float32, **settings}
    return KVCache.create(pattern, batch=batch, max_length=max_length, **given)


@jax.jit
def extend(cache, *tokens):
    return cache.extend(*tokens)


def cut(tokens, start, stop):
    return tuple(array[:, start:stop] for array in tokens)


def reference(tokens, pattern, **options):
    return attention(*tokens, pattern, implementation="reference", **options)


def check(out, expected, tolerance=2e-5):
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=0)
