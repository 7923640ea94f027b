"""Weights under Hugging Face names."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import PRESETS
from models.checkpoints.huggingface_weights import from_huggingface, to_huggingface
from models.checkpoints.safetensors import ShardedTensors, save_safetensors
from s2jax.patterns import Dense
from tests.models.tiny_checkpoints import transformer

BASE = dataclasses.replace(PRESETS["tiny"], num_layers=2, implementation="reference")  # which compiles fastest
CONFIGS = {
    "tied": dataclasses.replace(BASE, num_kv_heads=2, dense_layers=(0, 1)),
    "untied": dataclasses.replace(BASE, tie_embeddings=False, qk_norm=False, head_dim=24),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name):
    config = CONFIGS[name]
    model, other = transformer(config), transformer(config, seed=1)
    tokens = jnp.arange(60).reshape(2, 30)
    assert np.abs(model(tokens) - other(tokens)).max() > 0.01
    nnx.update(other, from_huggingface(to_huggingface(model), config))
    np.testing.assert_array_equal(other(tokens), model(tokens))
    assert jax.tree.structure(nnx.state(other)) == jax.tree.structure(nnx.state(model))


def test_names_and_shapes_are_those_of_llama():
    shapes = {name: tensor.shape for name, tensor in to_huggingface(transformer(CONFIGS["tied"])).items()}
    assert shapes["model.embed_tokens.weight"] == (272, 128)
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (128, 128)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (64, 128)
    assert shapes["model.layers.1.self_attn.k_norm.weight"] == (32,)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (128, 352)
    assert shapes["model.norm.weight"] == (128,)
    assert "lm_head.weight" not in shapes
    untied = to_huggingface(transformer(CONFIGS["untied"]))
    assert untied["lm_head.weight"].shape == (272, 128)
    assert untied["model.layers.0.self_attn.o_proj.weight"].shape == (128, 96)
    assert len(untied) == 2 * 9 + 3


def llama_layer(tensors, x, heads, theta, eps):
    """One dense Llama layer by its definition over the tensors of a checkpoint, in float64."""
    p = {name.removeprefix("model.layers.0."): np.float64(tensor) for name, tensor in tensors.items()}

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * p[f"{name}.weight"]

    def rotate_half(x):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([-b, a], axis=-1)

    def project(x, name):
        return (x @ p[f"self_attn.{name}_proj.weight"].T).reshape(len(x), heads, -1).swapaxes(0, 1)

    hidden = norm(x, "input_layernorm")
    q, k, v = (project(hidden, name) for name in "qkv")
    half = np.arange(0, q.shape[-1], 2) / q.shape[-1]
    angles = np.concatenate([np.outer(np.arange(len(x)), theta**-half)] * 2, axis=-1)
    q, k = (a * np.cos(angles) + rotate_half(a) * np.sin(angles) for a in (q, k))
    logits = np.where(np.tri(len(x)), q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    attended = (weights / weights.sum(-1, keepdims=True)) @ v
    x = x + attended.swapaxes(0, 1).reshape(len(x), -1) @ p["self_attn.o_proj.weight"].T
    hidden = norm(x, "post_attention_layernorm")
    gate, up = (hidden @ p[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (gate / (1 + np.exp(-gate)) * up) @ p["mlp.down_proj.weight"].T


def test_a_layer_computes_what_a_llama_layer_does_with_its_tensors():
    config = dataclasses.replace(CONFIGS["untied"], pattern=Dense())
    model = transformer(config)
    x = np.asarray(jax.random.normal(jax.random.key(2), (50, config.d_model)))
    expected = llama_layer(to_huggingface(model), x, config.num_heads, config.rope_theta, config.norm_eps)
    np.testing.assert_allclose(model.layers[0](x[None])[0], expected, atol=2e-5)


def test_tensors_of_another_model_are_refused():
    config = CONFIGS["untied"]
    tensors = to_huggingface(transformer(config))
    others = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"} | {"bias": np.zeros(3)}
    with pytest.raises(ValueError, match=r"missing are \['lm_head.weight'\] \(1 in all\), unknown are \['bias'\]"):
        from_huggingface(others, config)
    with pytest.raises(ValueError, match=r"lm_head.weight must have shape \[272, 128\].*got \[128, 272\]"):
        from_huggingface({**tensors, "lm_head.weight": tensors["lm_head.weight"].T}, config)


def test_narrow_tensors_become_float32_and_what_follows_from_others_is_skipped():
    config = CONFIGS["tied"]
    tensors = {name: tensor.astype(jnp.bfloat16) for name, tensor in to_huggingface(transformer(config)).items()}
    expected = jax.tree.structure(from_huggingface(tensors, config))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # tied, and stored all the same
    parameters = from_huggingface(tensors, config)
    assert jax.tree.structure(parameters) == expected
    assert {x.dtype for x in jax.tree.leaves(parameters)} == {np.dtype("float32")}


def test_safetensors_round_trip(tmp_path):
    pytest.importorskip("safetensors")
    tensors = to_huggingface(transformer(CONFIGS["tied"]))
    tensors["narrow"] = tensors["model.norm.weight"].astype(jnp.bfloat16)
    save_safetensors(tmp_path / "model.safetensors", tensors)
    loaded = ShardedTensors(tmp_path)
    chex.assert_trees_all_equal(dict(loaded), tensors, strict=True)
