"""Common parts of the NNX and Linen layers: head counts, and what befalls q and k before the attention."""

import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import BlockSelection
from pallas_kernels.checks import as_dtype, check_flag, check_number
from pallas_kernels.head_place import HeadAxis, axis_names
from pallas_kernels.problem import accumulation_dtype
from s2jax.cache import KVCache
from s2jax.patterns import Pattern, PatternLike, as_pattern
from s2jax.patterns.checks import shown

LARGEST_WIDTH = 2**31 - 1
"""JAX counts the features of a layer in int32."""

LARGEST_FLOAT = float(np.finfo(np.float32).max)
"""A larger number would be infinite in the layers' float32."""


class RopeScaling(typing.NamedTuple):
    """Rotary frequencies of Llama 3.1 and later: the slow ones slower yet, so that a longer context turns no further.

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
        """The scaling that four numbers make; raises ValueError unless they make one."""
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

    def scaled(self, frequencies: Float[Array, " d/2"]) -> Float[Array, " d/2"]:
        """Scales frequencies, in radians per token."""
        turns = frequencies * (self.original_length / (2 * math.pi))
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clip(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def head_counts(
    num_heads: int, num_kv_heads: int | None, head_dim: int | None, in_features: int, rope_theta: float | None = None
) -> tuple[int, int]:
    """Fills in the defaults of a layer's heads and checks them.

    Returns:
        `(num_kv_heads, head_dim)`: by default one KV head per query head, and `in_features / num_heads`.

    Raises:
        ValueError: on a count that is no positive integer, on `num_heads` that `num_kv_heads` does not divide, on
            `in_features` that `num_heads` does not divide while `head_dim` is not given, and on rotary positions
            for an odd head_dim.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    for name, count in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("in_features", in_features)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a positive integer, got {count!r}")
        check_width(name, count)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, so that the KV heads serve groups of equal size; "
            f"got num_heads={num_heads}, num_kv_heads={num_kv_heads}"
        )
    if head_dim is None:
        if in_features % num_heads:
            raise ValueError(
                f"in_features must be a multiple of num_heads when head_dim is not given; "
                f"got in_features={in_features}, num_heads={num_heads}"
            )
        head_dim = in_features // num_heads
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 1:
        raise ValueError(f"head_dim must be a positive integer, got {head_dim!r}")
    check_width("num_heads * head_dim", num_heads * head_dim)
    if rope_theta is not None and head_dim % 2:
        raise ValueError(f"rotary positions pair the features of a head: head_dim must be even, got {head_dim}")
    return num_kv_heads, head_dim


def check_width(name: str, width: int) -> None:
    """Raises ValueError if a width is beyond int32."""
    if width > LARGEST_WIDTH:
        raise ValueError(f"{name} must be at most 2**31 - 1, got {shown(width)}")


def check_layer(
    *,
    flags: dict[str, typing.Any],
    dtypes: dict[str, typing.Any],
    head_axis: HeadAxis,
    rope_theta: float | None,
    norm_eps: float,
    out_features: int | None,
) -> None:
    """Raises ValueError where a layer's argument is none of its kind.

    Args:
        flags: that must be True or False, by name.
        dtypes: by name; None is one.
        head_axis, rope_theta, norm_eps, out_features: see `s2jax.nnx.S2Attention`.
    """
    for name, value in flags.items():
        check_flag(name, value)
    for name, value in dtypes.items():
        dtype = as_dtype(value)
        if value is not None and (dtype is None or not jnp.issubdtype(dtype, jnp.inexact)):
            raise ValueError(f"{name} must be a dtype of floats, such as jnp.bfloat16, got {value!r}")
    axis_names(head_axis)
    if rope_theta is not None:
        check_number("rope_theta", rope_theta, above=0, most=LARGEST_FLOAT)
    if check_number("norm_eps", norm_eps, most=LARGEST_FLOAT) < 0:
        raise ValueError(f"norm_eps must be at least 0, got {norm_eps!r}")
    whole = isinstance(out_features, int) and not isinstance(out_features, bool)
    if out_features is not None and (not whole or out_features < 1):
        raise ValueError(f"out_features must be a positive integer or None, got {out_features!r}")
    check_width("out_features", out_features or 1)


