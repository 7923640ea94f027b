"""Layers, caches and `combine` under JAX's strict modes: most of them at once in the quick tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import s2jax
from s2jax import KVCache, LocalStride, combine
from tests import strict_modes

pytestmark = [
    pytest.mark.filterwarnings("ignore::s2jax.PatternWarning"),
]

PATTERN, SLOW = LocalStride(16, 1, 2), pytest.mark.slow
ALL = list(strict_modes.MODES)
NARROW = [mode for mode in ALL if mode != "x64"]
SETS = pytest.mark.parametrize(
    "modes",
    [
        pytest.param(strict_modes.QUICK, id="quick"),
        pytest.param(ALL, id="all", marks=SLOW),
        pytest.param(NARROW, id="all but x64", marks=SLOW),
        *(pytest.param([mode], id=mode, marks=SLOW) for mode in ALL),
    ],
)
SETTINGS = {
    "num_kv_heads": 2, "rope_theta": 1e4, "qk_norm": True, "use_bias": True, "use_sinks": True, "logits_soft_cap": 9.0,
}  # fmt: skip


def tokens(length: int = 40, dtype="float32") -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, length, heads, 8)), dtype) for heads in (4, 2, 2)]


def run(modes: list[str], function, *arrays):
    """The function's results, finite, with the modes on from tracing to the end."""
    with strict_modes.on(*modes):
        found = jax.block_until_ready(jax.jit(function)(*arrays))
    for leaf in jax.tree.leaves(found):
        assert leaf.dtype not in (jnp.float64, jnp.int64)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert np.isfinite(np.asarray(leaf, np.float32)).all()
    return found


@SETS
def test_combine(modes: list[str]):
    outs, lses = [jnp.ones((2, 5, 4, 8))] * 2, [jnp.zeros((2, 4, 5)), jnp.ones((2, 4, 5))]

    def total(outs, lses):
        out, lse = combine(outs, lses)
        return out.sum() + lse.sum()

    run(modes, jax.value_and_grad(total, (0, 1)), outs, lses)


@pytest.mark.parametrize("library", ["nnx", pytest.param("linen", marks=SLOW)])
@SETS
def test_layers(library: str, modes: list[str]):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 40, 16)), "float32")
    if library == "nnx":
        layer = s2jax.nnx.S2Attention(16, 4, PATTERN, **SETTINGS, rngs=nnx.Rngs(0))
        graph, params = nnx.split(layer)

        def apply(params, method, *arguments):
            return getattr(nnx.merge(graph, params), method)(*arguments)
    else:
        layer = s2jax.linen.S2Attention(4, PATTERN, **SETTINGS)
        params = jax.jit(layer.init)(jax.random.key(0), x)

        def apply(params, method, *arguments):
            return layer.apply(params, *arguments, method=method)

    def everything(params, x):
        def loss(params, x):
            return (apply(params, "__call__", x) ** 2).sum()

        cache = KVCache.create(
            PATTERN, batch=2, num_heads=4, num_kv_heads=2, head_dim=4, max_length=40, dtype=jnp.float32
        )
        first, cache = apply(params, "prefill", x[:, :30], cache)
        second, cache = apply(params, "extend", x[:, 30:32], cache)
        return jax.value_and_grad(loss, (0, 1))(params, x), first, second

    run(modes, everything, params, x)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=SLOW), pytest.param("int8", marks=SLOW)])
@SETS
def test_caches(dtype: str, modes: list[str]):
    given = tokens(dtype="float32" if dtype == "int8" else dtype)
    counts, which, sinks = jnp.array([1, 3]), jnp.array([True, False]), jnp.ones(4)

    def everything(counts, which, sinks, *tokens):
        def cut(start, stop, repeats=1):
            return [jnp.repeat(each[:, start:stop], repeats, 0) for each in tokens]

        cache = KVCache.create(
            PATTERN, batch=2, num_heads=4, num_kv_heads=2, head_dim=8, max_length=40, max_rollback=3, dtype=dtype
        )
        prompt, cache = cache.prefill(*cut(0, 20), counts=jnp.full_like(counts, 19))
        chunk, cache = cache.extend(*cut(20, 23), counts=counts, sinks=sinks, logits_soft_cap=5.0, return_lse=True)
        one, cache = cache.rollback(1).extend(*cut(23, 24))
        cache = cache.reset(which).fork(2, 4)
        forked, cache = cache.extend(*cut(24, 25, repeats=2))
        return prompt, chunk, one, forked, cache

    run(modes, everything, counts, which, sinks, *given)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=SLOW), pytest.param("int8", marks=SLOW)])
@SETS
def test_called_outside_of_jit(dtype: str, modes: list[str]):
    """No constant goes to the device with a call, no logit of -inf is a result, padding beyond the end no NaN."""
    given = tokens(dtype="float32" if dtype == "int8" else dtype)
    prompt, chunk, last = ([each[:, start:stop] for each in given] for start, stop in ((0, 20), (20, 27), (27, 28)))
    samples = [jnp.repeat(each, 2, 0) for each in last]
    counts, which, sinks = jnp.array([5, 3]), jnp.array([True, False]), jnp.ones(4)
    parts = [jnp.ones((2, 5, 4, 8))] * 2, [jnp.zeros((2, 4, 5)), jnp.full((2, 4, 5), -np.inf)]
    with strict_modes.on(*modes):
        cache = KVCache.create(
            PATTERN, batch=2, num_heads=4, num_kv_heads=2, head_dim=8, max_length=26, max_rollback=2, dtype=dtype
        )
        out, cache = cache.prefill(*prompt)
        found, cache = cache.extend(*chunk, counts=counts, sinks=sinks, logits_soft_cap=5.0, return_lse=True)
        before, cache = cache.extend(*last)
        cache = cache.rollback(1).share_lengths_with(cache).rollback(counts - counts)
        one, fork = cache.reset(which).fork(2, 4).extend(*samples)
        merged = combine(*parts)
    for array in jax.tree.leaves((out, found, before, one, merged, fork.lengths)):
        assert np.isfinite(np.asarray(array, np.float32)).all()


def test_called_outside_of_jit_over_a_mesh():
    """Nothing goes from the host, nor from one device to the others, but what was put there before."""
    spec = P("data", None, "tensor")
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)):
        given = [jax.device_put(each, NamedSharding(jax.sharding.get_mesh(), spec)) for each in tokens(3)]
        with strict_modes.on():
            cache = KVCache.create(
                PATTERN, batch=2, num_heads=4, num_kv_heads=2, head_dim=8, max_length=40, max_rollback=2,
                dtype=jnp.float32, query_spec=spec,
            )  # fmt: skip
            out, cache = cache.extend(*given)
            cache = cache.rollback(1)
    assert np.isfinite(np.asarray(out)).all()
    assert cache.lengths.tolist() == [2, 2]
