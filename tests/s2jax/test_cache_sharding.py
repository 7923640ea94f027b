"""The KV cache over a mesh of eight devices: no device tells another anything, and the results are those of one."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from s2jax import Dense, KVCache, Local, LocalStride, PerHead, attention, compile_cache
from s2jax.cache.layout import forget_layouts
from s2jax.nnx import S2Attention
from tests.s2jax.cache_cases import check, cut

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")

BOTH, SEQUENCES, HEADS = P("data", None, "tensor", None), P("data"), P(None, None, ("tensor", "data"))
RAGGED = LocalStride(16, 1, 4, num_dense_heads=1)
BY_HEAD = PerHead([*[Local(2, block_size=16)] * 10, *[LocalStride(16, 1, 3)] * 5, Dense()])
COLLECTIVE = r"= (\S+) (?:all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter)"


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind, kind))


def arrays(length: int, batch: int = 4) -> list[np.ndarray]:
    """Query, key and value; 16 heads, 8 KV heads."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(batch, length, *each)).astype(np.float32) for each in ((16, 8), (8, 8), (8, 4))]


def put(tokens, spec: P) -> list[jax.Array]:
    """On the mesh that is set."""
    return [jax.device_put(each, NamedSharding(jax.sharding.get_mesh(), spec)) for each in tokens]


def cache_for(pattern, **settings) -> KVCache:
    given = {"batch": 4, "max_length": 100, "dtype": jnp.float32, **settings}
    return KVCache.create(pattern, num_heads=16, num_kv_heads=8, head_dim=8, value_dim=4, **given)


def alone(function, *arguments, **options):
    """The function's results, for which no device tells another anything."""
    compiled = jax.jit(function, **options).lower(*arguments).compile()
    assert re.findall(COLLECTIVE, compiled.as_text()) == []
    return compiled(*arguments)


def extend(cache, *tokens, **options):
    """Updates the cache in place, sharded as it is."""
    before = jax.tree.leaves(cache.buffers)
    shardings = [each.sharding for each in before]
    out, cache = alone(lambda cache, *tokens: cache.extend(*tokens, **options), cache, *tokens, donate_argnums=0)
    after = jax.tree.leaves(cache.buffers)
    assert all(each.sharding.is_equivalent_to(was, each.ndim) for each, was in zip(after, shardings, strict=True))
    assert all(each.is_deleted() for each in before)
    return out, cache


@pytest.mark.parametrize(
    ("spec", "pattern", "max_length"),
    [pytest.param(BOTH, RAGGED, 100, marks=pytest.mark.slow), (SEQUENCES, Local(2, block_size=16), None)],
    ids=["both", "sequences, streaming"],
)
def test_as_on_one_device(spec, pattern, max_length):
    tokens, sinks = arrays(64), jnp.linspace(-1, 1, 16)
    expected, lse = attention(*tokens, pattern, implementation="reference", sinks=sinks, return_lse=True)
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        cache = cache_for(pattern, max_length=max_length, max_rollback=2, query_spec=spec)
        sharded, counts = put(tokens, spec), jnp.full(4, 20)

        def prefill(cache, *tokens):
            return cache.prefill(*tokens, implementation="reference", sinks=sinks)

        out, cache = alone(prefill, cache, *cut(sharded, 0, 30))
        check(out, expected[:, :30])
        (out, found), cache = extend(cache, *cut(sharded, 30, 31), sinks=sinks, return_lse=True)
        check(out, expected[:, 30:31])
        check(found, lse[:, :, 30:31])
        out, cache = extend(cache, *cut(sharded, 31, 51), sinks=sinks, counts=counts)
        check(out, expected[:, 31:51])
        cache = alone(KVCache.rollback, cache, jnp.ones(4, jnp.int32))
        emptied = alone(KVCache.reset, cache, jnp.array([True, False, True, False]))
        assert emptied.lengths.tolist() == [0, 50, 0, 50]
        forked = alone(lambda cache: cache.fork(2, 6), cache)
        twice = put([np.repeat(each, 2, 0) for each in tokens], spec)
        out, forked = extend(forked, *cut(twice, 50, 51), sinks=sinks)
        check(np.asarray(out)[::2], expected[:, 50:51])
        check(np.asarray(out)[1::2], expected[:, 50:51])
        forked = alone(KVCache.rollback, forked, jnp.array([2, 1] * 4))
        assert forked.lengths.tolist() == [49, 50] * 4


