"""config.json of Llama, Mistral and Qwen3 checkpoints in the Hugging Face format, from and to `TransformerConfig`.

What a config.json leaves out has the value that the package transformers gives it. A key that changes the model's
arithmetic in a way that `Transformer` cannot follow is an error, never ignored.
"""

from collections.abc import Mapping
from typing import Any

from models.config import TransformerConfig
from s2jax.heads import RopeScaling

# Defaults in which the architectures differ. Mistral's window is on unless config.json turns it off.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "head_dim": 128},
}
# The only values under which `Transformer` computes what the checkpoint's own model does.
_SUPPORTED: dict[str, tuple] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
_PLAIN_ROPE = {"rope_type", "rope_theta", "partial_rotary_factor"}
# In the order of `RopeScaling`.
_LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def config_from_huggingface(values: Mapping[str, Any], **settings: Any) -> TransformerConfig:
    """The config of a `Transformer` that computes what a checkpoint with this config.json does.

    Args:
        values: the contents of config.json, of transformers 4 or 5.
        settings: what a checkpoint does not decide: `pattern`, and any of `dense_layers`, `dtype`, `remat`,
            `query_spec` and `implementation`.

    Raises:
        ValueError: on an architecture, or a value of a key, that `Transformer` cannot follow; on a key that is missing.
    """
    architecture = _architecture(values)
    values = {"hidden_act": "silu", **_DEFAULTS[architecture], **values}
    if architecture == "Qwen3ForCausalLM" and not values.get("use_sliding_window"):
        values["sliding_window"] = None
    _check_supported(values)
    rope = _rope(values)
    heads, width = positive_integer(values, "num_attention_heads"), positive_integer(values, "hidden_size")
    return TransformerConfig(
        vocab_size=positive_integer(values, "vocab_size"),
        num_layers=positive_integer(values, "num_hidden_layers"),
        d_model=width,
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or width // heads,
        d_ff=positive_integer(values, "intermediate_size"),
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
        rope_scaling=RopeScaling(*(rope[key] for key in _LLAMA3_ROPE)) if "factor" in rope else None,
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        **settings,
    )


def config_to_huggingface(config: TransformerConfig, max_context: int) -> dict[str, Any]:
    """The config.json under which transformers, 4 or 5, computes what the model does with every layer dense.

    Args:
        config: of the model. Its pattern is no part of the format and is left out.
        max_context: the longest sequence, in tokens, that the model is meant for.
    """
    theta, scaling, rope = config.rope_theta, config.rope_scaling, {"rope_type": "default"}
    if scaling is not None:
        rope = {"rope_type": "llama3", **dict(zip(_LLAMA3_ROPE, scaling, strict=True))}
    architecture, model_type = ("Qwen3ForCausalLM", "qwen3") if config.qk_norm else ("LlamaForCausalLM", "llama")
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": max_context,
        # Transformers 4 reads the first two, 5 the third.
        "rope_theta": theta,
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": rope | {"rope_theta": theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
    }


def _architecture(values: Mapping[str, Any]) -> str:
    given = values.get("architectures") or [f"model_type {values.get('model_type')!r}"]
    if len(given) != 1 or given[0] not in _DEFAULTS:
        raise ValueError(f"the architecture must be one of {', '.join(_DEFAULTS)}; config.json has {', '.join(given)}")
    return given[0]


def _check_supported(values: Mapping[str, Any]) -> None:
    for key, supported in _SUPPORTED.items():
        if values.get(key) not in supported:
            hint = ""
            if key == "sliding_window":
                hint = "; to go on, set it to null there and give the window as the pattern Local(tokens=...)"
            raise ValueError(
                f"config.json has {key}={values[key]!r}; supported is {supported[0]!r} alone, as anything else "
                f"changes what the model computes{hint}"
            )


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary positions: transformers 5 has them in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`.

    Raises:
        ValueError: what is said twice differs, or it is something that the model cannot follow.
    """
    rope: dict[str, Any] = {}
    sources = {"rope_theta": values.get("rope_theta")}, values.get("rope_parameters"), values.get("rope_scaling")
    for source in sources:
        if not isinstance(source, (dict, type(None))):
            raise ValueError(f"config.json must say by an object how positions are rotated, got {source!r}")
        for key, value in (source or {}).items():
            key = "rope_type" if key == "type" else key
            if value is not None and rope.setdefault(key, value) != value:
                raise ValueError(
                    f"config.json says of the rotary positions both {key}={rope[key]!r} and {value!r}; keep what is "
                    "meant in rope_theta, rope_parameters and rope_scaling"
                )
    _check_rope({"rope_type": "default", **rope})
    return rope


def _check_rope(rope: Mapping[str, Any]) -> None:
    known = {"default": _PLAIN_ROPE, "llama3": _PLAIN_ROPE.union(_LLAMA3_ROPE)}.get(str(rope["rope_type"]), set())
    whole = rope["rope_type"] == "default" or rope.keys() >= set(_LLAMA3_ROPE)
    numbers = [value for key, value in rope.items() if key != "rope_type"]
    plain = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in numbers)
    if not (rope.keys() <= known and whole and plain) or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"config.json changes the rotary positions by {dict(rope)}; supported are plain ones, and rope_type llama3 "
            f"with {', '.join(_LLAMA3_ROPE)} as numbers"
        )


def positive_integer(values: Mapping[str, Any], key: str) -> int:
    """The value of a key of config.json; raises ValueError where it is another thing."""
    count = values.get(key)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"config.json must have a positive integer as {key!r}, got {count!r}")
    return count
