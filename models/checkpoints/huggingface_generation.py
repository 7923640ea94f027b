"""generation_config.json: the tokens that end a text, and how the next token is chosen by default."""

from collections.abc import Mapping
from typing import Any

from models.sampling import Sampling
from models.untrusted import quoted, shortened

# What these ask for is not done here; under the first value they ask for nothing.
_NEUTRAL: dict[str, tuple] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "constraints": (None,),
    "diversity_penalty": (0, None),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (0, None),
    "encoder_repetition_penalty": (1, None),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (1, None),
    "max_time": (None,),
    "min_length": (0, None),
    "min_new_tokens": (0, None),
    "no_repeat_ngram_size": (0, None),
    "num_beam_groups": (1, None),
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "penalty_alpha": (0, None),
    "remove_invalid_values": (False, None),
    "repetition_penalty": (1, None),
    "sequence_bias": (None, {}, []),
    "stop_strings": (None, []),
    "suppress_tokens": (None, []),
    "token_healing": (False, None),
    "watermarking_config": (None,),
}
# The same, where tokens are drawn at random.
_NEUTRAL_IN_SAMPLING: dict[str, tuple] = {
    "epsilon_cutoff": (0, None),
    "eta_cutoff": (0, None),
    "min_p": (0, None),
    "top_h": (None,),
    "typical_p": (1, None),
}
# Found in files, and without effect on which tokens come: a caller always says how many.
_WITHOUT_EFFECT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample", "temperature", "top_k"),
    *("top_p", "max_length", "max_new_tokens", "early_stopping", "length_penalty", "renormalize_logits", "use_cache"),
    *("transformers_version", "cache_implementation", "cache_config", "return_dict_in_generate", "output_attentions"),
    *("output_hidden_states", "output_scores", "output_logits", "low_memory", "prefill_chunk_size", "compile_config"),
    *("disable_compile", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "max_cache_len"),
    *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size"),
    *("prompt_lookup_num_tokens", "assistant_early_exit", "continuous_batching_config", "trust_remote_code"),
    *("chat_format", "max_window_size", "user_token_id", "assistant_token_id"),
}


def sampling_from(values: Mapping[str, Any]) -> tuple[Sampling, dict[str, Any]]:
    """The sampling of transformers' `generate` under a generation_config.json.

    Returns:
        What `Sampling` can do of it, and the settings that it cannot, with their values.

    Raises:
        ValueError: a temperature, top_k, top_p or do_sample is of another type, or out of range.
    """
    draws = values.get("do_sample")
    if draws is not None and not isinstance(draws, bool):
        raise ValueError(f"generation_config.json must have true or false as do_sample, got {quoted(draws)}")
    neutral = _NEUTRAL | (_NEUTRAL_IN_SAMPLING if draws else {})
    refused = {key: value for key, value in values.items() if key in neutral and value not in neutral[key]}
    if not draws:
        return Sampling(), refused
    top_k = 50 if values.get("top_k") is None else values["top_k"]
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 <= top_k < 1 << 31:
        raise ValueError(f"generation_config.json must have an integer from 0 on as top_k, got {quoted(top_k)}")
    temperature, top_p = (1.0 if values.get(key) is None else values[key] for key in ("temperature", "top_p"))
    for key, number in (("temperature", temperature), ("top_p", top_p)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise ValueError(f"generation_config.json must have a number as {key}, got {quoted(number)}")
    try:
        return Sampling(temperature, top_k or None, top_p), refused
    except ValueError as error:
        raise ValueError(f"generation_config.json: {shortened(error)}") from error


def generation_settings() -> set[str]:
    """The keys of a generation_config.json that are known here."""
    return _NEUTRAL.keys() | _NEUTRAL_IN_SAMPLING.keys() | _WITHOUT_EFFECT


def unknown_settings(values: Mapping[str, Any]) -> list[str]:
    """The keys of a generation_config.json that are not known here, of which transformers takes no notice either."""
    return sorted(key for key in values if key not in generation_settings() and not key.startswith("_"))
