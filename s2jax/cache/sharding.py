"""The KV cache over a mesh: every device keeps and attends to its own sequences and KV heads, without communication."""

import dataclasses
import enum
import functools
import math
import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from pallas_kernels.caching import bounded_jit
from pallas_kernels.head_place import HeadAxis, head_axes, is_bound, shard_index
from pallas_kernels.sharding import Axes, Sharding, find_sharding, on_shards, varying_like
from s2jax.cache.layout import CacheLayout
from s2jax.cache.step import Tables


class ShardHeads(typing.NamedTuple):
    """Counts of the heads that a cache has here, and the `head_axis` that says so to `s2jax.attention`."""

    query: int
    kv: int
    axis: tuple[str, ...] | None


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
    return axes, sharding, region * _shards_of(sharding)


def head_shards(axes: Axes | None) -> int:
    """The number of shards of an enclosing region that heads are split over: 1 outside of it.

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
class DeferredTables:
    """The tables of the heads that a cache has here, made where they are compiled in; an argument of `on_each_shard`.

    As arguments of the compiled function they would be transferred from the host at every call.

    Attributes:
      fork_blocks: see `BufferLayout`.
      axes: axes of a caller's region that heads are split over.
    """

    layout: CacheLayout
    fork_blocks: int | None
    axes: Axes | None

    def make(self, sharding: Sharding | None) -> Tables:
        shards = head_shards(self.axes)
        tables = Tables.of(self.layout, self.fork_blocks, shards * _shards_of(sharding))
        if shards == 1 or self.axes is None:
            return tables
        index = shard_index(self.axes)

        def rows(array):
            count = len(array) // shards
            return jax.lax.dynamic_slice_in_dim(jnp.asarray(array), index * count, count)

        return jax.tree.map(rows, tables)


def vary_by_heads[T](arrays: T, axes: Axes | None) -> T:
    """The arrays, varying over a region's axes as they will once tokens have come, so that a loop can carry them."""
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
    shards = region * _shards_of(sharding)
    if layout.shards % shards:
        made = "heads that are not split" if layout.shards == 1 else f"heads in {layout.shards} shards"
        raise ValueError(
            f"the heads are split over {shards} shards here, and the cache was created for {made}: create it under "
            "this mesh with the queries' query_spec, such as P('data', None, 'tensor', None)"
        )
    return sharding


def _shards_of(sharding: Sharding | None) -> int:
    """The number of devices that heads are split over."""
    return 1 if sharding is None else sharding.head_shards


class Role(enum.Enum):
    """The axes of an array that a mesh splits."""

    CACHE = "[b, k, ...] or [b]"
    HEADS = "[k, ...]"
    TOKENS = "[b, t, h, d]"
    LSE = "[b, h, t]"

    def specs(self, sharding: Sharding, tree: typing.Any) -> typing.Any:
        """The PartitionSpecs of a pytree's arrays."""
        spec_of = {
            Role.CACHE: lambda array: sharding.of(0, 1 if array.ndim > 1 else None, array.ndim),
            Role.HEADS: lambda array: sharding.of(heads=0, ndim=array.ndim),
            Role.TOKENS: lambda _: sharding.of(0, 2),
            Role.LSE: lambda _: sharding.of(0, 1, 3),
        }
        return jax.tree.map(spec_of[self], tree)


Roles = Sequence[tuple[Role, typing.Any]]
"""Pytrees, each with the role of its arrays."""


def on_each_shard(
    function: Callable, layout: CacheLayout, sharding: Sharding | None, arguments: Roles, results: Roles, **static
) -> typing.Any:
    """Returns `function(*arguments, **static)`, a tuple, compiled; on every shard, if there are any.

    Args:
      function: takes the arguments' pytrees, with tables made, and returns the results' pytrees.
      layout: of the cache; the programs of some layouts are kept.
      sharding: over a mesh; None if nothing is split.
      arguments: pytrees or `DeferredTables`, and their roles.
      results: pytrees of the results' structure, and their roles.
      static: hashable arguments.
    """
    out_specs = tuple(role.specs(sharding, tree) for role, tree in results) if sharding else ()
    roles, trees = zip(*arguments, strict=True)
    return _compiled(function, layout, tuple(static.items()), sharding, roles, out_specs, *trees)


# Called outside of any `jit`, it would be compiled in pieces, and JAX's strict modes would see every piece: constants
# that go to the device, logits of -inf.
@bounded_jit(6)
def _compiled(function, layout, static: tuple, sharding: Sharding | None, roles: tuple[Role, ...], out_specs, *trees):
    del layout  # part of the key: the programs of one layout are dropped together
    made = [each.make(sharding) if isinstance(each, DeferredTables) else each for each in trees]
    in_specs = tuple(role.specs(sharding, each) for role, each in zip(roles, made, strict=True)) if sharding else ()
    return on_shards(functools.partial(function, **dict(static)), sharding, in_specs, out_specs, *made)
