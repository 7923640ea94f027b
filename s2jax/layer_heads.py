"""The heads of a layer where a caller's `shard_map` splits its projections, and the cache that belongs to it."""

import dataclasses
import math
import typing

import jax
from jaxtyping import Array, Float

from pallas_kernels import BlockSelection
from pallas_kernels.head_place import HeadAxis, axis_names, possible_head_axes
from pallas_kernels.sharding import Axes
from s2jax.cache_sharding import head_shards
from s2jax.compiler import refuse_unsaid_heads
from s2jax.patterns import as_pattern


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
