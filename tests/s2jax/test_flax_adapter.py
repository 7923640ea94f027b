"""`attention_fn` in the multi-head attention layers of Flax."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import s2jax.linen
import s2jax.nnx
from s2jax.patterns import Dense, LocalStride

SPARSE = LocalStride(block_size=16, local_blocks=1, vert_stride=2)


def of_pattern(library, pattern):
    return library.attention_fn(pattern, implementation="reference")  # which compiles fastest


def inputs(*batch, length=40):
    return jax.random.normal(jax.random.key(0), (*batch, length, 32))


def of_nnx(attention_fn=None, **settings):
    settings = {"decode": False} | settings
    if attention_fn is not None:
        settings["attention_fn"] = attention_fn
    return nnx.MultiHeadAttention(num_heads=4, in_features=32, rngs=nnx.Rngs(0), **settings)


def of_linen(attention_fn=None, **settings):
    if attention_fn is not None:
        settings["attention_fn"] = attention_fn
    return nn.MultiHeadDotProductAttention(num_heads=4, **settings)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("pattern", [Dense(), SPARSE], ids=["dense", "sparse"])
def test_nnx_equals_the_library_under_the_patterns_mask(batch, pattern):
    x = inputs(*batch)
    mask = jnp.asarray(pattern.token_mask(4, 4, 40, 40)).reshape((1,) * len(batch) + (4, 40, 40))
    # The library's own dense attention, over one batch axis at a time where it takes but one.
    expected = of_nnx()(x.reshape(-1, 40, 32), mask=mask.reshape(1, 4, 40, 40)).reshape(x.shape)
    np.testing.assert_allclose(of_nnx(of_pattern(s2jax.nnx, pattern))(x), expected, atol=1e-5)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("pattern", [Dense(), SPARSE], ids=["dense", "sparse"])
def test_linen_equals_the_library_under_the_patterns_mask(batch, pattern):
    x = inputs(*batch)
    mask = jnp.asarray(pattern.token_mask(4, 4, 40, 40))
    variables = of_linen().init(jax.random.key(1), x)
    expected = of_linen().apply(variables, x, mask=mask)
    result = of_linen(of_pattern(s2jax.linen, pattern)).apply(variables, x)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_grouped_heads_and_is_causal():
    expected = of_nnx(num_kv_heads=2)(inputs(2), is_causal=True)
    grouped = of_nnx(of_pattern(s2jax.nnx, Dense()), num_kv_heads=2)
    np.testing.assert_allclose(grouped(inputs(2), is_causal=True), expected, atol=1e-5)


def test_dtype_is_that_of_the_layer():
    layer = of_nnx(of_pattern(s2jax.nnx, Dense()), dtype=jnp.bfloat16)
    assert layer(inputs(2)).dtype == jnp.bfloat16
    layer = of_linen(of_pattern(s2jax.linen, Dense()), dtype=jnp.bfloat16, force_fp32_for_softmax=True)
    assert layer.init_with_output(jax.random.key(0), inputs(2))[0].dtype == jnp.bfloat16


def test_dropout_that_is_not_active_passes():
    function = of_pattern(s2jax.nnx, Dense())
    of_nnx(function, dropout_rate=0.5, deterministic=True)(inputs(2))
    of_linen(function, dropout_rate=0.5, deterministic=True).init(jax.random.key(0), inputs(2))


def test_every_keyword_of_linen_is_named():
    """Linen drops, without a word, what an attention_fn does not name."""
    theirs = set(inspect.signature(nn.dot_product_attention).parameters)
    theirs |= set(inspect.signature(nnx.dot_product_attention).parameters) - {"promote_dtype"}  # which no layer passes
    ours = inspect.signature(of_pattern(s2jax.linen, Dense())).parameters
    assert theirs <= set(ours)
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in ours.values())


def refused_by_nnx():
    function = of_pattern(s2jax.nnx, SPARSE)
    x, rngs = inputs(2), nnx.Rngs(1)
    yield "a mask", lambda: of_nnx(function)(x, mask=jnp.ones((2, 1, 40, 40), bool))
    yield "dropout_rate=0.5", lambda: of_nnx(function, dropout_rate=0.5)(x, deterministic=False, rngs=rngs)
    yield "sow_weights", lambda: of_nnx(function)(x, sow_weights=True)
    yield "precision=highest", lambda: of_nnx(function, precision="highest")(x)
    yield "input_positions", lambda: of_nnx(function)(x, input_positions=jnp.arange(40))
    bidirectional = of_pattern(s2jax.nnx, Dense(causal=False))
    yield "is_causal=True beside the bidirectional", lambda: of_nnx(bidirectional)(x, is_causal=True)

    def decode():
        layer = of_nnx(function, decode=True)
        layer.init_cache((2, 40, 32))
        layer(x[:, :1])

    yield "a mask.*decode=True", decode


def refused_by_linen():
    function = of_pattern(s2jax.linen, SPARSE)
    x, key = inputs(2), jax.random.key(0)
    yield "a mask", lambda: of_linen(function).init(key, x, mask=jnp.ones((2, 1, 40, 40), bool))
    yield "dropout_rate=0.5", lambda: of_linen(function, dropout_rate=0.5).init(key, x, deterministic=False)
    yield "sow_weights", lambda: of_linen(function).init(key, x, sow_weights=True)
    yield "precision=highest", lambda: of_linen(function, precision="highest").init(key, x)
    einsums = {
        "qk_attn_weights_einsum_cls": lambda: jnp.einsum,
        "attn_weights_value_einsum_cls": lambda: jnp.einsum,
    }
    yield "qk_attn_weights_einsum", lambda: of_linen(function, **einsums).init(key, x)

    def decode():
        layer = of_linen(function, decode=True)
        variables = layer.init(key, x)
        layer.apply(variables, x[:, :1], mutable="cache")

    yield "a mask.*decode=True", decode


def refused_in_direct_calls():
    function = of_pattern(s2jax.nnx, SPARSE)
    q = jnp.ones((2, 3, 40, 4, 8))
    yield "a bias", lambda: function(q, q, q, bias=jnp.zeros((40, 40)))
    yield "einsum_dot_general", lambda: function(q, q, q, einsum_dot_general=jax.lax.dot_general)
    yield "attn_weights_value_einsum", lambda: function(q, q, q, attn_weights_value_einsum=jnp.einsum)
    yield "equal leading axes.*key", lambda: function(q, jnp.ones((3, 2, 40, 4, 8)), q)


@pytest.mark.parametrize(
    ("message", "call"), [*refused_by_nnx(), *refused_by_linen(), *refused_in_direct_calls()], ids=lambda x: None
)
def test_what_cannot_be_honoured_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()
