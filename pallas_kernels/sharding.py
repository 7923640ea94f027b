"""Backends on the shards of a mesh: each computes its own batch elements and heads, without communication.

XLA's partitioner refuses an opaque kernel inside `jit`, or gathers its inputs. A `shard_map` around the forward pass,
and one around the backward pass, splits the arrays instead.
"""

import dataclasses
import functools
import math
import typing

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from pallas_kernels.deferred import Mapped, Signature
from pallas_kernels.problem import Operands
from pallas_kernels.selection import BlockSelection

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The split of batch elements and heads over a mesh.

    Attributes:
      batch, heads: mesh axes over which batch elements and heads are split.
      every: all axes that a `shard_map` has to take; none where there is nothing to split.
      explicit: True if these axes are Explicit.
    """

    batch: Axes
    heads: Axes
    every: Axes
    explicit: bool

    @property
    def head_shards(self) -> int:
        """The number of shards that the heads are split into, on the mesh that is set."""
        return _product(self.heads, dict(jax.sharding.get_abstract_mesh().shape))

    def of(self, batch: int | None = None, heads: int | None = None, ndim: int = 4) -> P:
        """The spec of an array with `ndim` axes, of which `batch` and `heads` are those of the batch and of heads."""
        axes: list[Axes | None] = [None] * ndim
        if batch is not None:
            axes[batch] = self.batch or None
        if heads is not None:
            axes[heads] = self.heads or None
        return P(*axes)

    def of_tokens(self) -> P:
        """The spec of [batch, length, heads, features]."""
        return self.of(0, 2)

    def of_rows(self) -> P:
        """The spec of [batch, heads, length]."""
        return self.of(0, 1, 3)

    def of_heads(self) -> P:
        """The spec of [batch, heads]."""
        return self.of(0, 1, 2)


UNSHARDED = Sharding((), (), (), False)


def over_shards(function, sharding: Sharding, signature: Signature, leaves: tuple, in_specs, out_specs, tables):
    """`function(tables, *arguments)` on every shard, or as it is without shards; over all mapped axes.

    Args:
      signature: how the flat arrays `leaves` are the arguments.
      in_specs: a pytree of the arguments' specs.
      out_specs: a tuple of the results' specs.
      tables: a pytree, and its specs.
    """
    arrays, table_specs = tables

    def on_one(tables, *leaves):
        if any(mapped.mesh_axes for mapped in signature.maps):
            leaves = equally_varying(leaves)
        return signature.mapped(functools.partial(function, tables))(*leaves)

    mapped_specs = [
        _mapped_spec(spec, signature.maps, place)
        for place, spec in enumerate(jax.tree.leaves(in_specs, is_leaf=lambda each: isinstance(each, P)))
    ]
    before = [mapped.mesh_axes or None for mapped in reversed(signature.maps)]
    results = tuple(P(*before, *spec) for spec in out_specs)
    return on_shards(on_one, sharding, (table_specs, *mapped_specs), results, arrays, *leaves)


def _mapped_spec(spec: P, maps: tuple[Mapped, ...], place: int) -> P:
    axes = list(spec)
    for mapped in maps:
        axis = mapped.axes[place]
        if axis is not None:
            axes.insert(axis, mapped.mesh_axes or None)
    return P(*axes)


def on_shards(function, sharding: Sharding | None, in_specs: tuple, out_specs, *arguments):
    """`function(*arguments)` on every shard, or as it is without shards."""
    if sharding is None or not sharding.every:
        return function(*arguments)
    if sharding.explicit:
        arguments = jax.tree.map(jax.sharding.reshard, arguments, in_specs)
    mapped = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(sharding.every))
    return mapped(*arguments)


def operand_specs(sharding: Sharding, operands: Operands) -> typing.Any:
    """The specs of operands without tables, as `Operands`."""
    tokens, schedule = sharding.of_tokens(), operands.schedule
    each = {
        "query": tokens,
        "key": tokens,
        "value": tokens,
        "sinks": sharding.of(heads=0, ndim=1),
        "query_segment_ids": sharding.of(0, ndim=2),
        "kv_segment_ids": sharding.of(0, ndim=2),
        "query_offset": sharding.of(0, ndim=1),
        "first_head": P(),
    }
    specs: dict[str, typing.Any] = {
        name: None if getattr(operands, name) is None else spec for name, spec in each.items()
    }
    if isinstance(schedule, BlockSelection):
        batch, heads = (None if size == 1 else axis for axis, size in enumerate(schedule.counts.shape[:2]))
        of_blocks: typing.Any = sharding.of(batch, heads)
        of_counts: typing.Any = sharding.of(batch, heads, 3)
        schedule = dataclasses.replace(schedule, kv_blocks=of_blocks, counts=of_counts)
    return Operands(**specs, schedule=schedule)


def find_sharding(query, kv_heads: int, query_spec: P | None) -> Sharding | None:
    """The split of the query over the mesh that is set; None without a mesh, or on one device.

    Args:
      query: its type, as from `jax.typeof`.

    Raises:
      ValueError: the sharding cannot be known, or is one that cannot be computed without communication.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if query_spec is not None and not isinstance(query_spec, P):
        raise ValueError(f"query_spec must be a PartitionSpec, got {type(query_spec).__name__}")
    if mesh.empty:
        if any(kind is AxisType.Explicit for kind in query.sharding.mesh.axis_types):
            raise ValueError("the query is sharded over a mesh with Explicit axes; set it with jax.set_mesh(mesh)")
        if query_spec is not None and any(query_spec):
            raise ValueError(f"query_spec {query_spec} needs a mesh; set it with jax.set_mesh(mesh)")
        return None
    sizes = dict(mesh.shape)
    free = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is not AxisType.Manual]
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # An Explicit axis of one device is part of the arrays' types, too.
    if all(sizes[name] == 1 and kinds[name] is not AxisType.Explicit for name in free):
        return None
    spec = query.sharding.spec if query_spec is None else query_spec
    unknown = [name for name in free if kinds[name] is AxisType.Auto and sizes[name] > 1]
    if query_spec is None and unknown:
        raise ValueError(
            f"the mesh has the Auto axes {', '.join(unknown)}, and how the query is split over them cannot be known "
            "while tracing; pass query_spec, such as P('data', None, 'tensor', None), or P() if it is replicated"
        )
    batch, length, heads, features = ([*map(_names, spec)] + [()] * 4)[:4]
    if len(spec) > 4 or length or features:
        raise ValueError(f"only batch and heads can be split over a mesh, P(batch, None, heads, None), got {spec}")
    for name in (*batch, *heads):
        if name not in free:
            raise ValueError(f"query_spec {spec} names {name!r}; the mesh's free axes are {', '.join(free)}")
    explicit = any(kinds[name] is AxisType.Explicit for name in free)
    if explicit and any(kinds[name] is AxisType.Auto for name in (*batch, *heads)):
        raise ValueError(
            f"query_spec {spec} names Auto axes of a mesh that has Explicit ones, too: make them of one kind"
        )
    _check_divides("sequences", query.shape[0], batch, sizes)
    _check_divides("KV heads", kv_heads, heads, sizes)
    return Sharding(batch, heads, tuple(free), explicit)


def equally_varying[T](operands: T) -> T:
    """The arrays of a pytree, each varying over every axis of a caller's `shard_map` that any of them varies over.

    So results and gradients have the query's type; the cast's own gradient sums over the axes that it added.
    """
    every = frozenset[str]().union(*(_varying(array) for array in jax.tree.leaves(operands)))
    return jax.tree.map(functools.partial(_vary_over, axes=every), operands)


def varying_like(array: Array, example: Array) -> Array:
    """The array, varying over the axes that the example varies over, which JAX cannot infer for a kernel's results."""
    return _vary_over(array, _varying(example))


def _varying(array: Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def _vary_over(array: Array, axes: frozenset[str]) -> Array:
    missing = tuple(sorted(axes - _varying(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def _names(axes) -> Axes:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _product(axes: Axes, sizes: dict[str, int]) -> int:
    return math.prod(sizes[name] for name in axes)


def _check_divides(what: str, count: int, axes: Axes, sizes: dict[str, int]) -> None:
    shards = _product(axes, sizes)
    if count % shards:
        raise ValueError(
            f"{count} {what} cannot be split over the {shards} shards of {' × '.join(axes)}: take a mesh whose axis "
            f"divides {count}"
        )
