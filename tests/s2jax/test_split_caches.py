"""KV caches whose heads a caller split by a `shard_map`, `pmap` or `vmap`: each shard keeps what its own heads read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from s2jax import Dense, KVCache, LocalStride, attention
from tests.s2jax.test_split_heads import MIXED, PATTERN, SPLIT, arrays, mesh_of, near

pytestmark = [
    pytest.mark.filterwarnings("ignore::s2jax.PatternWarning"),
]

create = functools.partial(
    KVCache.create, num_heads=8, num_kv_heads=4, head_dim=8, value_dim=4, batch=2, max_length=50, dtype=jnp.float32
)


def step_by_step(cache: KVCache, *tokens):
    """A prompt, a chunk, and the rest one by one in a loop; also the lengths in the end."""
    prompt, chunk, rest = ([each[:, cut] for each in tokens] for cut in (slice(21), slice(21, 40), slice(40, None)))
    first, cache = cache.prefill(*prompt, implementation="xla")
    second, cache = cache.extend(*chunk)

    def step(cache, token):
        out, cache = cache.extend(*(each[:, None] for each in token))
        return cache, out[:, 0]

    cache, third = jax.lax.scan(step, cache, jax.tree.map(lambda each: each.swapaxes(0, 1), rest))
    return jnp.concatenate([first, second, third.swapaxes(0, 1)], 1), cache


@pytest.mark.parametrize(
    ("pattern", "check_vma"),
    [
        pytest.param(PATTERN, True, id="stripes"),
        pytest.param(PATTERN, False, id="unchecked", marks=pytest.mark.slow),
        pytest.param(MIXED, True, id="mixed", marks=pytest.mark.slow),
    ],
)
def test_created_inside(pattern, check_vma: bool):
    tokens = arrays()

    def local(*tokens):
        return step_by_step(create(pattern, head_axis="tensor"), *tokens)[0]

    function = jax.shard_map(local, mesh=mesh_of(4), in_specs=SPLIT, out_specs=SPLIT, check_vma=check_vma)
    near(jax.jit(function)(*tokens), attention(*tokens, pattern, implementation="reference"))


@pytest.mark.slow
def test_created_outside_and_used_on_both_sides():
    """Of all heads outside; inside, of those of a shard."""
    tokens = arrays()
    expected = attention(*tokens, PATTERN, implementation="reference")
    with jax.set_mesh(mesh_of(4)):
        cache = create(PATTERN, head_axis="tensor", max_rollback=3, query_spec=P())
        specs = jax.tree.map(lambda each: P(None, "tensor") if each.ndim > 1 else P(), cache)
        inside = jax.shard_map(step_by_step, in_specs=(specs, SPLIT, SPLIT, SPLIT), out_specs=(SPLIT, specs))
        out, cache = jax.jit(inside)(cache, *tokens)
        near(out, expected)

        def again(cache, *tokens):
            return cache.rollback(3).fork(2, 4).extend(*(jnp.repeat(each[:, 47:49], 2, 0) for each in tokens))[0]

        near(jax.jit(again)(cache, *tokens)[::2], expected[:, 47:49])
        forked = jax.shard_map(again, in_specs=(specs, SPLIT, SPLIT, SPLIT), out_specs=SPLIT)
        near(jax.jit(forked)(cache, *tokens)[::2], expected[:, 47:49])


def test_beside_a_mesh_axis_of_jit():
    """One axis of heads is the caller's, another one jit's."""
    tokens = arrays()
    expected = attention(*tokens, PATTERN, implementation="reference")
    with jax.set_mesh(mesh_of(2, 2, names=("data", "tensor"))):

        def local(*tokens):
            cache = create(PATTERN, head_axis="tensor", query_spec=P(None, None, "data"))
            return step_by_step(cache, *tokens)[0]

        function = jax.shard_map(local, in_specs=SPLIT, out_specs=SPLIT, axis_names={"tensor"})
        near(jax.jit(function)(*tokens), expected)


@pytest.mark.parametrize("by", [pytest.param("pmap", marks=pytest.mark.slow), "vmap"])
def test_mapped(by: str):
    tokens = arrays()
    split = [np.moveaxis(each.reshape(2, 50, 4, -1, each.shape[3]), 2, 0) for each in tokens]

    def local(*tokens):
        return step_by_step(create(PATTERN, head_axis="i"), *tokens)[0]

    mapped = (
        jax.jit(jax.vmap(local, axis_name="i"))
        if by == "vmap"
        else jax.pmap(local, axis_name="i", devices=jax.devices()[:4])
    )
    out = np.moveaxis(np.asarray(jax.jit(mapped)(*split)), 0, 2)
    expected = attention(*tokens, PATTERN, implementation="reference")
    near(out.reshape(expected.shape), expected)


def test_refused_where_nobody_said_it():
    tokens = arrays()

    def over(local, spec=SPLIT, mesh=None):
        return jax.jit(jax.shard_map(local, mesh=mesh or mesh_of(4), in_specs=spec, out_specs=spec))(*tokens)

    local = {"num_heads": 2, "num_kv_heads": 1}
    with pytest.raises(ValueError, match="over tensor, these may be all heads or a part of them"):
        over(lambda *tokens: create(LocalStride(16, 1, 4), **local).extend(*tokens)[0])
    outside = create(LocalStride(16, 1, 4), **local)
    for call in (KVCache.extend, KVCache.prefill):
        with pytest.raises(ValueError, match="over tensor, these may be all heads or a part of them"):
            over(lambda *tokens, call=call: call(outside, *tokens)[0])
    with pytest.raises(ValueError, match="query must have shape"):
        over(lambda *tokens: create(PATTERN, head_axis=()).extend(*tokens)[0])
    with pytest.raises(ValueError, match=r"2 KV heads cannot be split over the 4 shards of 'tensor'.* count all heads"):
        over(lambda *tokens: create(PATTERN, num_heads=2, num_kv_heads=2, head_axis="tensor").extend(*tokens)[0])
    with pytest.raises(ValueError, match="head_axis='tensor' must name axes of an enclosing"):
        create(PATTERN, head_axis="tensor")
    with pytest.raises(ValueError, match="prefill takes no head_axis: how the cache is split is said once"):
        create(PATTERN).prefill(*tokens, head_axis="tensor")
    # Heads that read alike, and a split batch of which it is said.
    near(over(lambda *tokens: create(Dense(), **local).extend(*tokens)[0]), attention(*tokens, Dense()))
    pair, batch = mesh_of(2, names=("data",)), P("data")
    out = over(lambda *tokens: create(PATTERN, batch=1, head_axis=()).extend(*tokens)[0], batch, pair)
    near(out, attention(*tokens, PATTERN, implementation="reference"))
