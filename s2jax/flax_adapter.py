"""`attention_fn` for the multi-head attention layers of Flax, NNX and Linen alike."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels.head_place import HeadAxis
from pallas_kernels.unknown_arguments import explains_unknown_arguments
from s2jax.functional import attention
from s2jax.layers import as_layer_pattern


@explains_unknown_arguments
def attention_fn(
    pattern: Any,
    *,
    logits_soft_cap: float | None = None,
    query_spec: PartitionSpec | None = None,
    head_axis: HeadAxis = None,
    implementation: str | tuple[str, ...] | None = None,
) -> Callable[..., Array]:
    """Makes an `attention_fn` in which each head reads the keys that a pattern gives it.

        nnx.MultiHeadAttention(num_heads=8, in_features=512, attention_fn=s2jax.nnx.attention_fn(pattern), ...)
        nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=s2jax.linen.attention_fn(pattern))

    The pattern takes the place of the mask, causality included. Some arguments of the two layers raise ValueError,
    because they cannot be honoured: a mask (decoding with Flax's own cache makes one), a bias, active dropout, sown
    attention weights, a matmul precision, replaced einsums, `input_positions`, and `is_causal=True` with a pattern
    that is not causal. Softmax is always in float32.

    Args:
        pattern: see `s2jax.attention`.
        logits_soft_cap: see `s2jax.attention`.
        query_spec: `PartitionSpec` of the queries [b, t, h, d] on a mesh with Auto axes.
        head_axis: axis of a caller's `shard_map` over which heads are split, see `s2jax.attention`.
        implementation: backend or backends to use.

    Returns:
        A function of query [..., t, h, d], key [..., s, k, d] and value [..., s, k, e], with any leading batch
        axes or none, to [..., t, h, e].
    """
    pattern = as_layer_pattern(pattern)

    @explains_unknown_arguments  # which keeps the signature that Linen inspects
    # Linen inspects this signature and passes only what it names: a `**kwargs` would lose the mask silently.
    def sparsely_sharded_attention(
        query: Float[Array, "*batch t h d"],
        key: Float[Array, "*batch s k d"],
        value: Float[Array, "*batch s k e"],
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        input_positions: Array | None = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Callable[..., Array] | None = None,
        qk_attn_weights_einsum: Callable[..., Array] | None = None,
        attn_weights_value_einsum: Callable[..., Array] | None = None,
    ) -> Float[Array, "*batch t h e"]:
        del broadcast_dropout, dropout_rng  # dropout itself is refused
        del force_fp32_for_softmax  # always so
        _raise_if(mask is not None, "a mask", "the pattern decides what is read (Flax's decode=True makes a mask, too)")
        _raise_if(bias is not None, "a bias", "leave it out")
        _raise_if(
            dropout_rate > 0.0 and not deterministic,
            f"dropout_rate={dropout_rate} with deterministic=False",
            "set dropout_rate=0.0, and use dropout elsewhere in the model",
        )
        _raise_if(module is not None, "sow_weights=True", "the attention weights are never in memory as a whole")
        _raise_if(
            precision not in (None, "default", jax.lax.Precision.DEFAULT),
            f"precision={precision}",
            "products accumulate in float32; leave precision at None",
        )
        _raise_if(
            input_positions is not None, "input_positions", "use S2Attention(rope_theta=...) for rotary positions"
        )
        _raise_if(
            is_causal and not pattern.causal,
            f"is_causal=True beside the bidirectional {pattern}",
            "make the pattern causal",
        )
        for name, einsum in (
            ("einsum_dot_general", einsum_dot_general),
            ("qk_attn_weights_einsum", qk_attn_weights_einsum),
            ("attn_weights_value_einsum", attn_weights_value_einsum),
        ):
            _raise_if(einsum is not None, name, "the kernel has products of its own")

        if dtype is None:
            dtype = jnp.result_type(query, key, value)
        batch = query.shape[:-3]
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.ndim < 3 or x.shape[:-3] != batch:
                raise ValueError(
                    f"query, key and value must be [..., length, heads, head_dim] with equal leading axes; "
                    f"query has shape {list(query.shape)}, {name} {list(x.shape)}"
                )
        query, key, value = (x.astype(dtype).reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
        out = attention(
            query,
            key,
            value,
            pattern,
            logits_soft_cap=logits_soft_cap,
            query_spec=query_spec,
            head_axis=head_axis,
            implementation=implementation,
        )
        return out.reshape(*batch, *out.shape[1:])

    return sparsely_sharded_attention


def _raise_if(given: bool, what: str, instead: str) -> None:
    if given:
        raise ValueError(f"sparsely-sharded attention cannot honour {what}: {instead}")
