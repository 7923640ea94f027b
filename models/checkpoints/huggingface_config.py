"""config.json of Llama, Mistral and Qwen3 checkpoints in the Hugging Face format, from and to `TransformerConfig`.

What a config.json leaves out has the value that the package transformers gives it. A key that changes the model's
arithmetic in a way that `Transformer` cannot follow is an error, never ignored.
"""

import sys
from collections.abc import Mapping
from typing import Any

from models.checkpoints.huggingface_generation import generation_settings
from models.config import TransformerConfig
from models.untrusted import quoted, shortened
from s2jax.rotary import RopeScaling

# What the architectures are called elsewhere in config.json, and the defaults in which they differ. Mistral's window is
# on unless config.json turns it off, Qwen3's where it has use_sliding_window.
_MODEL_TYPES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "MistralForCausalLM": {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    "Qwen3ForCausalLM": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
    },
}
# The only values under which `Transformer` computes what the checkpoint's own model does. Of those after the first
# group transformers' three classes know nothing; where they are set, the weights were trained by another class.
_SUPPORTED: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "compression_config": (None,),
    #
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "embedding_multiplier": (1, None),
    "final_logit_softcapping": (None,),
    "head_dtype": (None,),
    "is_causal": (True, None),
    "logit_scale": (1, None),
    "logits_scaling": (1, None),
    "no_rope_layers": (None, []),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (1, None),
    "rope_interleaved": (False, None),
    "scale_depth": (None,),
    "scale_emb": (1, None),
    "use_bidirectional_attention": (False, None),
    "use_parallel_residual": (False, None),
    "use_qk_norm": (False, None),
}
# Read above or below, or without effect on what the model computes.
_KNOWN = {
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rope_theta", "rope_scaling", "s2jax"),
    *("rope_parameters", "rms_norm_eps", "tie_word_embeddings", "use_sliding_window", "layer_types", "eos_token_id"),
    *("bos_token_id", "pad_token_id", "attention_dropout", "dtype", "torch_dtype", "initializer_range", "use_cache"),
    *("pretraining_tp", "max_window_layers", "transformers_version", "transformers.js_config", "is_llama_config"),
    *(
        "unsloth_version",
        "unsloth_fixed",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "tokenizer_class",
    ),
    *("original_max_position_embeddings", "is_decoder", "is_encoder_decoder", "add_cross_attention", "auto_map"),
    *("task_specific_params", "id2label", "label2id", "finetuning_task", "chunk_size_feed_forward", "problem_type"),
}
_PLAIN_ROPE = {"rope_type", "rope_theta", "partial_rotary_factor"}
# In the order of `RopeScaling`.
_LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def config_from_huggingface(values: Mapping[str, Any], **settings: Any) -> TransformerConfig:
    """The config of a `Transformer` that computes what a checkpoint with this config.json does.

    Args:
        values: the contents of config.json, of transformers 4 or 5.
        settings: what a checkpoint does not decide: `pattern`, and any of `dense_layers`, `dtype`, `remat` and
            `implementation`.

    Raises:
        ValueError: on an architecture, or a value of a key, that `Transformer` cannot follow; on a key that is missing.
    """
    architecture = _architecture(values)
    values = {"hidden_act": "silu", **_DEFAULTS[architecture], **values}
    if architecture == "Qwen3ForCausalLM" and not _flag(values, "use_sliding_window"):
        values["sliding_window"] = None
    _check_supported(values)
    rope = _rope(values)
    heads, width = positive_integer(values, "num_attention_heads"), positive_integer(values, "hidden_size")
    stated = {key for key in ("num_key_value_heads", "head_dim") if values.get(key) is not None}
    if "head_dim" not in stated and width % heads:
        raise ValueError(f"config.json has hidden_size={width}, which num_attention_heads={heads} must divide")
    return TransformerConfig(
        vocab_size=positive_integer(values, "vocab_size"),
        num_layers=positive_integer(values, "num_hidden_layers"),
        d_model=width,
        num_heads=heads,
        num_kv_heads=positive_integer(values, "num_key_value_heads") if "num_key_value_heads" in stated else heads,
        head_dim=positive_integer(values, "head_dim") if "head_dim" in stated else width // heads,
        d_ff=positive_integer(values, "intermediate_size"),
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
        rope_scaling=RopeScaling(*(rope[key] for key in _LLAMA3_ROPE)) if "factor" in rope else None,
        norm_eps=_positive(values, "rms_norm_eps", 1e-6),
        tie_embeddings=_flag(values, "tie_word_embeddings"),
        qk_norm=architecture == "Qwen3ForCausalLM",
        **settings,
    )


