"""The place of a call's heads among all heads, where the caller split them by a `shard_map`, `pmap` or `vmap`.

A schedule is compiled for all heads. A shard that has some of them takes their rows of each backend's tables.
"""

import itertools
import math
import numbers
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import core
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Int32

from pallas_kernels.sharding import Axes, Sharding

HeadAxis = str | tuple[str, ...] | None
HeadRange = tuple[int | Int32[Array, ""], int] | None
"""Number of the first head, and count of all heads."""


class HeadPlace(typing.NamedTuple):
    """Heads of one shard among all heads.

    Attributes:
      first: int32 scalar, the number of the first query head; None if the call has all heads.
      fits: False where `first` was given at run time and is no such number; None if it always is one.
    """

    first: Int32[Array, ""] | None
    fits: Bool[Array, ""] | None


UNNAMED = "_internal_pmap_axis_name"
"""JAX's own name for the axis of a `pmap` that was given none."""


def axis_names(head_axis: HeadAxis) -> Axes:
    """The names of axes that heads are split over; none for None.

    Raises:
      ValueError: one is no name, or comes twice.
    """
    axes = (head_axis,) if isinstance(head_axis, str) else () if head_axis is None else head_axis
    if not isinstance(axes, tuple | list) or not all(isinstance(name, str) for name in axes):
        raise ValueError(f"head_axis must be the name of an axis, several names or (), got {head_axis!r}")
    if len(set(axes)) < len(axes):
        raise ValueError(f"head_axis names an axis twice: {head_axis!r}")
    return tuple(axes)


def head_axes(head_axis: HeadAxis) -> Axes:
    """The names of axes that heads are split over here.

    Raises:
      ValueError: see `axis_names`; or one names no axis of an enclosing `shard_map`, `pmap` or `vmap`.
    """
    axes = axis_names(head_axis)
    for name in axes:
        if not is_bound(name):
            there = ["a pmap without axis_name" if bound == UNNAMED else repr(bound) for bound in _bound_sizes()]
            bound = ", ".join(there) or "none"
            raise ValueError(
                f"head_axis={head_axis!r} must name axes of an enclosing shard_map, pmap or vmap, and {name!r} is none "
                f"(there: {bound}); where heads are split by jit over a mesh, give query_spec instead"
            )
    return axes


