"""Sampling of the next token from logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

UNDEFINED = -1
"""Token id for logits that define no distribution; see `Sampling.__call__`."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A way to choose the next token: temperature, then top-k, then top-p.

    Tokens of equal logits rank by their ids, the lower one first. So top-k keeps exactly k tokens, top-p the shortest
    list, and `top_k=1` chooses what temperature 0 does.

    Attributes:
        temperature: divides the logits. 0 takes the token of the highest logit, `math.inf` makes all that top-k and
            top-p keep equally likely.
        top_k: number of likeliest tokens that are kept; None or the vocabulary's size keeps all.
        top_p: the likeliest tokens are kept until their probabilities sum to this share, at least one of them; 1 keeps
            all. Source: Holtzman et al., arXiv 1904.09751.

    Raises:
        ValueError: if a value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or left out to keep all tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def __call__(self, logits: Float[Array, "b v"], key: Array) -> Int32[Array, " b"]:
        """Token ids, one for each row of logits.

        A row with a NaN, or of -inf alone, defines no distribution: its token is `UNDEFINED`. Where logits are +inf,
        those tokens share all of the probability.
        """
        logits = _canonical(logits)
        if self.temperature == 0:
            token = logits.argmax(-1)
        else:
            scores, ids = self._ranked(logits)
            place = jax.random.categorical(key, scores)
            token = place if ids is None else jnp.take_along_axis(ids, place[..., None], -1)[..., 0]
        defined = ~jnp.isnan(logits).any(-1) & (logits > -jnp.inf).any(-1)
        return jnp.where(defined, token, UNDEFINED).astype(jnp.int32)

    def probabilities(self, logits: Float[Array, "b v"]) -> Float[Array, "b v"]:
        """The distribution that tokens are drawn from; NaN in rows that define none."""
        logits = _canonical(logits)
        if self.temperature == 0:
            likeliest = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=logits.dtype)
            return jnp.where(jnp.isnan(logits).any(-1, keepdims=True), jnp.nan, likeliest)
        scores, ids = self._ranked(logits)
        shares = jax.nn.softmax(scores, -1)
        if ids is None:
            return shares
        return jnp.put_along_axis(jnp.zeros_like(logits), ids, shares, -1, inplace=False)

    def _ranked(self, logits: Float[Array, "b v"]) -> tuple[Float[Array, "b n"], Int32[Array, "b n"] | None]:
        """Log probabilities up to a constant, -inf for tokens that are not kept; and their ids, None for 0, 1, ...

        The two have the likeliest token first wherever ids are given.
        """
        count, ids = logits.shape[-1], None
        if self.top_k is not None and self.top_k < count:
            logits, ids = jax.lax.top_k(logits, self.top_k)
        elif self.top_p < 1:
            logits, ids = jax.lax.top_k(logits, count)
        scores = self._tempered(logits)
        if self.top_p < 1:
            shares = jax.nn.softmax(scores, -1)
            before = jnp.cumsum(shares, -1) - shares  # of the tokens that are likelier
            kept = (before < self.top_p).at[..., 0].set(True)  # a tiny share may round to 0
            scores = jnp.where(kept, scores, -jnp.inf)
        return scores, ids

    def _tempered(self, logits: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """Logits less their maximum, over the temperature: at most 0, and never the NaN of 0/0 or inf - inf."""
        most, limits = logits.max(-1, keepdims=True), jnp.finfo(logits.dtype)
        if self.temperature > float(limits.max):
            scaled = jnp.zeros_like(logits)
        elif self.temperature > 1e30:  # the reciprocal may be subnormal, which devices take for 0
            scaled = (logits * 2.0**-64 - most * 2.0**-64) / (self.temperature * 2.0**-64)
        else:  # below the smallest normal number the temperature would count as 0
            scaled = (logits - most) / max(self.temperature, float(limits.tiny))
        beyond = jnp.isinf(most)  # inf less inf
        scaled = jnp.where(beyond, jnp.where(logits == most, 0.0, -jnp.inf), scaled)
        scaled = jnp.where(logits == -jnp.inf, -jnp.inf, scaled)
        return jnp.where(jnp.isnan(logits).any(-1, keepdims=True), jnp.nan, scaled)


def _canonical(logits: Float[Array, "b v"]) -> Float[Array, "b v"]:
    """Logits in float32 or float64, with one kind of zero: sorting puts -0 below 0."""
    logits = logits.astype(logits.dtype if logits.dtype == jnp.float64 else jnp.float32)
    return jnp.where(logits == 0, 0.0, logits)


def undefined_message(position: int) -> str:
    """The message for logits that define no distribution.

    Args:
        position: of the token that was to be chosen, from 0 on.
    """
    return (
        f"the model's logits for the token at position {position} are NaN or all -inf, so none can be chosen; its "
        "weights are broken, or its activations overflow (try --dtype float32)"
    )
