"""Configs refuse what does not fit, and the arithmetic about them is that of the real models."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import models
from models import PRESETS, Transformer, TransformerConfig, hybrid_dense_layers
from s2jax.patterns import Dense, LocalStride

TINY = PRESETS["tiny"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"num_layers": -1}, "num_layers must be a positive integer, got -1"),
        ({"d_model": 128.0}, "d_model must be a positive integer, got 128.0"),
        ({"d_ff": True}, "d_ff must be a positive integer, got True"),
        ({"num_kv_heads": 3}, "num_heads=4, num_kv_heads=3"),
        ({"head_dim": 33}, "head_dim must be even for rotary positions, got 33"),
        ({"pattern": "dense"}, "expected a pattern such as .*got 'dense'.*did you mean Dense"),
        ({"pattern": Dense(causal=False)}, "causal pattern, got the bidirectional Dense"),
        ({"dense_layers": (4,)}, r"indices from 0 to 3, got \(4,\)"),
        ({"dense_layers": (-1,)}, r"indices from 0 to 3, got \(-1,\)"),
        ({"dense_layers": (1, 1)}, r"each layer once, got \(1, 1\)"),
        ({"rope_theta": 0.0}, "rope_theta must be positive, got 0.0"),
        ({"norm_eps": float("nan")}, "norm_eps must be positive, got nan"),
        ({"dtype": "float16"}, "dtype must be one of bfloat16, float32; got 'float16'"),
        ({"remat": "all"}, "remat must be one of none, attention, full; got 'all'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_configs_are_values():
    assert dataclasses.replace(TINY) == TINY
    assert hash(dataclasses.replace(TINY)) == hash(TINY)
    unordered = dataclasses.replace(TINY, dense_layers=[2, 0])
    assert unordered.dense_layers == (0, 2)


def test_hybrid_dense_layers():
    assert hybrid_dense_layers(12, first=2, every=4) == (0, 1, 5, 9)
    assert hybrid_dense_layers(4) == (0,)
    assert hybrid_dense_layers(3, first=0) == ()
    assert hybrid_dense_layers(3, first=0, every=1) == (0, 1, 2)
    with pytest.raises(ValueError, match="first must be from 0 to num_layers=3, got 4"):
        hybrid_dense_layers(3, first=4)
    with pytest.raises(ValueError, match=r"every must be at least 1.*got 0"):
        hybrid_dense_layers(3, every=0)


@pytest.mark.parametrize("name", PRESETS)
def test_param_count_is_that_of_the_real_model(name):
    model = nnx.eval_shape(lambda: Transformer(PRESETS[name], rngs=nnx.Rngs(0)))
    assert models.param_count(PRESETS[name]) == sum(x.size for x in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize("change", [{"tie_embeddings": False, "qk_norm": False}, {"num_kv_heads": 2, "head_dim": 40}])
def test_param_count_of_other_shapes(change):
    config = dataclasses.replace(TINY, **change)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    assert models.param_count(config) == sum(x.size for x in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize(("name", "billions"), [("s2-1.3b", 1.3), ("s2-7b", 7), ("s2-70b", 70)])
def test_presets_are_of_the_size_in_their_names(name, billions):
    assert models.param_count(PRESETS[name]) / 1e9 == pytest.approx(billions, rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_heads_of_each_preset_read_all_of_the_context_together(name):
    config = PRESETS[name]
    length = config.pattern.block_size * config.pattern.vert_stride * 2
    last_row = config.pattern.block_mask(config.num_heads, config.num_kv_heads, length)[:, -1]
    assert last_row.any(0).all()
    assert not last_row.all(1).any()


def test_flops_per_token_are_those_of_the_matrix_products():
    config = dataclasses.replace(TINY, dense_layers=(0, 1, 2, 3), vocab_size=300, num_kv_heads=2)
    matrices = models.param_count(config) - config.d_model * (2 * 4 + 1) - 4 * 2 * config.head_dim  # less the gains
    pairs = 4 * 4 * np.tril(np.ones((256, 256))).sum()  # layers × heads × causal pairs
    expected = 6 * matrices + 12 * config.head_dim * pairs / 256
    assert models.flops_per_token(config, 256) == pytest.approx(expected)


def test_flops_per_token_count_visited_blocks_only():
    pattern = LocalStride(block_size=16, local_blocks=1, vert_stride=4)
    sparse = dataclasses.replace(TINY, pattern=pattern, dense_layers=(0,))
    dense = dataclasses.replace(sparse, dense_layers=(0, 1, 2, 3))
    nothing = models.flops_per_token(dense, 256) - 12 * 128 * 4 * 128.5  # all but the attention
    attention_of_a_layer = 12 * 128 * 128.5
    read = pattern.block_mask(4, 4, 256).mean(0).sum() / np.tril(np.ones((16, 16))).sum()
    expected = nothing + attention_of_a_layer * (1 + 3 * read)
    assert models.flops_per_token(sparse, 256) == pytest.approx(expected)


@pytest.mark.parametrize("length", [0, -5, 10.0])
def test_flops_per_token_of_no_length(length):
    with pytest.raises(ValueError, match="seq_len must be a positive integer"):
        models.flops_per_token(TINY, length)


def test_config_needs_names():
    with pytest.raises(TypeError):
        TransformerConfig(272, 4)
