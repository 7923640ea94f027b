"""Arguments that are called otherwise elsewhere, or not at all here: one line that says what to use instead."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import s2jax
from s2jax import KVCache, LocalStride, attention, block_sparse_attention

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")

PATTERN = LocalStride(16, 2, 2)
X = jnp.ones((1, 20, 16))
Q = jnp.ones((1, 20, 4, 8))


def op(**options):
    return attention(Q, Q, Q, PATTERN, **options)


def below(**options):
    return block_sparse_attention(Q, Q, Q, None, **options)


def layer(**options):
    return s2jax.nnx.S2Attention(16, 4, PATTERN, rngs=nnx.Rngs(0), **options)


def linen_layer(**options):
    return s2jax.linen.S2Attention(4, PATTERN, **options)


def called(**options):
    return layer()(X, **options)


def linen_called(**options):
    return linen_layer().init(jax.random.key(0), X, **options)


def adapter(**options):
    return s2jax.nnx.attention_fn(PATTERN)(Q, Q, Q, **options)


def cache(method: str, **options):
    return getattr(layer().create_cache(1, max_length=20), method)(Q, Q, Q, **options)


EVERYWHERE = {
    "op": op,
    "block_sparse_attention": below,
    "nnx": layer,
    "nnx, called": called,
    "linen": linen_layer,
    "linen, called": linen_called,
    "attention_fn": lambda **options: s2jax.linen.attention_fn(PATTERN, **options),
    "prefill": lambda **options: cache("prefill", **options),
    "extend": lambda **options: cache("extend", **options),
    "create": lambda **options: KVCache.create(PATTERN, batch=1, num_heads=4, num_kv_heads=4, head_dim=8, **options),
    "create_cache": lambda **options: layer().create_cache(1, **options),
    "layer's prefill": lambda **options: layer().prefill(X, layer().create_cache(1, max_length=20), **options),
}


@pytest.mark.parametrize("where", EVERYWHERE)
def test_known_from_elsewhere(where: str):
    for name, advice in {
        "is_causal": "causality belongs to the pattern",
        "causal": "causality belongs to the pattern",
        "attn_mask": "the pattern says what is read",
        "mask": "the pattern says what is read",
        "window_size": "a pattern with a window: s2jax.Local",
        "dropout_rate": "no dropout of attention weights",
        "deterministic": "no dropout of attention weights",
        "bias": "nothing can be added to the logits",
    }.items():
        with pytest.raises(TypeError, match=f"takes no {name}: .*{advice}"):
            EVERYWHERE[where](**{name: None})


@pytest.mark.parametrize(
    ("call", "name", "advice"),
    [
        (op, "softmax_scale", "take scale"),
        (linen_layer, "sm_scale", "take scale"),
        (called, "sm_scale", "it takes x, kv, positions"),  # a layer is told it when it is made
        (below, "segment_ids", "take query_segment_ids and kv_segment_ids"),
        (op, "query_segmentids", "do you mean query_segment_ids?"),
        (called, "segment_id", "do you mean segment_ids?"),
        (layer, "qk_norms", "do you mean qk_norm?"),
        (layer, "qkv_features", "take head_dim"),
        (linen_layer, "normalize_qk", "take qk_norm"),
        (linen_layer, "rope_thetas", "do you mean rope_theta?"),
        (adapter, "window_size", "a pattern with a window"),
        (EVERYWHERE["create"], "max_len", "do you mean max_length?"),
        (EVERYWHERE["prefill"], "soft_cap", "take logits_soft_cap"),
        (op, "colour", "it takes query, key, value, pattern, scale"),
    ],
)
def test_near_names(call, name: str, advice: str):
    with pytest.raises(TypeError) as raised:
        call(**{name: None})
    assert f"takes no {name}: " in str(raised.value)
    assert advice in str(raised.value)


def test_linen_still_sees_what_the_adapter_takes():
    """It passes what the signature names: a mask must not be lost."""
    attend = s2jax.linen.attention_fn(PATTERN)
    module = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=attend)
    with pytest.raises(ValueError, match="cannot honour a mask"):
        module.init(jax.random.key(0), X, mask=jnp.ones((1, 1, 20, 20), bool))


def test_layers_come_with_the_package():
    """And Flax with them only; where it is missing, one line says so."""
    program = """
import sys, s2jax
assert "flax" not in sys.modules
assert {"nnx", "linen"} <= set(dir(s2jax))
try:
    s2jax.nonsense
except AttributeError:
    pass
hidden, sys.modules["flax"] = sys.modules.get("flax"), None
try:
    s2jax.nnx
except ImportError as error:
    assert str(error) == "s2jax.nnx needs Flax: pip install flax", error
del sys.modules["flax"]
assert s2jax.nnx.S2Attention and s2jax.linen.S2Attention and "flax" in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
