"""config.json: what it means for each architecture, and what is refused."""

import dataclasses

import pytest

from models.checkpoints.huggingface_config import config_from_huggingface, config_to_huggingface
from s2jax.patterns import Dense, Local
from tests.models.tiny_checkpoints import LLAMA, LLAMA3, QWEN3, SCALED, UNTIED

VALUES = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3,
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
}
SETTINGS = {"pattern": Dense(), "dtype": "float32", "implementation": "reference"}


def config(**changes):
    return config_from_huggingface(VALUES | changes, **SETTINGS)


def without(*keys, **changes):
    return config_from_huggingface({k: v for k, v in (VALUES | changes).items() if k not in keys}, **SETTINGS)


def test_llama():
    assert config() == LLAMA
    assert config(head_dim=24, torch_dtype="bfloat16", rope_scaling=None) == dataclasses.replace(LLAMA, head_dim=24)
    bare = without("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    assert bare == dataclasses.replace(UNTIED, norm_eps=1e-6)


def test_mistral_is_llama_unless_it_has_a_window():
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert config(**mistral, sliding_window=None) == LLAMA
    assert without("num_key_value_heads", **mistral, sliding_window=None, num_attention_heads=16).num_kv_heads == 8
    with pytest.raises(ValueError, match=r"sliding_window=4096; .*set it to null there and give .* Local\(tokens="):
        config(**mistral)


def test_qwen3_normalises_queries_and_keys():
    qwen3 = {"architectures": ["Qwen3ForCausalLM"], "head_dim": 24}
    assert config(**qwen3) == QWEN3
    assert config(architectures=["Qwen3ForCausalLM"]).head_dim == 128
    assert config(**qwen3, sliding_window=512, use_sliding_window=False) == QWEN3
    with pytest.raises(ValueError, match="sliding_window=512"):
        config(**qwen3, sliding_window=512, use_sliding_window=True)
    with pytest.raises(ValueError, match="sliding_window=4096"):  # transformers' default, from layer 28 on
        config(**qwen3, use_sliding_window=True, max_window_layers=0)


def test_the_rotary_base_of_transformers_5():
    assert without("rope_theta", rope_parameters={"rope_type": "default", "rope_theta": 500.0}) == LLAMA


def test_the_scaled_rotary_positions_of_llama_3():
    assert config(rope_scaling=LLAMA3) == SCALED
    assert without("rope_theta", rope_parameters=LLAMA3 | {"rope_theta": 500.0}) == SCALED


def test_settings_are_the_callers():
    local = config_from_huggingface(VALUES, pattern=Local(tokens=64), dense_layers=(1,), remat="full")
    assert (local.pattern, local.dense_layers, local.remat) == (Local(tokens=64), (1,), "full")


@pytest.mark.parametrize("original", [LLAMA, UNTIED, QWEN3, SCALED], ids=["llama", "untied", "qwen3", "scaled"])
def test_round_trip(original):
    values = config_to_huggingface(original, max_context=128)
    assert config_from_huggingface(values, **SETTINGS) == original
    assert values["max_position_embeddings"] == 128
    # What transformers 4 reads says the same.
    assert config_from_huggingface({k: v for k, v in values.items() if k != "rope_parameters"}, **SETTINGS) == original


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["Gemma2ForCausalLM"]}, "must be one of LlamaForCausalLM, .*has Gemma2ForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "has model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; supported is 'silu' alone"),
        ({"attention_bias": True}, "attention_bias=True; supported is False alone"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config=.*gptq"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "changes the rotary positions by .*linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "changes the rotary positions by .*llama3"),
        ({"rope_scaling": LLAMA3 | {"beta_fast": 32}}, "changes the rotary positions by .*beta_fast"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "needs a factor of at least 1, 0 < low_freq_factor < h"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "changes the rotary positions by .*yarn"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 500}}}, "changes the rotary positions by .*full_att"),
        ({"rope_parameters": {"rope_theta": 500, "partial_rotary_factor": 0.5}}, "changes the rotary positions"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "says of the rotary positions both rope_theta=500.0 and 10000.0"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3},
            "both rope_type='default' and 'llama3'",
        ),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "changes the rotary positions by .*'factor': '8'.* as numbers"),
        ({"rope_scaling": LLAMA3 | {"factor": None}}, "changes the rotary positions by"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "changes the rotary positions by"),
        ({"rope_scaling": "llama3"}, "must say by an object how positions are rotated, got 'llama3'"),
        ({"hidden_size": None}, "a positive integer as 'hidden_size', got None"),
        ({"vocab_size": "96"}, "a positive integer as 'vocab_size', got '96'"),
        ({"num_key_value_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
    ],
)
def test_what_the_model_cannot_follow_is_refused(changes, match):
    with pytest.raises(ValueError, match=match) as caught:
        config(**changes)
    assert "\n" not in str(caught.value)
