"""Weights from and to the names and shapes of Llama checkpoints in the Hugging Face format.

A matrix is `[out, in]` there and `[in, out]` here, with heads as axes of their own. Rotary positions pair feature `i`
of a head's first half with feature `i` of its second half in both ("rotate half"), so no row is permuted. The gains
of `qk_norm` bear the names that Qwen3 gives them.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from models.config import TransformerConfig
from models.transformer import Transformer

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
_OUTER_NAMES = {
    ("embed", "embedding"): "model.embed_tokens.weight",
    ("final_norm", "scale"): "model.norm.weight",
    ("lm_head", "kernel"): "lm_head.weight",
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
            some checkpoints hold beside tied embeddings: it is the embeddings once more.
        config: the model that the tensors are for.

    Raises:
        ValueError: if a tensor is missing, unknown, or of another shape than `config` says, or has a value that is
            NaN or infinite.
    """
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    wanted = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    given = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        given.discard("lm_head.weight")
    names = {path: _name(path) for path in wanted}
    missing, unknown = sorted(set(names.values()) - given), sorted(given - set(names.values()))
    if missing or unknown:
        raise ValueError(
            f"the tensors do not belong to this config: missing are {missing[:8]} ({len(missing)} in all), unknown are "
            f"{unknown[:8]} ({len(unknown)} in all); compare num_layers, tie_embeddings and qk_norm"
        )
    return nnx.traversals.unflatten_mapping(
        {path: _imported(path, np.asarray(tensors[names[path]]), like.shape) for path, like in wanted.items()}
    )


def save_safetensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors to one safetensors file. Needs the package `safetensors`."""
    import safetensors.numpy

    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(contiguous, path, metadata={"format": "pt"})


def load_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the tensors of one safetensors file, bfloat16 included. Needs the package `safetensors`."""
    import safetensors.flax

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return {name: np.asarray(tensor) for name, tensor in safetensors.flax.load_file(path).items()}


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
        raise ValueError(
            f"{_name(path)} must have shape {list(matrix_shape)} for this config, got {list(tensor.shape)}"
        )
    wide = tensor.astype(np.float32)
    if not_finite := wide.size - int(np.isfinite(wide).sum()):
        raise ValueError(f"{_name(path)} must hold finite numbers; {not_finite} of its {wide.size} are NaN or infinite")
    return wide.T.reshape(shape) if path[-1] == "kernel" else wide


def _matrix_shape(path: tuple, shape: tuple[int, ...]) -> tuple[int, int]:
    """[in, out] of a kernel: heads are output axes of query, key and value, and input axes of out."""
    inputs = 2 if path[-2] == "out" else 1
    return int(np.prod(shape[:inputs])), int(np.prod(shape[inputs:]))
