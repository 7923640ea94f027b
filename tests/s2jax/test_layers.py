"""`S2Attention` of NNX and of Linen: one layer in two libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import s2jax.linen
import s2jax.nnx
from s2jax.patterns import Dense, LocalStride

SPARSE = LocalStride(block_size=16, local_blocks=1, vert_stride=2)
VARIANTS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2, "head_dim": 16, "out_features": 24},
    "everything": {
        "num_kv_heads": 2,
        "use_bias": True,
        "rope_theta": 1e4,
        "qk_norm": True,
        "use_sinks": True,
        "logits_soft_cap": 20.0,
        "scale": 0.3,
    },
}


def inputs(seed=0, batch=2, length=70, features=32, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (batch, length, features), dtype)


def nnx_layer(pattern=SPARSE, implementation="reference", **settings):  # which compiles fastest
    layer = s2jax.nnx.S2Attention(32, 4, pattern, implementation=implementation, rngs=nnx.Rngs(0), **settings)
    leaves, tree = jax.tree.flatten(nnx.state(layer, nnx.Param))
    keys = jax.random.split(jax.random.key(9), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys, strict=True)]
    nnx.update(layer, jax.tree.unflatten(tree, leaves))  # so that gains, biases and sinks matter
    return layer


def linen_layer(pattern=SPARSE, implementation="reference", **settings):
    return s2jax.linen.S2Attention(4, pattern, implementation=implementation, **settings)


def dense_reference(layer, x, *, soft_cap=None, scale=None, theta=None, norm=False):
    """The layer spelled out in float64 NumPy, for one pattern given as a token mask."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    x = np.asarray(x, np.float64)

    def project(name):
        return np.einsum("btf,fhd->bthd", x, p[name]["kernel"]) + p[name].get("bias", 0.0)

    def placed(heads, gain):
        if norm:
            heads = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-6) * p[gain]
        if theta is not None:
            half = heads.shape[-1] // 2
            angles = np.arange(x.shape[1])[:, None, None] * theta ** (-np.arange(half) / half)
            turned = (heads[..., :half] + 1j * heads[..., half:]) * np.exp(1j * angles)
            heads = np.concatenate([turned.real, turned.imag], axis=-1)
        return heads

    q, k, v = placed(project("query"), "query_gain"), placed(project("key"), "key_gain"), project("value")
    group = q.shape[2] // k.shape[2]
    logits = np.einsum("bthd,bshd->bhts", q, k.repeat(group, 2)) * (scale or q.shape[-1] ** -0.5)
    logits = logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)
    mask = layer.pattern.token_mask(q.shape[2], k.shape[2], x.shape[1], x.shape[1])
    weights = np.exp(logits) * mask
    total = weights.sum(-1, keepdims=True) + (np.exp(p["sinks"])[:, None, None] if "sinks" in p else 0.0)
    heads = np.einsum("bhts,bshd->bthd", weights / total, v.repeat(group, 2))
    return np.einsum("bthd,hdf->btf", heads, p["out"]["kernel"]) + p["out"].get("bias", 0.0)


