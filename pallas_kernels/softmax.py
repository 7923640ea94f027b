"""Log-sum-exp arithmetic: merging attention over disjoint sets of keys, and attention sinks.

A sink is one learned logit for every head, which takes a share of the softmax and brings no value.
"""

import functools
import math
import operator
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOG2E = math.log2(math.e)
"""exp(x) is exp2(LOG2E · x)."""


class PartialAttention(typing.NamedTuple):
    """Attention over some of the keys, to be merged with that over others; FlashAttention's state of a row.

    Attributes:
      acc: sums of values, weighed with exp(logit - m).
      m: the largest logit, or any number near it; -inf where nothing is read.
      l: sums of the weights.
    """

    acc: Float[Array, "*rows e"]
    m: Float[Array, "*rows"]
    l: Float[Array, "*rows"]

    @classmethod
    def of_result(cls, out: Float[Array, "*rows e"], lse: Float[Array, "*rows"]) -> "PartialAttention":
        """The state from a result and its log-sum-exp."""
        return cls(out.astype(lse.dtype), lse, jnp.where(jnp.isneginf(lse), 0, jnp.ones_like(lse)))

    def with_sinks(self, sinks: Float[Array, "*heads"]) -> "PartialAttention":
        """The state with one more logit of no value; `sinks` broadcasts to the rows."""
        logit = jnp.broadcast_to(sinks.astype(self.m.dtype), self.m.shape)
        return merge([self, PartialAttention(jnp.zeros_like(self.acc), logit, jnp.ones_like(logit))])

    def finish(self, dtype) -> tuple[Float[Array, "*rows e"], Float[Array, "*rows"]]:
        """The result in a dtype, zero where nothing is read, and its log-sum-exp, -inf there."""
        reads = self.l != 0  # a NaN that is read shows
        l = jnp.where(reads, self.l, 1)
        out = jnp.where(reads[..., None], self.acc / l[..., None], 0)
        return out.astype(dtype), jnp.where(reads, self.m + jnp.log(l), -jnp.inf)


def merge(parts: Sequence[PartialAttention]) -> PartialAttention:
    """Attention over the keys of all parts, which share none. Differentiable."""
    m = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [part.m for part in parts]))
    finite = jnp.where(jnp.isneginf(m), 0, m)  # -inf - -inf is NaN
    weights = [jnp.exp(part.m - finite) for part in parts]
    acc = [part.acc * weight[..., None] for part, weight in zip(parts, weights, strict=True)]
    l = [part.l * weight for part, weight in zip(parts, weights, strict=True)]
    return PartialAttention(functools.reduce(operator.add, acc), m, functools.reduce(operator.add, l))


# Called outside of any `jit`, it would be compiled in pieces, some of them infinite.
@jax.jit
def combine(outs: list[Float[Array, "b t h e"]], lses: list[Float[Array, "b h t"]]) -> tuple[Array, Array]:
    """Merges results over disjoint sets of keys: out [b, t, h, e] in the dtype of the first, lse [b, h, t]."""
    parts = [PartialAttention.of_result(out, lse.swapaxes(1, 2)) for out, lse in zip(outs, lses, strict=True)]
    out, lse = merge(parts).finish(outs[0].dtype)
    return out, lse.swapaxes(1, 2)


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
