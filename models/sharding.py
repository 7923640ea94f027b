"""How the parameters lie on a mesh with the axes data, fsdp and tensor."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

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
