"""JAX primitives whose computation is traced when they are lowered, for the platform that they are lowered for.

A function that is traced with its caller holds the kernels of every platform, because the platform is not known yet. A
primitive need not: its lowering rule traces the one kernel that is needed. So tracing is quick, compiling for an absent
device stays possible, and layers that call the same computation on the same shapes lower it once.

`vmap` adds a `Mapped` to the primitive's parameters; the computation is mapped when it is traced.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, mapped_aval, unmapped_aval
from jax.interpreters import batching, mlir
from jax.sharding import AxisType

from pallas_kernels.caching import bounded_jit

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""Platforms with lowering rules of their own, so that an export for several of them traces each one's kernel."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The target of a lowering.

    Attributes:
      platform: as JAX names it: "cpu", "cuda", "rocm", "tpu".
      device: one of the devices; None if they are unknown, as in an export.
    """

    platform: str
    device: typing.Any = None


@dataclasses.dataclass(frozen=True)
class Mapped:
    """One `vmap` around a computation.

    Attributes:
      axes: the mapped axis of every array; None for an array that all elements share.
      size: size of the mapped axis.
      mesh_axes: mesh axes that the mapped axis is split over.
    """

    axes: tuple[int | None, ...]
    size: typing.Any
    mesh_axes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Signature:
    """The structure of a computation's arguments, which its primitive takes as flat arrays.

    Attributes:
      structure: pytree structure of the arguments.
      maps: the `vmap`s around the computation, the innermost first.
    """

    structure: typing.Any
    maps: tuple[Mapped, ...] = ()

    def unflatten(self, leaves) -> tuple:
        return jax.tree.unflatten(self.structure, leaves)

    def one(self, types) -> tuple:
        """The types of the arguments without the mapped axes, as a pytree."""
        types = list(types)
        for mapped in reversed(self.maps):
            types = [mapped_aval(mapped.size, axis, each) for axis, each in zip(mapped.axes, types, strict=True)]
        return self.unflatten(types)

    def all(self, types) -> list:
        """The types of the results with the mapped axes, which come first, the outermost before the others."""
        for mapped in self.maps:
            names = mapped.mesh_axes or None
            types = [unmapped_aval(mapped.size, 0, each, names) for each in types]
        return list(types)

    def mapped(self, function: typing.Callable) -> typing.Callable:
        """`function(*arguments)` as a function of the flat arrays, over all mapped axes."""

        def flat(*leaves):
            return function(*self.unflatten(leaves))

        for mapped in self.maps:
            flat = jax.vmap(flat, in_axes=mapped.axes)
        return flat

    def again(self, function: typing.Callable) -> typing.Callable:
        """`mapped`, for a function that looks at the mesh: its `vmap`s name the mesh axes of the mapped axes."""

        def flat(*leaves):
            return function(*self.unflatten(leaves))

        for mapped in self.maps:
            kinds = dict(zip(*_mesh_axes(), strict=True))
            auto = all(kinds.get(name) is not AxisType.Explicit for name in mapped.mesh_axes)
            flat = jax.vmap(flat, in_axes=mapped.axes, spmd_axis_name=(auto and mapped.mesh_axes) or None)
        return flat

    def as_argument(self, result: jax.Array, place: int) -> jax.Array:
        """The result for an argument, with the argument's mapped axes: summed over those that share it."""
        depth = len(self.maps)
        for number, mapped in enumerate(self.maps, start=1):
            at, axis = depth - number, mapped.axes[place]
            result = result.sum(at) if axis is None else jnp.moveaxis(result, at, at + axis)
        return result


def _mesh_axes() -> tuple[tuple[str, ...], tuple[AxisType, ...]]:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.axis_names, mesh.axis_types


class Deferred:
    """A primitive with its lowering, evaluation and batching; its maker adds the derivative.

    Parameters of the primitive:
      static: hashable parameters of the computation.
      signature: a `Signature`.
    """

    def __init__(self, name: str, compute: typing.Callable, result_types: typing.Callable):
        """Registers a primitive.

        Args:
          name: name of the primitive in a jaxpr.
          compute: `compute(static, signature, target, *arrays)`, traced when it is lowered.
          result_types: `result_types(static, *argument types)`, without mapped axes.
        """
        self.compute, self.result_types = compute, result_types
        self.primitive = primitive = Primitive(name)
        primitive.multiple_results = True
        primitive.def_abstract_eval(self._types)
        primitive.def_impl(self._evaluate)
        batching.fancy_primitive_batchers[primitive] = self._batch
        mlir.register_lowering(primitive, self._lower, inline=False)
        for platform in PLATFORMS:
            lower = functools.partial(self._lower, platform=platform)
            mlir.register_lowering(primitive, lower, platform=platform, inline=False)

    def __call__(self, static, *arguments) -> list:
        leaves, structure = jax.tree.flatten(arguments)
        return self.bind(leaves, static, Signature(structure))

    def bind(self, leaves, static, signature: Signature) -> list:
        return self.primitive.bind(*leaves, static=static, signature=signature)

    def _types(self, *types, static, signature: Signature) -> list:
        return signature.all(self.result_types(static, *signature.one(types)))

    def _evaluate(self, *leaves, static, signature: Signature) -> list:
        with jax.disable_jit(False):
            return self._compiled(static, signature, leaves)

    @functools.cached_property
    def _compiled(self):
        return bounded_jit(2)(lambda static, signature, leaves: self.bind(leaves, static, signature))

    def _batch(self, axis, leaves, axes, *, static, signature: Signature):
        if all(each is None for each in axes):
            results = self.bind(leaves, static, signature)
            return results, [None] * len(results)
        mesh_axes = axis.explicit_mesh_axis or axis.spmd_name or ()
        mesh_axes = (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes)
        mapped = Mapped(tuple(axes), axis.size, mesh_axes)
        results = self.bind(leaves, static, dataclasses.replace(signature, maps=(*signature.maps, mapped)))
        return results, [0] * len(results)

    def _lower(self, context, *arrays, static, signature: Signature, platform: str | None = None):
        platforms = context.platforms or context.module_context.platforms
        devices = getattr(context.module_context.axis_context, "device_assignment", None)
        target = Target(platform or platforms[0], devices[0] if devices else None)
        return mlir.lower_fun(functools.partial(self.compute, static, signature, target))(context, *arrays)