def unknown_keys(values: Mapping[str, Any]) -> list[str]:
    """The keys of a config.json that are not known here; transformers' three classes take no notice of them."""
    known = {*_KNOWN, *_SUPPORTED, *generation_settings()}
    return sorted(key for key in values if key not in known and not key.startswith("_"))


def longest_context(values: Mapping[str, Any]) -> int:
    """The longest sequence, in tokens, that the model of a config.json was trained for."""
    return positive_integer({**_DEFAULTS[_architecture(values)], **values}, "max_position_embeddings")


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
    given, model_type = values.get("architectures"), values.get("model_type")
    named = _MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    if given is None or given == []:
        given = [named or f"model_type {quoted(model_type)}"]
    if not isinstance(given, list) or len(given) != 1 or given[0] not in list(_DEFAULTS):
        names = ", ".join(map(shortened, given)) if isinstance(given, list) else quoted(given)
        raise ValueError(f"the architecture must be one of {', '.join(_DEFAULTS)}; config.json has {shortened(names)}")
    if model_type is not None and named != given[0]:
        raise ValueError(
            f"config.json says both architectures=['{given[0]}'] and model_type={quoted(model_type)}, which is "
            "another: keep what the weights were trained by"
        )
    return given[0]


def _check_supported(values: Mapping[str, Any]) -> None:
    for key, supported in _SUPPORTED.items():
        value = values.get(key)
        if value in supported and not (isinstance(value, bool) and not isinstance(supported[0], bool)):
            continue
        hint = ""
        if key == "sliding_window":
            hint = "; to go on, set it to null there and give the window as the pattern Local(tokens=...)"
        raise ValueError(
            f"config.json has {key}={quoted(value)}; supported is {supported[0]!r} alone, as anything else "
            f"changes what the model computes{hint}"
        )
    kinds = values.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
        raise ValueError(f"config.json has layer_types={quoted(kinds)}; supported is 'full_attention' in all layers")


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary positions: transformers 5 has them in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`.

    Raises:
        ValueError: what is said twice differs, or it is something that the model cannot follow.
    """
    rope: dict[str, Any] = {}
    sources = {"rope_theta": values.get("rope_theta")}, values.get("rope_parameters"), values.get("rope_scaling")
    for source in sources:
        if not isinstance(source, (dict, type(None))):
            raise ValueError(f"config.json must say by an object how positions are rotated, got {quoted(source)}")
        for key, value in (source or {}).items():
            key = "rope_type" if key == "type" else key
            if value is not None and rope.setdefault(key, value) != value:
                raise ValueError(
                    f"config.json says of the rotary positions both {shortened(key)}={quoted(rope[key])} and "
                    f"{quoted(value)}; keep what is meant in rope_theta, rope_parameters and rope_scaling"
                )
    _check_rope({"rope_type": "default", **rope})
    return rope


def _check_rope(rope: Mapping[str, Any]) -> None:
    known = {"default": _PLAIN_ROPE, "llama3": _PLAIN_ROPE.union(_LLAMA3_ROPE)}.get(str(rope["rope_type"]), set())
    whole = rope["rope_type"] == "default" or rope.keys() >= set(_LLAMA3_ROPE)
    plain = all(_is_number(value) for key, value in rope.items() if key != "rope_type")
    if not (rope.keys() <= known and whole and plain) or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"config.json changes the rotary positions by {quoted(dict(rope))}; supported are plain ones, and "
            f"rope_type llama3 with {', '.join(_LLAMA3_ROPE)} as numbers"
        )


def positive_integer(values: Mapping[str, Any], key: str) -> int:
    """The value of a key of config.json; raises ValueError where it is another thing, or no size or position."""
    count = values.get(key)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count < 1 << 31:
        raise ValueError(
            f"config.json must have a positive integer as {key!r}, got {quoted(count)}; it is at most 2^31 - 1"
        )
    return count


def _positive(values: Mapping[str, Any], key: str, default: float) -> float:
    number = values.get(key, default)
    if not _is_number(number) or number <= 0:
        raise ValueError(f"config.json must have a positive number as {key!r}, got {quoted(number)}")
    return float(number)


def _flag(values: Mapping[str, Any], key: str) -> bool:
    flag = values.get(key)
    if flag is not None and not isinstance(flag, bool):
        raise ValueError(f"config.json must have true or false as {key!r}, got {quoted(flag)}")
    return bool(flag)


def _is_number(value: object) -> bool:
    """True for a finite number, which JSON as Python reads it need not be."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
