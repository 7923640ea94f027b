"""Layers whose projections are wrapped, that are stacked, rematerialised, or split over a caller's `shard_map`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import s2jax.linen
import s2jax.nnx
from s2jax import Dense, KVCache, LocalStride
from tests.s2jax.test_split_heads import mesh_of, near

pytestmark = [
    pytest.mark.filterwarnings("ignore::s2jax.PatternWarning"),
]

PATTERN = LocalStride(16, 1, 4, num_dense_heads=1)
SETTINGS = {"num_kv_heads": 4, "head_dim": 8, "rope_theta": 1e4, "implementation": "reference"}


def layer_of(pattern=PATTERN, rngs=None, **settings) -> s2jax.nnx.S2Attention:
    return s2jax.nnx.S2Attention(16, 8, pattern, **SETTINGS | settings, rngs=rngs or nnx.Rngs(0))


def tokens(length: int = 40, dtype="float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, length, 16)), dtype)


def in_two_steps(layer, x, cache: KVCache):
    first, cache = layer.prefill(x[:, :30], cache)
    second, cache = layer.extend(x[:, 30:], cache)
    return jnp.concatenate([first, second], 1), cache


REMAT = pytest.mark.parametrize(
    "remat", [pytest.param(False, id="kept", marks=pytest.mark.slow), pytest.param(True, id="rematerialised")]
)


class LowRank(nnx.Module):
    """A projection with a low-rank addition, which has no kernel of its own."""

    def __init__(self, base, features: tuple[int, ...], rngs: nnx.Rngs):
        self.base, self.features = base, features
        self.a = nnx.Param(jax.random.normal(rngs.params(), (16, 2)))
        self.b = nnx.Param(jax.random.normal(rngs.params(), (2, int(np.prod(features)))))

    def __call__(self, x):
        return self.base(x) + ((x @ self.a[...]) @ self.b[...]).reshape(*x.shape[:-1], *self.features)


class Quantised(nnx.Module):
    """A projection whose kernel is int8, flat, and no parameter."""

    def __init__(self, base):
        kernel = base.kernel[...]
        self.shape, self.scale = kernel.shape, float(jnp.abs(kernel).max()) / 127
        self.steps = nnx.Variable(jnp.round(kernel / self.scale).astype(jnp.int8).reshape(-1))

    def __call__(self, x):
        kernel = self.steps[...].reshape(self.shape).astype(x.dtype) * self.scale
        return jnp.einsum("btf,fhd->bthd", x, kernel)


def a_function(base):
    """A projection that is no module at all."""
    kernel = np.asarray(base.kernel[...])
    return lambda x: jnp.einsum("btf,fhd->bthd", x, kernel)


def wrapped(kind: str) -> s2jax.nnx.S2Attention:
    layer = layer_of()
    for name, heads in (("query", 8), ("key", 4), ("value", 4)):
        base = getattr(layer, name)
        wrap = {
            "low rank": lambda base, heads: LowRank(base, (heads, 8), nnx.Rngs(1)),
            "quantised": lambda base, heads: Quantised(base),
            "function": lambda base, heads: a_function(base),
        }[kind]
        setattr(layer, name, wrap(base, heads))
    return layer


@pytest.mark.parametrize("kind", ["low rank", pytest.param("quantised", marks=pytest.mark.slow), "function"])
def test_wrapped_projections(kind: str):
    layer, x = wrapped(kind), tokens()
    cache = layer.create_cache(2, max_length=40)
    assert cache.buffers[0].key.dtype == jnp.float32
    out, _ = jax.jit(functools.partial(in_two_steps, layer))(x, cache)
    near(out, jax.jit(lambda x: layer(x))(x))


def test_the_caches_dtype_is_that_of_what_it_will_store():
    for dtype, settings in {
        "float32": {},
        "bfloat16": {"dtype": "bfloat16"},
        "float16": {"param_dtype": "float16"},
    }.items():
        assert layer_of(**settings).create_cache(2, max_length=40).buffers[0].key.dtype == dtype
    cast = layer_of()
    nnx.update(cast, jax.tree.map(lambda array: array.astype("bfloat16"), nnx.state(cast, nnx.Param)))
    cache = cast.create_cache(2, max_length=40)
    assert cache.buffers[0].key.dtype == jnp.bfloat16
    assert jax.eval_shape(cast.extend, tokens(3, "bfloat16"), cache)[0].dtype == jnp.bfloat16


def stacked(make) -> s2jax.nnx.S2Attention:
    """Three layers in one."""
    return nnx.split_rngs(splits=3)(nnx.vmap(make, in_axes=0, out_axes=0))(nnx.Rngs(0))


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def all_layers(x, layer):
    return x + layer(x)


@pytest.mark.parametrize(
    "remat", [pytest.param(False, id="kept", marks=pytest.mark.slow), pytest.param(True, id="remat")]
)
def test_scan_over_stacked_layers(remat: bool):
    """The caches go through the loop beside the layers; they come from the stack, or from each layer under `vmap`."""
    layers, x = stacked(lambda rngs: layer_of(rngs=rngs)), tokens()
    caches = layers.create_cache(2, max_length=40)
    each = nnx.vmap(lambda layer: layer.create_cache(2, max_length=40), in_axes=0, out_axes=0)(layers)
    assert jax.tree.map(jnp.shape, caches) == jax.tree.map(jnp.shape, each)

    def one(x, layer, cache):
        out, cache = in_two_steps(layer, x, cache)
        return x + out, cache

    over = nnx.scan(nnx.remat(one) if remat else one, in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
    out, after = nnx.jit(over)(x, layers, caches)
    expected = nnx.jit(all_layers)(x, layers)
    near(out, expected)
    np.testing.assert_array_equal(after.lengths, np.full((3, 2), 40))
    # Split and merged, as one loop of jax's own.
    graph, state = nnx.split(layers)
    near(jax.lax.scan(lambda x, both: one(x, nnx.merge(graph, both[0]), both[1]), x, (state, caches))[0], expected)


def test_stacks_of_wrapped_layers_and_of_stacks():
    def make(rngs):
        layer = layer_of(rngs=rngs)
        layer.key = LowRank(layer.key, (4, 8), rngs)
        return layer

    assert stacked(make).create_cache(2, max_length=40).lengths.shape == (3, 2)
    twice = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: stacked_from(rngs), in_axes=0, out_axes=0))(nnx.Rngs(0))
    assert twice.create_cache(2, max_length=40).lengths.shape == (2, 3, 2)


def stacked_from(rngs: nnx.Rngs):
    return nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: layer_of(rngs=rngs), in_axes=0, out_axes=0))(rngs)


class LinenStep(nn.Module):
    """One layer of a Linen `scan`."""

    remat: bool = False

    @nn.compact
    def __call__(self, x, cache):
        kind = s2jax.linen.S2Attention
        kind = nn.remat(kind, methods=["__call__", "prefill", "extend"]) if self.remat else kind
        layer = kind(8, PATTERN, **SETTINGS, name="attention")
        if cache is None:
            return x + layer(x), None
        out, cache = layer.extend(x, cache)
        return x + out, cache


@pytest.mark.parametrize(
    "remat", [pytest.param(False, id="kept", marks=pytest.mark.slow), pytest.param(True, id="remat")]
)
def test_linen_scan_over_layers(remat: bool):
    over = nn.scan(LinenStep, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, out_axes=0, length=3)
    x = tokens()
    params = jax.jit(over(remat).init)(jax.random.key(0), x, None)
    apply = jax.jit(over(remat).apply)
    expected = apply(params, x, None)[0]
    cache = s2jax.linen.S2Attention(8, PATTERN, **SETTINGS).create_cache(2, 16, max_length=40)
    caches = jax.tree.map(lambda array: jnp.stack([array] * 3), cache)
    first, caches = apply(params, x[:, :30], caches)
    second, caches = apply(params, x[:, 30:], caches)
    near(jnp.concatenate([first, second], 1), expected)


def test_linen_vmap_of_layers():
    x = tokens()
    over = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": (None, 0), "axis_size": 3}
    mapped = nn.vmap(s2jax.linen.S2Attention, methods=["extend"], **over)(8, PATTERN, **SETTINGS)
    single = s2jax.linen.S2Attention(8, PATTERN, **SETTINGS)
    caches = jax.tree.map(lambda array: jnp.stack([array] * 3), single.create_cache(2, 16, max_length=40))
    params = jax.jit(functools.partial(mapped.init, method="extend"))(jax.random.key(0), x, caches)
    out, _ = jax.jit(functools.partial(mapped.apply, method="extend"))(params, x, caches)
    apply = jax.jit(single.apply)
    for index in range(3):
        near(out[index], apply(jax.tree.map(lambda array, index=index: array[index], params), x))


# Layers in a caller's `shard_map`


SPECS = {"out": P("tensor"), "query_gain": P(), "key_gain": P(), "sinks": P("tensor")}
"""How parameters are split by heads; all others are of projections to heads."""


def specs_of(params) -> dict:
    def spec(path, leaf):
        name, last = path[0].key, path[-1].key
        if name == "out" and last == "bias":
            return P()
        return SPECS.get(name, P("tensor") if last == "bias" else P(None, "tensor"))

    return jax.tree_util.tree_map_with_path(spec, params)


@pytest.mark.parametrize(
    ("library", "cached"),
    [
        pytest.param("nnx", False, id="nnx"),
        pytest.param("linen", True, id="linen, cached"),
        pytest.param("nnx", True, id="nnx, cached", marks=pytest.mark.slow),
        pytest.param("linen", False, id="linen", marks=pytest.mark.slow),
    ],
)
def test_heads_of_a_layer_split(library: str, cached: bool):
    """By heads over an axis of a `shard_map`: the layer sums its output, to which its bias belongs once."""
    settings = {"use_bias": True, "use_sinks": True, "qk_norm": True, "head_axis": "tensor"}
    x, layer = tokens(), layer_of(**settings)
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    keys = jax.random.split(jax.random.key(3), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    params = tree.unflatten([leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in pairs])
    linen = s2jax.linen.S2Attention(8, PATTERN, **SETTINGS, **settings)

    def local(params, x):
        if library == "linen":
            if not cached:
                return linen.apply({"params": params}, x)
            bound = linen.bind({"params": params})
            return in_two_steps(bound, x, linen.create_cache(2, 16, max_length=40))[0]
        mine = layer_of(**settings)
        nnx.update(mine, params)
        return in_two_steps(mine, x, mine.create_cache(2, max_length=40))[0] if cached else mine(x)

    whole = layer_of(use_bias=True, use_sinks=True, qk_norm=True)
    nnx.update(whole, params)
    split = jax.shard_map(local, mesh=mesh_of(4), in_specs=(specs_of(params), P()), out_specs=P())
    near(jax.jit(split)(params, x), nnx.jit(s2jax.nnx.S2Attention.__call__)(whole, x))
    if cached:
        return

    def loss(function, params, x):
        return (function(params, x) ** 2).sum()

    def plain(params, x):
        mine = layer_of(use_bias=True, use_sinks=True, qk_norm=True)
        nnx.update(mine, params)
        return mine(x)

    expected = jax.jit(jax.grad(functools.partial(loss, plain), (0, 1)))(params, x)
    inside = jax.shard_map(
        jax.grad(functools.partial(loss, local), (0, 1)), mesh=mesh_of(4), in_specs=(specs_of(params), P()),
        out_specs=(specs_of(params), P()),
    )  # fmt: skip
    for function in (jax.grad(functools.partial(loss, split), (0, 1)), inside):
        for found, each in zip(jax.tree.leaves(jax.jit(function)(params, x)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(found, each, atol=1e-4 * float(jnp.abs(each).max()))


def test_layers_refuse_where_nobody_said_it():
    x = tokens()
    params = nnx.to_pure_dict(nnx.state(layer_of(), nnx.Param))

    def split(pattern, check_vma=True, specs=None, mesh=None, **settings):
        def local(params, x):
            layer = layer_of(pattern, **settings)
            nnx.update(layer, params)
            return layer(x)

        mesh, batch = mesh or mesh_of(4), P() if specs is None else P("tensor")
        over = {"in_specs": (specs_of(params) if specs is None else specs, batch), "out_specs": P("tensor")}
        return jax.jit(jax.shard_map(local, mesh=mesh, check_vma=check_vma, **over))(params, x)

    for pattern in (PATTERN, Dense()):  # the output would be a part of it, whatever is read
        with pytest.raises(ValueError, match="the layer has 8 query heads, and its projection gives 2"):
            split(pattern)
    for check_vma in (True, False):
        with pytest.raises(ValueError, match="over tensor, these may be all heads or a part of them"):
            _local_layer(x, params, check_vma, LocalStride(16, 1, 4), num_kv_heads=1)
    # Whole parameters on every device: a split batch is no trouble, but where nothing can be seen it is to be said.
    pair, whole = mesh_of(2), P()
    expected = nnx.jit(s2jax.nnx.S2Attention.__call__)(layer_with(params), x)
    near(split(PATTERN, specs=whole, mesh=pair), expected)
    near(split(PATTERN, specs=whole, mesh=pair, check_vma=False, head_axis=()), expected)
    with pytest.raises(ValueError, match="over tensor, these may be all heads or a part of them"):
        split(PATTERN, specs=whole, mesh=pair, check_vma=False)


def layer_with(params, pattern=PATTERN) -> s2jax.nnx.S2Attention:
    layer = layer_of(pattern)
    nnx.update(layer, params)
    return layer


def _local_layer(x, params, check_vma: bool, pattern, **settings):
    """A layer that was made for a shard's heads as if there were no others."""

    def local(params, x):
        layer = s2jax.nnx.S2Attention(16, 2, pattern, **SETTINGS | settings, rngs=nnx.Rngs(0))
        nnx.update(layer, params)
        return jax.lax.psum(layer(x), "tensor")

    specs = {"mesh": mesh_of(4), "in_specs": (specs_of(params), P()), "out_specs": P()}
    return jax.shard_map(local, check_vma=check_vma, **specs)(params, x)