def test_every_device_keeps_its_share():
    """Of the heads of all devices the one that needs the most says how much."""
    layout = compile_cache(RAGGED, num_heads=16, num_kv_heads=8, max_length=1600, shards=4)
    assert layout.buffers == ((0, 2, 4, 7), (1, 3, 5, 6))
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        cache = cache_for(RAGGED, max_length=1600, query_spec=BOTH)
        assert [each.key.shape for each in cache.buffers] == [(4, 4, 100, 16, 8), (4, 4, 26, 16, 8)]
        for each in jax.tree.leaves(cache.buffers):
            assert {shard.data.shape for shard in each.addressable_shards} == {(2, 1, *each.shape[2:])}


@pytest.mark.slow
def test_explicit_axes_int8_in_parts(monkeypatch):
    """Heads over both axes, so that every device has one; walked in parts; one value is a NaN, and stays alone."""
    monkeypatch.setattr("s2jax.cache.attention.PAIRS_AT_ONCE", 4 * 12 * 2 * 16 * 2)
    tokens, bad, step = arrays(48), arrays(48), jax.jit(KVCache.extend)
    bad[2][1, 12, 3] = np.nan
    expected = attention(*tokens, BY_HEAD, implementation="reference")
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        cache = cache_for(BY_HEAD, dtype=jnp.int8, query_spec=HEADS)
        bad = put(bad, HEADS)
        _, cache = alone(lambda cache, *t: cache.prefill(*t, implementation="reference"), cache, *cut(bad, 0, 24))
        for at in (24, 36):
            out, cache = step(cache, *cut(bad, at, at + 12))
        assert np.argwhere(~np.asarray(cache.all_finite)).tolist() == [[1, 3]]
    check(out, expected[:, 36:], 5e-2)


@pytest.mark.slow
def test_explicit_axes_tell_how_an_unsharded_cache_is_split():
    tokens = arrays(34)
    expected = attention(*tokens, RAGGED, implementation="reference")
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        _, cache = alone(KVCache.extend, cache_for(RAGGED, max_rollback=1), *put(cut(tokens, 0, 30), SEQUENCES))
        emptied = jnp.array([True, False, False, False])
        cache = alone(lambda cache: cache.rollback(1).reset(emptied).fork(2, 4).rollback(0), cache)
        twice = put([np.repeat(each, 2, 0) for each in cut(tokens, 29, 30)], SEQUENCES)
        out, _ = alone(KVCache.extend, cache, *twice)
    check(np.asarray(out)[2::2], expected[1:, 29:30])


def test_inside_of_a_callers_shard_map(monkeypatch):
    monkeypatch.setattr("s2jax.cache.attention.PAIRS_AT_ONCE", 2 * 20 * 16 * 16 * 2)
    tokens = arrays(20)
    expected = attention(*tokens, RAGGED, implementation="reference")
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        step = jax.shard_map(KVCache.extend, in_specs=P("data"), out_specs=P("data"))
        out, _ = alone(step, cache_for(RAGGED, head_axis=()), *put(tokens, SEQUENCES))
    check(out, expected)


def test_the_layer_splits_its_cache():
    x = np.random.default_rng(0).normal(size=(2, 20, 16)).astype(np.float32)

    @nnx.jit
    def steps(layer, cache):
        first, cache = layer.prefill(x[:, :19], cache)
        second, cache = layer.extend(x[:, 19:], cache)
        return jnp.concatenate([first, second], 1), cache

    def layer(spec) -> S2Attention:
        return S2Attention(16, 4, RAGGED, rope_theta=1e4, implementation="reference", query_spec=spec, rngs=nnx.Rngs(0))

    expected = nnx.jit(S2Attention.__call__)(layer(None), x)
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        cache = layer(BOTH).create_cache(2, max_length=32)
        out, after = steps(layer(BOTH), cache)
        check(out, expected)
        for each in (cache, after):
            assert each.buffers[0].key.sharding.is_equivalent_to(
                NamedSharding(mesh_of(AxisType.Auto), P("data", "tensor")), 5
            )