@pytest.mark.parametrize("pattern", [SPARSE, Dense()], ids=["sparse", "dense"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_computes_what_its_docstring_says(variant, pattern):
    layer, x = nnx_layer(pattern, **VARIANTS[variant]), inputs()
    own = {"soft_cap": 20.0, "scale": 0.3, "theta": 1e4, "norm": True} if variant == "everything" else {}
    np.testing.assert_allclose(layer(x), dense_reference(layer, x, **own), atol=2e-5)


def test_default_implementation_agrees_with_the_reference():
    x, variant = inputs(), VARIANTS["everything"]
    result = jax.jit(nnx_layer(implementation=None, **variant))(x)
    np.testing.assert_allclose(result, nnx_layer(**variant)(x), atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nnx_weights_serve_linen_and_back(variant):
    layer, x = nnx_layer(**VARIANTS[variant]), inputs()
    twin = linen_layer(**VARIANTS[variant])
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    of_linen = twin.init(jax.random.key(1), x)["params"]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda a: (a.shape, a.dtype), of_linen)
    np.testing.assert_array_equal(layer(x), twin.apply({"params": params}, x))

    nnx.update(layer, of_linen)
    np.testing.assert_array_equal(layer(x), twin.apply({"params": of_linen}, x))


def test_cross_attention_positions_and_segments_agree_in_both():
    layer, x, context = nnx_layer(Dense(), **VARIANTS["everything"]), inputs(length=20), inputs(1, length=70)
    twin = linen_layer(Dense(), **VARIANTS["everything"])
    arguments = {
        "positions": jnp.arange(50, 70),
        "kv_positions": jnp.stack([jnp.arange(70), jnp.arange(70)]),
        "segment_ids": jnp.ones((2, 20), jnp.int32),
        "kv_segment_ids": jnp.where(jnp.arange(70) < 30, 0, 1) * jnp.ones((2, 1), jnp.int32),
        "query_offset": 50,
    }
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    out = layer(x, context, **arguments)
    np.testing.assert_array_equal(out, twin.apply({"params": params}, x, context, **arguments))
    changed = layer(x, context.at[:, :30].set(7.0), **arguments)  # of another segment
    np.testing.assert_array_equal(out, changed)


def test_a_chunk_of_queries_beside_its_whole_context_is_that_chunk_of_self_attention():
    layer, x = nnx_layer(**VARIANTS["everything"]), inputs()
    np.testing.assert_allclose(layer(x[:, 40:], x, query_offset=40), layer(x)[:, 40:], atol=1e-5)
    traced = jax.jit(lambda x, offset: layer(x[:, 40:], x, query_offset=offset))
    np.testing.assert_allclose(traced(x, 40), layer(x)[:, 40:], atol=1e-5)
    per_entry = layer(x[:, 40:], x, query_offset=jnp.array([40, 40]))
    np.testing.assert_allclose(per_entry, layer(x)[:, 40:], atol=1e-5)


def test_queries_and_keys_are_what_a_cache_would_hold():
    layer, x = nnx_layer(rope_theta=1e4), inputs()
    key, value = layer.keys_values(x[:, 40:], jnp.arange(40, 70))
    whole_key, whole_value = layer.keys_values(x)
    np.testing.assert_allclose(key, whole_key[:, 40:], atol=1e-5)
    np.testing.assert_allclose(value, whole_value[:, 40:], atol=1e-6)
    np.testing.assert_allclose(layer.queries(x[:, 40:], query_offset=40), layer.queries(x)[:, 40:], atol=1e-5)


def test_pattern_given_in_the_call_takes_the_place_of_the_layers():
    sparse, dense, x = nnx_layer(SPARSE), nnx_layer(Dense()), inputs()
    np.testing.assert_array_equal(sparse(x, pattern=Dense()), dense(x))
    assert np.abs(sparse(x) - dense(x)).max() > 1e-3


def test_jit_grad_vmap():
    layer, x = nnx_layer(**VARIANTS["everything"]), inputs()
    graph, state = nnx.split(layer)

    def loss(state, x):
        return jnp.mean(nnx.merge(graph, state)(x) ** 2)

    grads = jax.jit(jax.grad(loss))(state, x)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    stacked = jnp.stack([x, 2 * x])
    np.testing.assert_allclose(jax.vmap(layer)(stacked)[1], layer(2 * x), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, None])
def test_dtypes(dtype):
    layer = nnx_layer(dtype=dtype, qk_norm=True, rope_theta=1e4)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(layer, nnx.Param))} == {jnp.dtype("float32")}
    out = layer(inputs(dtype=jnp.bfloat16))
    assert out.dtype == (jnp.float32 if dtype is None else dtype)
    wide = nnx_layer(qk_norm=True, rope_theta=1e4)(inputs(dtype=jnp.bfloat16).astype(jnp.float32))
    assert np.abs(out.astype(jnp.float32) - wide).max() < 0.05


def test_layer_has_parameters_only_and_no_sharding_metadata():
    state = nnx.state(nnx_layer(**VARIANTS["everything"]))
    variables = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    bare = nnx.Param(jnp.zeros(1)).get_metadata()
    assert all(type(v) is nnx.Param and v.get_metadata() == bare for v in variables)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"positions": jnp.arange(70)}, "rope_theta=None"),
        ({"kv_positions": jnp.arange(70)}, "kv_positions belong to kv, which is None"),
        ({"kv_segment_ids": jnp.zeros((2, 70), jnp.int32)}, "kv_segment_ids belong to kv, which is None"),
        ({"query_offset": 3}, "query_offset places x among the tokens of kv.*got 3"),
        ({"kv": inputs(), "segment_ids": jnp.zeros((2, 70), jnp.int32)}, "segment_ids"),
        ({"segment_ids": jnp.zeros((2, 69), jnp.int32)}, "69"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(call, message):
    layer, x = nnx_layer(), inputs()
    twin = linen_layer()
    with pytest.raises(ValueError, match=message):
        layer(x, **call)
    with pytest.raises(ValueError, match=message):
        twin.apply({"params": nnx.to_pure_dict(nnx.state(layer, nnx.Param))}, x, **call)


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[pytest.mark.slow] * (v != "everything")) for v in VARIANTS])
def test_both_go_on_from_a_cache(variant):
    layer, twin, x = nnx_layer(**VARIANTS[variant]), linen_layer(**VARIANTS[variant]), inputs(length=40)
    params = {"params": nnx.to_pure_dict(nnx.state(layer, nnx.Param))}
    expected, counts = layer(x), jnp.array([30, 21])
    caches = layer.create_cache(2, max_length=48), twin.create_cache(2, 32, max_length=48)
    assert jax.tree.structure(caches[0]) == jax.tree.structure(caches[1])
    apply, following = jax.jit(twin.apply, static_argnames="method"), jnp.stack([x[0, 30:40], x[1, 21:31]])
    begun, cache = nnx.jit(type(layer).prefill)(layer, x[:, :30], caches[0], counts=counts)
    out, _ = nnx.jit(type(layer).extend)(layer, following, cache)
    twin_begun, twin_cache = apply(params, x[:, :30], caches[1], counts=counts, method="prefill")
    twin_out, _ = apply(params, following, twin_cache, method="extend")
    np.testing.assert_allclose(twin_begun[1, :21], begun[1, :21], atol=1e-6)
    np.testing.assert_allclose(twin_out, out, atol=1e-6)
    np.testing.assert_allclose(begun[1, :21], expected[1, :21], atol=1e-5)
    np.testing.assert_allclose(out[0], expected[0, 30:40], atol=1e-5)
    np.testing.assert_allclose(out[1], expected[1, 21:31], atol=1e-5)


