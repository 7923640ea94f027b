"""The KV cache over a mesh: every device keeps and attends to its own sequences and KV heads, and tells no other."""

import functools
import typing

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from pallas_kernels.sharding import Sharding, find_sharding, on_shards
from s2jax.cache_layout import CacheLayout


def sharding_to_create(query_spec: P | None, batch: int, num_kv_heads: int) -> Sharding | None:
    """How a new cache is split; not at all where nothing is said."""
    if query_spec is None:
        return None
    return find_sharding(jax.typeof(jnp.zeros((batch, 1, 1, 1))), num_kv_heads, query_spec)


def sharding_of(layout: CacheLayout, query: Array, query_spec: P | None) -> Sharding | None:
    """How a cache is split: as it was created, or else over Explicit axes as queries [b, t, h, d] are.

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
    sharding = find_sharding(jax.typeof(query), layout.heads.num_kv_heads, query_spec)
    shards = shards_of(sharding)
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
    """`function(*arguments, **static)` on every shard, or as it is where there are none.

    Args:
      takes, gives: what the arguments and the results are, by one letter each: "c" for a cache's arrays [b, k, ...] and
        [b], "k" for tables [k, ...], "q" for tokens [b, t, h, d], "l" for [b, h, t].
      like: pytrees as the results are.
      static: hashable.
    """
    if sharding is None:
        return function(*arguments, **static)
    spec_of = {
        "c": lambda array: sharding.of(0, 1 if array.ndim > 1 else None, array.ndim),
        "k": lambda array: sharding.of(heads=0, ndim=array.ndim),
        "q": lambda _: sharding.of(0, 2),
        "l": lambda _: sharding.of(0, 1, 3),
    }
    in_specs, out_specs = (
        tuple(jax.tree.map(spec_of[kind], each) for kind, each in zip(kinds, trees, strict=True))
        for kinds, trees in ((takes, arguments), (gives, like))
    )
    return _compiled(function, tuple(static.items()), sharding, in_specs, out_specs, *arguments)


# Called outside of any `jit`, a `shard_map` compiles every operation by itself.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _compiled(function, static: tuple, sharding: Sharding, in_specs, out_specs, *arguments):
    return on_shards(functools.partial(function, **dict(static)), sharding, in_specs, out_specs, *arguments)
