"""Attention sinks: one learned logit for every head, which takes a share of the softmax and brings no value."""

import math

import jax.numpy as jnp
from jaxtyping import Array

LOG2E = math.log2(math.e)
"""exp(x) is exp2(LOG2E · x)."""


def add_sinks(out: Array, lse: Array, sinks: Array | None) -> tuple[Array, Array]:
    """Adds exp(sink) to every row's sum: out [b, t, h, e], lse [b, h, t], sinks [h]."""
    if sinks is None:
        return out, lse
    total = jnp.logaddexp(lse, sinks.astype(lse.dtype)[None, :, None])
    kept = jnp.exp(lse - jnp.where(jnp.isneginf(total), 0, total))
    return out * kept.swapaxes(1, 2)[..., None].astype(out.dtype), total


def sink_gradients(sinks: Array, lse: Array, delta: Array) -> Array:
    """The gradient of the sinks for every sequence, [b, h], from lse and delta [b, h, t]."""
    return (-_weights(sinks, lse) * delta).sum(2)


def sink_tangents(sinks: Array, moved: Array, lse: Array) -> Array:
    """The tangent of lse [b, h, t] by that of the sinks [h]."""
    return _weights(sinks, lse) * moved.astype(lse.dtype)[None, :, None]


def _weights(sinks: Array, lse: Array) -> Array:
    """The sinks' share of the softmax, [b, h, t]; zero where a row has none."""
    reads = ~jnp.isneginf(lse)
    logits = sinks.astype(lse.dtype)[None, :, None] - jnp.where(reads, lse, 0)
    return jnp.where(reads, jnp.exp(jnp.where(reads, logits, 0)), 0)