def test_both_refuse_the_cache_of_another_pattern():
    cache = nnx_layer(Dense()).create_cache(2, max_length=48)
    for extend in (nnx_layer().extend, linen_layer().bind({}).extend):
        with pytest.raises(ValueError, match=r"made for Dense\(\), the layer reads by LocalStride.* create_cache"):
            extend(inputs(length=1), cache)


def test_both_scale_their_rotary_positions():
    scaling, x = s2jax.RopeScaling(8.0, 1.0, 4.0, 64), inputs()
    layer, twin = nnx_layer(rope_theta=1e4, rope_scaling=scaling), linen_layer(rope_theta=1e4, rope_scaling=scaling)
    out = twin.apply({"params": nnx.to_pure_dict(nnx.state(layer, nnx.Param))}, x)
    np.testing.assert_array_equal(out, layer(x))
    assert np.abs(out - nnx_layer(rope_theta=1e4)(x)).max() > 1e-2
    with pytest.raises(ValueError, match="rope_scaling serves the rotary embedding, but the layer has rope_theta=None"):
        nnx_layer(rope_scaling=scaling)(x)


def test_head_counts_are_checked_in_both():
    with pytest.raises(ValueError, match="num_heads=4, num_kv_heads=3"):
        nnx_layer(num_kv_heads=3)
    with pytest.raises(ValueError, match="num_heads=4, num_kv_heads=3"):
        linen_layer(num_kv_heads=3).init(jax.random.key(0), inputs())


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("use_bias", "no", "use_bias must be True or False, got 'no'"),
        ("qk_norm", None, "qk_norm must be True or False, got None"),
        ("use_sinks", 1, "use_sinks must be True or False, got 1"),
        ("dtype", "a", "dtype must be a dtype of floats, such as jnp.bfloat16, got 'a'"),
        ("param_dtype", "int8", "param_dtype must be a dtype of floats, such as jnp.bfloat16, got 'int8'"),
        ("rope_theta", "a", "rope_theta must be a number known while tracing, got str"),
        ("rope_theta", -1.0, "rope_theta must be a finite number greater than 0, got -1.0"),
        ("rope_theta", 10**39, r"rope_theta must be a number of at most 3.40282e\+38, got 1e\+39"),
        ("norm_eps", 10**39, r"norm_eps must be a number of at most 3.40282e\+38, got 1e\+39"),
        ("norm_eps", -1.0, "norm_eps must be at least 0, got -1.0"),
        ("norm_eps", "a", "norm_eps must be a number known while tracing, got str"),
        ("out_features", 1.5, "out_features must be a positive integer or None, got 1.5"),
        ("out_features", True, "out_features must be a positive integer or None, got True"),
        ("out_features", 10**30, rf"out_features must be at most 2\*\*31 - 1, got {10**30}"),
        ("head_axis", 1.5, r"head_axis must be the name of an axis, several names or \(\), got 1.5"),
    ],
)
def test_both_refuse_what_is_none_of_its_kind(argument, value, message):
    for layer in (nnx_layer, linen_layer):
        with pytest.raises(ValueError, match=f"^{message}$"):
            layer(**{argument: value})


def test_an_integer_beyond_int32_is_a_theta_as_a_float_is():
    x, settings = inputs(length=5), {"qk_norm": True, "norm_eps": 10**12}
    expected = nnx_layer(rope_theta=1e12, **settings)(x)
    layer = nnx_layer(rope_theta=10**12, **settings)
    np.testing.assert_array_equal(layer(x), expected)
    twin = linen_layer(rope_theta=10**12, **settings)
    np.testing.assert_array_equal(twin.apply({"params": nnx.to_pure_dict(nnx.state(layer, nnx.Param))}, x), expected)
