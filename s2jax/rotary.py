"""Rotary positions and RMS normalisation of the heads of queries and keys."""

import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.checks import check_number
from pallas_kernels.problem import accumulation_dtype
from s2jax.messages import shown

LARGEST_FLOAT = float(np.finfo(np.float32).max)
"""A larger number would be infinite in the layers' float32."""


class RopeScaling(typing.NamedTuple):
    """Scaling of the rotary frequencies as in Llama 3.1 and later: low frequencies are divided for longer contexts.

    A pair of features that turns at least `high_freq_factor` times within `original_length` tokens keeps its frequency;
    one that turns at most `low_freq_factor` times has it divided by `factor`; in between it is interpolated linearly.

    Source: The Llama 3 Herd of Models, arXiv 2407.21783, and the checkpoints' config.json.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    @classmethod
    def of(cls, given) -> "RopeScaling":
        """Builds the scaling from four numbers; raises ValueError unless they make one."""
        if not isinstance(given, tuple | list) or len(given) != len(cls._fields):
            raise ValueError(f"rope_scaling must be a RopeScaling or its four numbers, got {shown(given)}")
        pairs = zip(cls._fields, given, strict=True)
        scaling = cls._make(check_number(f"rope_scaling's {name}", value, most=LARGEST_FLOAT) for name, value in pairs)
        scaling.check()
        return scaling

    def check(self) -> None:
        """Raises ValueError unless the numbers make such a scaling."""
        ordered = 0 < self.low_freq_factor < self.high_freq_factor < math.inf
        if not (ordered and 1 <= self.factor < math.inf and self.original_length >= 1):
            raise ValueError(
                "a RopeScaling needs a factor of at least 1, 0 < low_freq_factor < high_freq_factor and an "
                f"original_length of at least 1, got {self}"
            )

    def scaled(self, frequencies: Float[Array, " pairs"]) -> Float[Array, " pairs"]:
        """Scales frequencies, in radians per token."""
        turns = frequencies * (self.original_length / (2 * math.pi))
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clip(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rms_norm(x: Float[Array, "... d"], gain: Float[Array, "d"], epsilon: float = 1e-6) -> Float[Array, "... d"]:
    """Divides the last axis by its root mean square and multiplies it by `gain`.

    Computed in float32 (float64 for float64 input); the result has the dtype of `x`.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    normalized = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    gain = gain.astype(wide.dtype).reshape((1,) * (x.ndim - 1) + gain.shape)
    return (normalized * gain).astype(x.dtype)


def apply_rope(
    x: Float[Array, "b t h d"],
    positions: Int[Array, "b t"] | Int[Array, "t"],
    theta: float,
    scaling: RopeScaling | None = None,
) -> Float[Array, "b t h d"]:
    """Rotates each head by its token's position, so that a query-key product depends on their distance only.

    The convention is "rotate half", that of Llama weights in the Hugging Face format. Feature `i` of the first half and
    feature `i` of the second half form a pair, turned by `position * theta ** (-2 * i / d)` radians. Meta's original
    Llama files pair neighbouring features instead and need their rows permuted.

    Args:
        x: queries or keys, `d` even.
        positions: integer positions, one row per batch entry or one row shared by all.
        theta: base of the wavelengths, commonly 1e4 to 1e6.
        scaling: scaling of the frequencies that follow from `theta`.

    Returns:
        The rotated heads in the dtype of `x`; angles are computed in float32 (float64 for float64 input).

    Raises:
        ValueError: `d` is odd, `positions` are no integers or do not fit `x`, or the scaling is invalid.

    Source: Su et al., RoFormer, arXiv 2104.09864, section 3.4.2.
    """
    batch, length, _, head_dim = x.shape
    if head_dim % 2:
        raise ValueError(f"rotary positions pair the features of a head: head_dim must be even, got {head_dim}")
    if positions.shape not in ((length,), (batch, length)):
        raise ValueError(
            f"positions must have shape [{length}] or [{batch}, {length}], like the tokens that they number; "
            f"got {list(positions.shape)}"
        )
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"positions must be integers, got {positions.dtype}; cast them to int32")
    wide = accumulation_dtype(x.dtype)
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=wide) / head_dim)
    if scaling is not None:
        frequencies = RopeScaling.of(scaling).scaled(frequencies)
    angles = positions.reshape((-1, length, 1, 1)).astype(wide) * frequencies.reshape((1, 1, 1, -1))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def normalize_and_rotate(
    heads: Float[Array, "b t h d"],
    gain: Float[Array, "d"] | None,
    positions: Int[Array, "b t"] | Int[Array, "t"] | None,
    offset: int | Int[Array, ""] | Int[Array, "b"],
    rope_theta: float | None,
    rope_scaling: RopeScaling | None,
    norm_eps: float,
) -> Float[Array, "b t h d"]:
    """Queries or keys for the attention: normalised if there is a gain, rotated if there is a theta.

    Positions default to `offset, offset + 1, ...`.

    Raises:
        ValueError: positions or a scaling are given without a theta, or positions do not fit.
    """
    if gain is not None:
        heads = rms_norm(heads, gain, float(norm_eps))
    if rope_theta is None:
        for name, given in (("positions", positions), ("rope_scaling", rope_scaling)):
            if given is not None:
                raise ValueError(f"{name} serves the rotary embedding, but the layer has rope_theta=None; give it one")
        return heads
    if positions is None:
        steps = jnp.arange(heads.shape[1], dtype=jnp.int32)
        offset = jnp.asarray(offset, jnp.int32)
        positions = offset.reshape(-1, 1) + steps.reshape(1, -1) if offset.ndim else offset + steps
    return apply_rope(heads, positions, float(rope_theta), rope_scaling)  # JAX takes no int beyond int32
