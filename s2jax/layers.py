"""Common parts of the NNX and Linen layers: head counts, checks of arguments, heads split by a caller."""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import BlockSelection
from pallas_kernels.checks import as_dtype, check_flag, check_number
from pallas_kernels.head_place import HeadAxis, axis_names, possible_head_axes
from pallas_kernels.sharding import Axes
from s2jax.cache import KVCache
from s2jax.cache.sharding import head_shards
from s2jax.compiler import refuse_unsaid_heads
from s2jax.messages import shown
from s2jax.patterns import Pattern, PatternLike, as_pattern
from s2jax.rotary import LARGEST_FLOAT

LARGEST_WIDTH = 2**31 - 1
"""JAX counts the features of a layer in int32."""


@dataclasses.dataclass(frozen=True)
class LayerHeads:
    """Head counts of a layer, and the axes that a caller splits its heads over.

    Attributes:
      query, kv, features: counts of all query and KV heads, and features of a head.
      axis: names of axes; () where the layer always has all heads; None if nobody said it.
    """

    query: int
    kv: int
    features: int
    axis: HeadAxis

    def split_over(self, query: Float[Array, "b t h d"], pattern: typing.Any, parameters: typing.Any) -> Axes:
        """The axes over which the heads of a projected query are split; () if it has all of them.

        Args:
          parameters: pytree of the query projection's, whose arrays show whether shards have projections of their own.

        Raises:
          ValueError: the query has other heads than the layer or a shard of it; or a shard's may be taken for all.
        """
        axes = None if self.axis is None else axis_names(self.axis)
        shards, here = head_shards(axes), query.shape[2]
        if axes and shards > 1 and here * shards == self.query:
            return axes
        if here != self.query:
            where = f" in {shards} shards of {axes}" if shards > 1 else ""
            raise ValueError(
                f"the layer has {self.query} query heads{where}, and its projection gives {here}: where a shard_map "
                "splits the projections by heads, num_heads counts all heads, and head_axis names the axis"
            )
        if axes is None and not isinstance(pattern, BlockSelection):
            possible = possible_head_axes(*jax.tree.leaves(parameters))
            refuse_unsaid_heads(as_pattern(pattern), possible, self.query, self.kv, query.shape[1], query.shape[1])
        return ()

    def here(self) -> tuple[int, int]:
        """Counts of query and KV heads that a layer declares where it runs: a shard's inside the region that splits."""
        axes = axis_names(self.axis)
        shards = head_shards(axes)
        if self.kv % shards:
            raise ValueError(f"{self.kv} KV heads cannot be split over the {shards} shards of {axes}")
        return self.query // shards, self.kv // shards


def sum_over(axes: Axes, out: Array, bias: typing.Callable[[], Array] | None) -> Array:
    """The output of all heads, from a shard's part of it.

    Args:
      bias: gives what every shard added, which counts once; None if there is nothing.
    """
    if not axes:
        return out
    if bias is None:
        return jax.lax.psum(out, axes)
    shards = math.prod(map(jax.lax.axis_size, axes))
    return jax.lax.psum(out - bias() * (1 - 1 / shards), axes)


def output_sharding(heads: Float[Array, "b t h d"]) -> PartitionSpec | None:
    """The sharding of the output of all heads over Explicit axes; None where it follows from the operands.

    Heads that are split in the array and in the weights are summed over: the output is split as the tokens are.
    """
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return None
    batch, length, split_heads, _ = jax.typeof(heads).sharding.spec
    return None if split_heads is None else PartitionSpec(batch, length)


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
