"""The next token out of logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose a token.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token always.
        top_k: only so many of the likeliest tokens; None for all.
        top_p: only as many of the likeliest tokens as have this share of the probability together, at least one; 1 for
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
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def __call__(self, logits: Float[Array, "b v"], key: Array) -> Int32[Array, " b"]:
        if self.temperature == 0:
            return logits.argmax(-1).astype(jnp.int32)
        return jax.random.categorical(key, self.allowed(logits / self.temperature)).astype(jnp.int32)

    def allowed(self, logits: Float[Array, "b v"]) -> Float[Array, "b v"]:
        """The logits, -inf where a token may not come."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        if self.top_p < 1:
            order = jnp.argsort(-logits, -1)
            shares = jax.nn.softmax(jnp.take_along_axis(logits, order, -1))
            # What the likelier ones have together, without it, is still too little.
            taken = jnp.cumsum(shares, -1) - shares < self.top_p
            taken = jnp.take_along_axis(taken, jnp.argsort(order, -1), -1)
            logits = jnp.where(taken, logits, -jnp.inf)
        return logits
