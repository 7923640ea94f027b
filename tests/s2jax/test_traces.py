"""One program serves every length, offset and step: traces are counted."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from s2jax import KVCache, LocalStride, attention
from tests.s2jax.cache_cases import STRIDE, arrays, cache_for, cut

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")


def test_steps_of_a_cache_are_traced_once():
    """Whatever the lengths, the counts, what is rolled back and which sequences begin anew."""
    step = jax.jit(chex.assert_max_traces(lambda cache, *tokens, counts: cache.extend(*tokens, counts=counts)[1], 1))
    back = jax.jit(chex.assert_max_traces(KVCache.rollback, 1))
    tokens, cache = arrays(), cache_for(STRIDE, max_rollback=4)
    for at, counts in ((0, [4, 4]), (4, [1, 3]), (8, [0, 4]), (90, [2, 2])):
        cache = step(cache, *cut(tokens, at, at + 4), counts=jnp.array(counts))
        cache = back(cache, jnp.array([counts[0] // 2, 0]))
    cache = step(cache.reset(jnp.array([True, False])), *cut(tokens, 0, 4), counts=jnp.array([4, 1]))
    assert cache.lengths.tolist() == [4, 14]


def test_offsets_at_run_time_are_traced_once():
    query, key, value = arrays()
    attend = functools.partial(attention, pattern=LocalStride(16, 2, 3), implementation="xla")
    at = jax.jit(chex.assert_max_traces(lambda q, offset: attend(q, key, value, query_offset=offset), 1))
    for offset in (0, 1, 16, 100):
        out = at(query[:, offset : offset + 8], jnp.int32(offset))
        expected = attend(query, key, value)[:, offset : offset + 8]
        chex.assert_trees_all_close(out, expected, atol=2e-5)
