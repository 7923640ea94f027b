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
from s2jax.compiler import check_heads_known
from s2jax.messages import shown
from s2jax.patterns import Pattern, PatternLike, as_pattern
from s2jax.rotary import LARGEST_FLOAT

LARGEST_WIDTH = 2**31 - 1
"""JAX counts the features of a layer in int32."""


@dataclasses.dataclass(frozen=True)
class LayerHeads:
    """Head counts of a layer, and the axes that a caller splits its heads over.

    Attributes:
      query, kv: counts of all query and KV heads.
      features: features of a head.
      axis: names of axes; () if the layer always has all heads; None if the caller did not say.
    """

    query: int
    kv: int
    features: int
    axis: HeadAxis

    def split_over(self, query: Float[Array, "b t h d"], pattern: typing.Any, parameters: typing.Any) -> Axes:
        """The axes over which the heads of a projected query are split; () if it has all of them.

        Args:
          query: the projected query.
          pattern: the pattern or selection that is read.
          parameters: parameters of the query projection; arrays that vary over an axis show that heads may be split.

        Raises:
          ValueError: the query has neither the heads of the layer nor those of a shard; or the caller may have split
            them without saying so.
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
            check_heads_known(as_pattern(pattern), possible, self.query, self.kv, query.shape[1], query.shape[1])
        return ()

    def here(self) -> tuple[int, int]:
        """Counts of query and KV heads where the layer runs: those of a shard inside the region that splits them."""
        axes = axis_names(self.axis)
        shards = head_shards(axes)
        if self.kv % shards:
            raise ValueError(f"{self.kv} KV heads cannot be split over the {shards} shards of {axes}")
        return self.query // shards, self.kv // shards


def sum_over(axes: Axes, out: Array, bias: typing.Callable[[], Array] | None) -> Array:
    """The output of all heads, summed over their shards.

    Args:
      axes: axes over which heads are split.
      out: the output of a shard's heads.
      bias: returns the bias that every shard added, which counts once; None if there is none.
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
        ValueError: a count is no positive integer, `num_heads` is no multiple of `num_kv_heads`, `in_features` is no
            multiple of `num_heads` while `head_dim` is not given, or `head_dim` is odd under rotary positions.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    for name, count in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("in_features", in_features)):
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
    check_width("head_dim", head_dim)
    check_width("num_heads * head_dim", num_heads * head_dim)
    if rope_theta is not None and head_dim % 2:
        raise ValueError(f"rotary positions pair the features of a head: head_dim must be even, got {head_dim}")
    return num_kv_heads, head_dim


def check_width(name: str, width: int, expected: str = "a positive integer") -> None:
    """Raises ValueError unless the width is a positive int32."""
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"{name} must be {expected}, got {width!r}")
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
    """Raises ValueError if an argument of a layer has the wrong type or an impossible value.

    Args:
        flags: arguments that must be True or False, by name.
        dtypes: arguments that must be dtypes of floats or None, by name.
        head_axis: see `s2jax.nnx.S2Attention`, as for the others.
        rope_theta: a positive number or None.
        norm_eps: a number of at least 0.
        out_features: a positive integer or None.
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
    if out_features is not None:
        check_width("out_features", out_features, "a positive integer or None")


def as_layer_pattern(given: PatternLike | BlockSelection) -> Pattern | BlockSelection:
    """The pattern of a layer, by `s2jax.as_pattern`; a selection is returned unchanged.

    Raises:
        ValueError: the argument is neither a pattern nor anything that makes one.
    """
    return given if isinstance(given, BlockSelection) else as_pattern(given)


def cache_positions(
    cache: KVCache, pattern: typing.Any, length: int, rope_theta: float | None, *, begin: bool
) -> Int[Array, "b t"] | None:
    """Rotary positions of tokens that begin the sequences of a cache, or continue them.

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


def check_self_attention(kv_positions, kv_segment_ids, query_offset) -> None:
    """Raises ValueError if self attention is given an argument that only cross attention has."""
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
