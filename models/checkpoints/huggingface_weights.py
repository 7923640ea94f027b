"""Weights from and to the names and shapes of Llama checkpoints in the Hugging Face format.

A matrix is `[out, in]` there and `[in, out]` here, with heads as axes of their own. Rotary positions pair feature `i`
of a head's first half with feature `i` of its second half in both ("rotate half"), so no row is permuted. The gains
of `qk_norm` bear the names that Qwen3 gives them.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from flax import nnx

from models.config import TransformerConfig
from models.transformer import Transformer
from models.untrusted import shortened

_LAYER_NAMES = {
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("attention", "query", "kernel"): "self_attn.q_proj.weight",
    ("attention", "key", "kernel"): "self_attn.k_proj.weight",
    ("attention", "value", "kernel"): "self_attn.v_proj.weight",
    ("attention", "out", "kernel"): "self_attn.o_proj.weight",
    ("attention", "query_gain"): "self_attn.q_norm.weight",
    ("attention", "key_gain"): "self_attn.k_norm.weight",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    ("mlp", "gate", "kernel"): "mlp.gate_proj.weight",
    ("mlp", "up", "kernel"): "mlp.up_proj.weight",
    ("mlp", "down", "kernel"): "mlp.down_proj.weight",
}
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OUTER_NAMES = {
    ("embed", "embedding"): EMBEDDINGS,
    ("final_norm", "scale"): "model.norm.weight",
    ("lm_head", "kernel"): HEAD,
}


def to_huggingface(model_or_state: Any) -> dict[str, np.ndarray]:
    """The parameters of a `Transformer`, or of its `nnx.state`, by their Hugging Face names, as float32 on the host."""
    if isinstance(model_or_state, nnx.Module):
        model_or_state = nnx.state(model_or_state, nnx.Param)
    parameters = nnx.traversals.flatten_mapping(nnx.to_pure_dict(model_or_state))
    return {_name(path): _exported(path, np.asarray(array)) for path, array in parameters.items()}


def from_huggingface(tensors: Mapping[str, np.ndarray], config: TransformerConfig) -> dict:
    """Parameters for `nnx.update(Transformer(config, ...), parameters)` out of tensors with Hugging Face names.

    Args:
        tensors: arrays by name, of any float dtype; the result is float32. Each is asked for once, and let go before
            the next: a mapping may read them from a file. The frequency tables that old checkpoints carry
            (`rotary_emb.inv_freq`) are skipped: they follow from `config.rope_theta`. So is the `lm_head.weight` that
            some checkpoints hold beside tied embeddings, if it is the embeddings once more.
        config: the model that the tensors are for.

    Raises:
        ValueError: if a tensor is missing, unknown, or of another shape than `config` says, or has a value that is
            NaN or infinite; if the embeddings are tied and there is an `lm_head.weight` that differs from them.
    """
    _check_names(tensors.keys(), config)
    if config.tie_embeddings and HEAD in tensors and not np.array_equal(tensors[HEAD], tensors[EMBEDDINGS]):
        raise ValueError(f"{HEAD} differs from {EMBEDDINGS}, which it must not with tie_embeddings=True")
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    wanted = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    names = {path: _name(path) for path in wanted}
    return nnx.traversals.unflatten_mapping(
        {path: _imported(path, np.asarray(tensors[names[path]]), like.shape) for path, like in wanted.items()}
    )


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: TransformerConfig) -> None:
    """Raises ValueError unless tensors of these shapes make up the model of a config; nothing is read or allocated.

    A config comes from a stranger, and may ask for a billion layers: it is held against the tensors that are there
    before anything of its size is made.
    """
    _check_names(shapes.keys(), config)
    layer = _layer_shapes(config)
    outer = {EMBEDDINGS: (config.vocab_size, config.d_model), "model.norm.weight": (config.d_model,)}
    if not config.tie_embeddings:
        outer[HEAD] = outer[EMBEDDINGS]
    for name, shape in shapes.items():
        expected = outer.get(name) or layer.get(name.split(".", 3)[-1])
        if expected is not None and expected != tuple(shape):
            _refuse_shape(name, expected, shape)


def _layer_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's tensors, [out, in], by the ends of their names."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (config.d_model,),
        "self_attn.q_proj.weight": (queries, config.d_model),
        "self_attn.k_proj.weight": (keys, config.d_model),
        "self_attn.v_proj.weight": (keys, config.d_model),
        "self_attn.o_proj.weight": (config.d_model, queries),
        "post_attention_layernorm.weight": (config.d_model,),
        "mlp.gate_proj.weight": (config.d_ff, config.d_model),
        "mlp.up_proj.weight": (config.d_ff, config.d_model),
        "mlp.down_proj.weight": (config.d_model, config.d_ff),
    }
    if config.qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (config.head_dim,) for name in "qk"}
    return shapes


def _check_names(names: Collection[str], config: TransformerConfig) -> None:
    given = {name for name in names if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        given.discard(HEAD)
    layer = _layer_shapes(config)
    outer = {EMBEDDINGS, "model.norm.weight"} | (set() if config.tie_embeddings else {HEAD})
    # Of more layers than there are tensors, the first that are missing tell enough.
    some = min(config.num_layers, len(given) + 1)
    wanted = outer.union(f"model.layers.{i}.{name}" for i in range(some) for name in layer)
    missing, unknown = sorted(wanted - given), sorted(given - wanted)
    if missing or unknown:
        lacking = len(outer) + config.num_layers * len(layer) - len(wanted & given)
        shown = [[shortened(name) for name in side[:8]] for side in (missing, unknown)]
        raise ValueError(
            f"the tensors do not belong to this config: missing are {shown[0]} ({lacking} in all), unknown are "
            f"{shown[1]} ({len(unknown)} in all); compare num_layers, tie_embeddings and qk_norm"
        )


def _refuse_shape(name: str, expected: tuple[int, ...], got: Sequence[int]) -> NoReturn:
    raise ValueError(f"{name} must have shape {list(expected)} for this config, got {list(got)}")


def _name(path: tuple) -> str:
    if path[0] == "layers":
        return f"model.layers.{path[1]}.{_LAYER_NAMES[path[2:]]}"
    return _OUTER_NAMES[path]


def _exported(path: tuple, array: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return array
    return array.reshape(_matrix_shape(path, array.shape)).T


def _imported(path: tuple, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    matrix_shape = _matrix_shape(path, shape)[::-1] if path[-1] == "kernel" else shape
    if tensor.shape != matrix_shape:
        _refuse_shape(_name(path), matrix_shape, tensor.shape)
    with np.errstate(over="ignore"):  # to infinity, which is refused below
        wide = tensor.astype(np.float32)
    if not_finite := wide.size - int(np.isfinite(wide).sum()):
        raise ValueError(f"{_name(path)} must hold finite numbers; {not_finite} of its {wide.size} are NaN or infinite")
    return wide.T.reshape(shape) if path[-1] == "kernel" else wide


def _matrix_shape(path: tuple, shape: tuple[int, ...]) -> tuple[int, int]:
    """[in, out] of a kernel: heads are output axes of query, key and value, and input axes of out."""
    inputs = 2 if path[-2] == "out" else 1
    return int(np.prod(shape[:inputs])), int(np.prod(shape[inputs:]))
