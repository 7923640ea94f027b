"""The KV cache over a mesh: every device keeps and attends to its own sequences and KV heads, and tells no other."""

import dataclasses
import functools
import math
import typing

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from pallas_kernels.head_place import HeadAxis, head_axes, is_bound, shard_index
from pallas_kernels.sharding import Axes, Sharding, find_sharding, on_shards, varying_like
from s2jax.cache.layout import CacheLayout
from s2jax.cache.step import ShardHeads, Tables


def split_to_create(
    query_spec: P | None, head_axis: HeadAxis, batch: int, num_kv_heads: int
) -> tuple[Axes | None, Sharding | None, int]:
    """The split of a new cache: axes of a caller's region, sharding, and total shards of heads.

    Raises:
      ValueError: `head_axis` names no axis of an enclosing `shard_map`, `pmap` or `vmap`, nor of the mesh that is set.
    """
    axes, region, mesh = None, 1, jax.sharding.get_abstract_mesh()
    if head_axis is not None:
        named = (head_axis,) if isinstance(head_axis, str) else head_axis
        known = isinstance(named, tuple | list) and all(name in mesh.axis_names for name in named)
        axes = tuple(named) if known else head_axes(head_axis)
        region = math.prod(mesh.shape[name] if name in mesh.shape else jax.lax.axis_size(name) for name in axes)
    if num_kv_heads % region:
        raise ValueError(
            f"{num_kv_heads} KV heads cannot be split over the {region} shards of {head_axis!r}: num_heads and "
            "num_kv_heads count all heads, those of all shards together"
        )
    here = num_kv_heads // head_shards(axes)
    sharding = None
    if query_spec is not None:
        sharding = find_sharding(ShapedArray((batch, 1, 1, 1), jnp.float32), here, query_spec)
    return axes, sharding, region * shards_of(sharding)


def head_shards(axes: Axes | None) -> int:
    """Over how many shards of an enclosing region heads are split: 1 outside of it.

    Raises:
      ValueError: the region has some of the axes, but not all.
    """
    bound = [name for name in axes or () if is_bound(name)]
    if axes and bound and len(bound) < len(axes):
        raise ValueError(f"heads are split over {axes}, and this is inside a region over {bound} alone")
    return math.prod(map(jax.lax.axis_size, bound))


def heads_of_shard(layout: CacheLayout, axes: Axes | None) -> ShardHeads:
    """The heads that a cache has here: a shard's inside the region that splits them, all of them outside."""
    shards, heads = head_shards(axes), layout.heads
    axis = axes if shards > 1 or axes is None else ()
    return ShardHeads(heads.num_heads // shards, heads.num_kv_heads // shards, axis)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class OwnTables:
    """The tables of the heads that a cache has here, not made yet; an argument of `over_shards`.

    The arrays are made where they are compiled in: brought to every call, they would be transfers from the host.

    Attributes:
      room: see `Space`.
      axes: of a caller's region that heads are split over.
    """

    layout: CacheLayout
    room: int | None
    axes: Axes | None

    def make(self, sharding: Sharding | None) -> Tables:
        shards = head_shards(self.axes)
        tables = Tables.of(self.layout, self.room, shards * shards_of(sharding))
        if shards == 1 or self.axes is None:
            return tables
        index = shard_index(self.axes)

        def rows(array):
            count = len(array) // shards
            return jax.lax.dynamic_slice_in_dim(jnp.asarray(array), index * count, count)

        return jax.tree.map(rows, tables)


def vary_by_heads[T](arrays: T, axes: Axes | None) -> T:
    """The arrays, varying over a region's axes as they will once tokens have come: so a loop can carry them."""
    if head_shards(axes) == 1 or axes is None:
        return arrays
    index = shard_index(axes)
    return jax.tree.map(lambda array: varying_like(array, index), arrays)


def sharding_of(layout: CacheLayout, query: Array, query_spec: P | None, axes: Axes | None) -> Sharding | None:
    """The sharding of a cache: as it was created, or over Explicit axes that of the queries [b, t, h, d].

    Raises:
      ValueError: see `find_sharding`; or the cache was created for other shards.
    """
    mesh = jax.sharding.get_abstract_mesh()
    auto = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is AxisType.Auto]
    if query_spec is None and any(mesh.shape[name] > 1 for name in auto):
        raise ValueError(
            f"under a mesh with Auto axes ({', '.join(auto)}) a cache must have been created with the queries' "
            "query_spec, such as P('data', None, 'tensor', None), or P() if each device has all; this one was not"
        )
    region = head_shards(axes)
    sharding = find_sharding(jax.typeof(query), layout.heads.num_kv_heads // region, query_spec)
    shards = region * shards_of(sharding)
    if layout.shards % shards:
        made = "heads that are not split" if layout.shards == 1 else f"heads in {layout.shards} shards"
        raise ValueError(
            f"the heads are split over {shards} shards here, and the cache was created for {made}: create it under "
            "this mesh with the queries' query_spec, such as P('data', None, 'tensor', None)"
        )
    return sharding


def shards_of(sharding: Sharding | None) -> int:
    """Over how many devices heads are split."""
    return 1 if sharding is None else sharding.head_shards


def over_shards(
    function: typing.Callable, sharding: Sharding | None, takes: str, gives: str, *arguments, like: tuple, **static
) -> typing.Any:
    """`function(*arguments, **static)`, compiled, on every shard or as it is where there are none.

    Args:
      takes, gives: what the arguments and the results are, by one letter each: "c" for a cache's arrays [b, k, ...] and
        [b], "k" for `OwnTables` and other arrays [k, ...], "q" for tokens [b, t, h, d], "l" for [b, h, t].
      like: pytrees as the results are.
      static: hashable.
    """
    out_specs = tuple(_specs(sharding, *each) for each in zip(gives, like, strict=True)) if sharding else ()
    return _compiled(function, tuple(static.items()), sharding, takes, out_specs, *arguments)


# Called outside of any `jit`, it would be compiled in pieces, and JAX's strict modes would see every piece: constants
# that go to the device, logits of -inf.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _compiled(function, static: tuple, sharding: Sharding | None, takes: str, out_specs, *arguments):
    made = [each.make(sharding) if isinstance(each, OwnTables) else each for each in arguments]
    in_specs = tuple(_specs(sharding, *each) for each in zip(takes, made, strict=True)) if sharding else ()
    return on_shards(functools.partial(function, **dict(static)), sharding, in_specs, out_specs, *made)


def _specs(sharding: Sharding, kind: str, tree: typing.Any) -> typing.Any:
    """The sharding of a pytree's arrays, by its letter in `over_shards`."""
    spec_of = {
        "c": lambda array: sharding.of(0, 1 if array.ndim > 1 else None, array.ndim),
        "k": lambda array: sharding.of(heads=0, ndim=array.ndim),
        "q": lambda _: sharding.of(0, 2),
        "l": lambda _: sharding.of(0, 1, 3),
    }
    return jax.tree.map(spec_of[kind], tree)