def is_bound(name: str) -> bool:
    """True inside a `shard_map`, `pmap` or `vmap` over the axis of this name."""
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def all_heads(head_axis: HeadAxis, heads: HeadRange, num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """Counts of all query and KV heads, from those of this call.

    Raises:
      ValueError: both arguments are given, or one is malformed; the heads of this call are no part of so many.
    """
    if heads is None:
        shards = 1 if head_axis is None else math.prod(map(jax.lax.axis_size, head_axes(head_axis)))
        return num_heads * shards, num_kv_heads * shards
    if head_axis is not None:
        raise ValueError("head_axis and heads both say which heads these are: give one of them")
    if not isinstance(heads, tuple | list) or len(heads) != 2:
        raise ValueError(f"heads must be (first_head, num_heads), got {heads!r}")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads, got {num_heads} and {num_kv_heads}")
    first, total = heads
    group = num_heads // num_kv_heads
    if not isinstance(total, int | np.integer) or isinstance(total, bool) or total < num_heads or total % group:
        raise ValueError(
            f"heads=(first_head, num_heads) needs the count of all query heads, an integer of at least {num_heads} and "
            f"a multiple of {group}, the query heads of a KV head; got {total!r}"
        )
    if isinstance(first, numbers.Number | np.generic):
        if not isinstance(first, int | np.integer) or isinstance(first, bool):
            raise ValueError(f"the first head must be an integer, got {first!r}")
        if not 0 <= first <= total - num_heads or first % group:
            raise ValueError(
                f"{num_heads} heads of {total} begin with a head from 0 to {total - num_heads} and a multiple of "
                f"{group}, the query heads of a KV head; got heads={heads!r}"
            )
    elif jnp.shape(first) != () or not jnp.issubdtype(jnp.result_type(first), jnp.integer):
        raise ValueError(
            f"the first head must be an integer scalar, got {jnp.result_type(first)} {list(jnp.shape(first))}"
        )
    return int(total), int(total) // group


def head_place(head_axis: HeadAxis, heads: HeadRange, num_heads: int, num_kv_heads: int) -> HeadPlace:
    """The place of this call's heads among all heads; the arguments are those that `all_heads` accepts."""
    total = all_heads(head_axis, heads, num_heads, num_kv_heads)[0]
    if heads is not None:
        given, group = heads[0], num_heads // num_kv_heads
        first = jnp.asarray(given, jnp.int32)
        if isinstance(given, int | np.integer):
            return HeadPlace(None if total == num_heads else first, None)
        fits = (first >= 0) & (first <= total - num_heads) & (first % group == 0)
        return HeadPlace(jnp.where(fits, first, 0), fits)
    if total == num_heads:
        return HeadPlace(None, None)
    return HeadPlace(shard_index(head_axes(head_axis)) * num_heads, None)


def shard_index(axes: Axes) -> Int32[Array, ""]:
    """Number of this shard among those of the axes, the last one running fastest, as a PartitionSpec has them."""
    index = jnp.int32(0)
    for name in axes:
        index = index * jax.lax.axis_size(name) + jax.lax.axis_index(name).astype(jnp.int32)
    return index


def refuse_unknown_heads(axes: dict[str, int], reads_by_head: Callable[[tuple[int, ...]], bool], what: str) -> None:
    """Raises ValueError if the caller may have split heads, and then they would read otherwise.

    Args:
      axes: see `possible_head_axes`.
      reads_by_head: True if heads read differently, or would among so many times as many.
      what: the pattern or schedule, for the message.
    """
    if axes and reads_by_head(possible_shards(axes)):
        raise ValueError(unknown_heads(axes, what))


def possible_shards(axes: dict[str, int]) -> tuple[int, ...]:
    """Over how many shards heads may be split, by any of the axes."""
    subsets = (
        math.prod(chosen) for count in range(len(axes)) for chosen in itertools.combinations(axes.values(), count + 1)
    )
    return tuple(sorted(set(subsets)))


def unknown_heads(axes: dict[str, int], what: str) -> str:
    """The message that says what is to be said of heads."""
    named = [name for name in axes if name != UNNAMED]
    where = f"inside a shard_map, pmap or vmap over {', '.join(named)}"
    each = repr(named[0]) if len(axes) == 1 and named else f"the axis, such as {named[-1]!r}" if named else ""
    each = f"head_axis={each}"
    if UNNAMED in axes:
        where = f"{where} and a pmap without axis_name" if named else "inside a pmap without axis_name"
        each = f"pmap an axis_name and head_axis the same{f', or {each},' if named else ''}"
    return (
        f"{where}, these may be all heads or a part of them, and by {what} heads "
        f"read differently: give {each} if heads are split over it, heads=(first_head, num_heads) if "
        "they are split otherwise, or head_axis=() if these are all heads (as where the batch is split)"
    )


def possible_head_axes(*arrays) -> dict[str, int]:
    """Axes of enclosing `shard_map`s, `pmap`s and named `vmap`s that heads may be split over, with their sizes.

    Args:
      arrays: that would vary over such an axis if heads were split over it; none if there is nothing to be seen.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    found = {name: size for name, size in _bound_sizes().items() if size > 1}
    manual = {name for name in found if kinds.get(name) is AxisType.Manual}
    # A `shard_map` with check_vma knows what does not vary, and what does not vary is not split.
    if arrays and any(_varying(jax.lax.axis_index(name)) for name in manual):
        varying = frozenset[str]().union(*map(_varying, arrays))
        found = {name: size for name, size in found.items() if name not in manual or name in varying}
    return found


def _bound_sizes() -> dict[str, int]:
    return {name: size for name, size in core.get_axis_env().axis_sizes.items() if isinstance(name, str)}


def _varying(array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def own_rows[T](
    tables: T,
    table_specs: Callable[[T, Sharding], typing.Any],
    first_head: Int32[Array, ""],
    num_heads: int,
    total: int,
) -> T:
    """The rows of a backend's tables that belong to some heads.

    Args:
      table_specs: `table_specs(tables, sharding)` says which axis of each table is that of heads.
      first_head: number of the first query head.
      num_heads, total: query heads that there are from there on, and all that the tables are for.
    """

    def rows(array, spec):
        axis = next((axis for axis, names in enumerate(spec) if names), None)
        if axis is None:
            return array
        size = array.shape[axis]
        start = first_head * size // total
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(array), start, size * num_heads // total, axis)

    return jax.tree.map(rows, tables, table_specs(tables, Sharding((), ("heads",), (), False)))
