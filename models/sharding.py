"""Shardings of parameters, activations and caches on a mesh with the axes data, fsdp and tensor.

The axes are Explicit: the type of every array says how it is split, so that no spec is passed from hand to hand.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

BATCH_AXES = ("data", "fsdp")
"""Mesh axes over which the sequences of a batch are split."""

# The input side of a projection over fsdp, its output side over tensor, and the other way round for the projections
# back into the residual stream, so that a layer needs one reduction over tensor after the attention and one after
# the feed-forward (Megatron-LM, arXiv 1909.08053, section 3). Heads are never split.
PARAMETER_SPECS: dict[tuple[str, ...], P] = {
    ("embed", "embedding"): P("tensor", "fsdp"),
    ("lm_head", "kernel"): P("fsdp", "tensor"),
    ("query", "kernel"): P("fsdp", "tensor", None),
    ("key", "kernel"): P("fsdp", "tensor", None),
    ("value", "kernel"): P("fsdp", "tensor", None),
    ("out", "kernel"): P("tensor", None, "fsdp"),
    ("gate", "kernel"): P("fsdp", "tensor"),
    ("up", "kernel"): P("fsdp", "tensor"),
    ("down", "kernel"): P("tensor", "fsdp"),
    ("attention_norm", "scale"): P(),
    ("mlp_norm", "scale"): P(),
    ("final_norm", "scale"): P(),
    ("attention", "query_gain"): P(),
    ("attention", "key_gain"): P(),
}


def partition_specs(model_or_state: Any) -> Any:
    """A `PartitionSpec` over the axes "data", "fsdp" and "tensor" for each parameter, by its path.

    Args:
        model_or_state: a `Transformer`, or a pytree of its parameters: `nnx.state(model)`, also of `ShapeDtypeStruct`s
            (`nnx.eval_shape`), or a state that mirrors it, such as that of an Optax optimizer, whose scalars are
            replicated.

    Returns:
        The pytree with specs in the places of the arrays. No parameter is split over "data".

    Raises:
        ValueError: on a path that is no parameter of `Transformer`.
    """
    if isinstance(model_or_state, nnx.Module):
        model_or_state = nnx.state(model_or_state)
    return jax.tree_util.tree_map_with_path(_spec, model_or_state)


def batch_sharding() -> NamedSharding | None:
    """The sharding of a batch [b, ...] over the mesh that is set; None where none is."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else NamedSharding(mesh, P(_batch_axes(mesh)))


def _batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...] | None:
    return tuple(name for name in BATCH_AXES if name in mesh.axis_names) or None


def batch_spec(x: Array) -> P | None:
    """The spec of an array that is split like the first axis of `x` and along no other; None without Explicit axes.

    Operations need it as `out_sharding` where the split of their result does not follow from their operands: lookups in
    a split table, and contractions of an axis that is split in both operands.
    """
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return None
    return P(jax.typeof(x).sharding.spec[0])


def resharded(x: Array, spec: P | None) -> Array:
    """The array, split by another spec over Explicit axes; itself without them."""
    is_explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    return jax.sharding.reshard(x, spec) if is_explicit and spec is not None else x


def left_to_xla[T](function: Callable[..., T], out_specs: Any) -> Callable[..., T]:
    """`function` under the same mesh with Auto axes: XLA chooses how its intermediates are split."""
    decorator: Any = jax.sharding.auto_axes(out_sharding=out_specs)
    return decorator(function)


def cache_spec(query_kernel: Array) -> P | None:
    """The spec of the queries [b, t, h, d] that a cache is created for; None without Explicit axes.

    Args:
        query_kernel: the weights [f, h, d], which are split by heads as the queries are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return None
    return P(_batch_axes(mesh), None, jax.typeof(query_kernel).sharding.spec[1], None)


def _spec(path: tuple, leaf: Any) -> P:
    names = tuple(str(_name(entry)) for entry in path)
    if names and names[-1] == "value":  # the array inside an nnx.Param
        names = names[:-1]
    spec = PARAMETER_SPECS.get(names[-2:])
    if spec is not None and len(spec) <= leaf.ndim:
        return spec
    if leaf.ndim == 0:  # step counts and the like of an optimizer
        return P()
    known = ", ".join(".".join(known) for known in PARAMETER_SPECS)
    raise ValueError(
        f"no parameter of Transformer is called {'.'.join(names)!r} with shape {list(leaf.shape)}, so how to split it "
        f"is unknown; known are {known}. Give it a line in models.sharding.PARAMETER_SPECS"
    )


def _name(entry: Any) -> Any:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return entry