def test_equal_arguments_make_one_compilation():
    def cache():
        forget_layouts()
        return cache_for(LocalStride(16, 1, 4))

    first, second, step = cache(), cache(), jax.jit(lambda cache: cache.lengths + 1)
    second = dataclasses.replace(second, layout=dataclasses.replace(second.layout))
    assert first.layout is not second.layout
    assert jax.tree.structure(first) == jax.tree.structure(second)
    step(first), step(second)
    assert step._cache_size() == 1
    assert cache_for(LocalStride(16, 1, 3)).layout != first.layout


def refused(kind: AxisType, message: str, call):
    with jax.set_mesh(mesh_of(kind)), pytest.raises(ValueError, match=message):
        call()


def test_errors():
    tokens, auto, explicit = arrays(3), AxisType.Auto, AxisType.Explicit
    unsplit = "the heads are split over 4 shards here, and the cache was created for heads that are not split"
    refused(explicit, unsplit, lambda: cache_for(RAGGED).extend(*put(tokens, BOTH)))
    refused(explicit, unsplit, lambda: cache_for(RAGGED).prefill(*put(tokens, BOTH)))
    unsaid = r"under a mesh with Auto axes \(data, tensor\) a cache must have been created with the queries' query_spec"
    refused(auto, unsaid, lambda: cache_for(RAGGED).extend(*tokens))
    refused(auto, unsaid, lambda: cache_for(RAGGED, max_rollback=2).rollback(1))
    mixed = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(auto, explicit))
    with jax.set_mesh(mixed), pytest.raises(ValueError, match="names Auto axes of a mesh that has Explicit ones"):
        cache_for(RAGGED, query_spec=BOTH)
    three = {"batch": 3, "query_spec": BOTH}
    refused(auto, "3 sequences cannot be split over the 2 shards of data", lambda: cache_for(RAGGED, **three))
    refused(auto, "prefill takes no query_spec", lambda: cache_for(RAGGED).prefill(*tokens, query_spec=BOTH))
    six = {"num_heads": 6, "num_kv_heads": 6, "head_dim": 8, "batch": 2, "max_length": 100, "query_spec": BOTH}
    refused(auto, "6 KV heads cannot be split over the 4 shards of tensor", lambda: KVCache.create(RAGGED, **six))
    with pytest.raises(ValueError, match=r"needs a mesh; set it with jax\.set_mesh"):
        cache_for(RAGGED, query_spec=BOTH)


@pytest.mark.optimised
def test_nothing_of_the_cache_is_gathered_over_a_mesh():
    """Neither by batch nor by heads: what devices tell one another is smaller than what any of them keeps."""
    heads = {"num_heads": 8, "num_kv_heads": 8, "head_dim": 32}
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    cache = jax.eval_shape(
        lambda: KVCache.create(LocalStride(16, 2, 4), batch=8, max_length=2048, dtype=jnp.float32, **heads)
    )
    kept = cache.buffers[0].key.size // 8
    for of_buffers, of_tokens in ((P("x"), P("x")), (P(None, "x"), P(None, None, "x"))):

        def over(array, spec):
            spec = spec if array.ndim > 1 else P()
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

        sharded = jax.tree.map(functools.partial(over, spec=of_buffers), cache)
        new = over(jax.ShapeDtypeStruct((8, 1, 8, 32), jnp.float32), of_tokens)
        text = jax.jit(KVCache.extend, donate_argnums=0).lower(sharded, new, new, new).compile().as_text()
        told = re.findall(r"\w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)\(", text)
        assert all(math.prod(map(int, shape.split(","))) < kept / 8 for shape in told if shape)
