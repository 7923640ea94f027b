"""Arguments that other attention functions take, and this library's do not: an error that says what to use instead."""

import difflib
import functools
import inspect
import typing
from collections.abc import Callable

ADVICE: dict[str, str] = {
    "causality belongs to the pattern: most patterns are causal, and take causal=False": (
        "is_causal causal use_causal_mask"
    ),
    "the pattern says what is read: give the mask as the pattern, or build one (s2jax.MaskMod, s2jax.BlockMask)": (
        "mask attn_mask attention_mask block_mask mask_mod mask_fn mask_value key_padding_mask"
    ),
    "give a pattern with a window: s2jax.Local(blocks=…) or s2jax.Local(tokens=…)": (
        "window_size window local_window_size sliding_window sliding_window_size"
    ),
    "there is no dropout of attention weights: leave it out, and use dropout elsewhere in the model": (
        "dropout_rate dropout_p dropout dropout_rng dropout_key broadcast_dropout deterministic attention_dropout "
        "attn_dropout is_training training train inference rngs"
    ),
    "nothing can be added to the logits: leave it out; the layers know rotary positions (rope_theta)": (
        "bias attn_bias attention_bias alibi_slopes alibi score_mod ab"
    ),
    "take scale": "softmax_scale sm_scale logits_scale scale_factor attn_scale scaling query_pre_attn_scalar",
    "take logits_soft_cap": "softcap soft_cap logit_cap attn_logits_soft_cap logit_softcap logits_softcap",
    "take query_segment_ids and kv_segment_ids": "segment_ids q_segment_ids document_ids",
    "hide padding by segment ids (of padding, one that no query has), or give a KV cache the counts of tokens": (
        "query_seq_lengths key_value_seq_lengths lengths seq_lens kv_lens cu_seqlens cu_seqlens_q cu_seqlens_k "
        "max_seqlen"
    ),
    "take return_lse": "return_residual return_residuals save_residuals return_softmax_lse return_attn_probs",
    "softmax and sums are in float32 (float64 for float64): cast query, key and value": (
        "precision preferred_element_type logits_dtype softmax_dtype force_fp32_for_softmax dtype"
    ),
    "grouped heads follow from the shapes: key and value may have fewer heads than query": (
        "enable_gqa gqa num_heads num_kv_heads num_query_heads num_key_value_groups"
    ),
    "take implementation": "backend impl kernel",
    "take config; the pattern has its own blocks": "block_q block_k block_kv block_sizes block_size",
    "take sinks, one logit for each query head": "sink attention_sinks softmax_aux s_aux",
    "take query_spec": "mesh sharding partition_spec out_sharding qkv_spec",
    "take head_axis": "axis_name tensor_axis tp_axis",
    "decode with s2jax.KVCache, which has extend": "decode kv_cache past_key_values cache_index",
    "rotate query and key beforehand": "positions position_ids input_positions rope_theta rope",
    "take qk_norm": "normalize_qk qk_layernorm",
    "take head_dim, the features of one head": "qkv_features",
    "the layer attends by its pattern; attention_fn(pattern) is for Flax's own layers": "attention_fn",
    "the attention weights are never in memory as a whole": "sow_weights",
}
"""Arguments that other libraries' attention has, by what to use instead; "take" names an argument of ours."""

INSTEAD = {name: advice for advice, names in ADVICE.items() for name in names.split()}


def explains_unknown_arguments[**P, R](function: Callable[P, R], *, also: tuple[str, ...] = ()) -> Callable[P, R]:
    """The function, which raises TypeError with advice where it is given a keyword argument that it does not take.

    Args:
      also: names that it takes among its `**options`.
    """
    kinds = inspect.signature(function).parameters.values()
    known = [*(each.name for each in kinds if each.kind is not inspect.Parameter.VAR_KEYWORD), *also]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise TypeError(unknown_argument(function.__qualname__, name, known))
        return function(*args, **kwargs)

    return checked


def unknown_argument(function: str, name: str, known: typing.Iterable[str]) -> str:
    """The message for an argument that a function does not take."""
    known = [each for each in known if each not in ("self", "cls")]
    advice = INSTEAD.get(name)
    words = advice.split() if advice else []
    if words[:1] == ["take"] and words[1].strip(",") not in known:
        advice = None  # it does not have that one either
    if advice is None:
        near = difflib.get_close_matches(name, known, 1, 0.6)
        advice = f"do you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
    function = function.rpartition("<locals>.")[2].removesuffix(".__init__").removesuffix(".__call__")
    return f"{function} takes no {name}: {advice}"