def rms_norm(x: Float[Array, "... d"], gain: Float[Array, "d"], epsilon: float = 1e-6) -> Float[Array, "... d"]:
    """Divides the last axis by its root mean square and multiplies it by `gain`.

    Computed in float32 (float64 for float64 input); the result has the dtype of `x`.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    normalized = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    gain = gain.astype(wide.dtype).reshape((1,) * (x.ndim - 1) + gain.shape)
    return (normalized * gain).astype(x.dtype)


def rotary(
    x: Float[Array, "b t h d"],
    positions: Int[Array, "b t"] | Int[Array, "t"],
    theta: float,
    scaling: RopeScaling | None = None,
) -> Float[Array, "b t h d"]:
    """Rotates each head by its token's position, so that a query-key product depends on their distance only.

    Convention ("rotate half", that of Llama weights in the Hugging Face format): feature `i` of the first half
    and feature `i` of the second half form a pair, turned by `position * theta ** (-2 * i / d)` radians.
    Meta's original Llama files pair neighbouring features instead and need their rows permuted.

    Args:
        x: queries or keys, `d` even.
        positions: integer positions, one row per batch entry or one row shared by all.
        theta: base of the wavelengths, commonly 1e4 to 1e6.
        scaling: of the frequencies that follow from `theta`.

    Returns:
        The rotated heads in the dtype of `x`; angles are computed in float32 (float64 for float64 input).

    Raises:
        ValueError: if `d` is odd, if `positions` are no integers or do not fit `x`, or the scaling is none.

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


def place(
    heads: Float[Array, "b t h d"],
    gain: Float[Array, "d"] | None,
    positions: Int[Array, "b t"] | Int[Array, "t"] | None,
    offset: int | Int[Array, ""] | Int[Array, "b"],
    rope_theta: float | None,
    rope_scaling: RopeScaling | None,
    norm_eps: float,
) -> Float[Array, "b t h d"]:
    """Queries or keys as the attention takes them: normalised if there is a gain, rotated if there is a theta.

    Positions default to `offset, offset + 1, ...`.

    Raises:
        ValueError: if positions or a scaling are given that nothing would use, or positions that do not fit.
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
    return rotary(heads, positions, float(rope_theta), rope_scaling)  # JAX takes no int beyond int32


def as_layer_pattern(given: PatternLike | BlockSelection) -> Pattern | BlockSelection:
    """The pattern of a layer: what `s2jax.as_pattern` makes of it, or a selection as it is.

    Raises:
        ValueError: it makes no pattern.
    """
    return given if isinstance(given, BlockSelection) else as_pattern(given)


def next_positions(
    cache: KVCache, pattern: typing.Any, length: int, rope_theta: float | None, *, begin: bool
) -> Int[Array, "b t"] | None:
    """Rotary positions of tokens that come to a cache, which either begin its sequences or go on with them.

    Raises:
        ValueError: the cache was made for another pattern.
    """
    if cache.layout.pattern != pattern:
        raise ValueError(
            f"the cache was made for {cache.layout.pattern!r}, the layer reads by {pattern!r}: make it with the "
            "layer's create_cache"
        )
    if rope_theta is None:
        return None
    start = jnp.zeros_like(cache.lengths) if begin else cache.lengths
    return start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]


def refuse_key_arguments(kv_positions, kv_segment_ids, query_offset) -> None:
    """Raises ValueError if an argument that means something only beside `kv` comes in self attention."""
    for name, given, own in (
        ("kv_positions", kv_positions, "positions"),
        ("kv_segment_ids", kv_segment_ids, "segment_ids"),
    ):
        if given is not None:
            raise ValueError(f"{name} belong to kv, which is None: in self attention {own} serve the keys too")
    if not (isinstance(query_offset, int) and query_offset == 0):
        raise ValueError(
            f"query_offset places x among the tokens of kv, which is None, and is 0 in self attention; got "
            f"{query_offset!r}. Pass kv (the whole context); if only rotary positions start later, pass positions"
        )
