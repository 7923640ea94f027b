"""GGUF files, the format of llama.cpp, for reading: hyperparameters, and tensors under their Hugging Face names.

The package gguf undoes the quantisation. For the architecture "llama", llama.cpp's converter
reorders the rows of the query and key projections so that rotary positions pair neighbouring features; here the order
is the original one again, which pairs the two halves of a head. "qwen3" is stored in the original order.
"""

import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import gguf
import numpy as np

from models.checkpoints.gguf_header import GgufTensor, read_gguf
from models.untrusted import quoted, shortened
from s2jax.rotary import RopeScaling

_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_ROPE = (1.0, 4.0, 8192)
"""Low and high frequency factor, and original length."""
_ARCHITECTURES = ("llama", "qwen3")
# Hyperparameters that are read below, that say nothing new, or that name the origin of a file.
_KNOWN = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "tensor_data_layout",
    "vocab_size",
}
# The values under which these hyperparameters change nothing.
_WITHOUT_EFFECT = {
    "attention.causal": True,
    "attention.sliding_window": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scale_linear": 1.0,
    "rope.scaling.factor": 1.0,
    "rope.scaling.type": "none",
}


class GgufFile(Mapping[str, np.ndarray]):
    """The tensors of a GGUF file by their Hugging Face names, dequantised to float32 as they are asked for.

    Args:
        path: of the file, or of the first part of one that was split; the other parts lie beside it.

    Attributes:
        metadata: the file's metadata by key, as Python values.

    Raises:
        ValueError: if a file is missing, not GGUF, torn, or big-endian; if its architecture is another than llama or
            qwen3; if it has a tensor that such a model has no use for; and, on reading a tensor, if the package gguf
            cannot undo its quantisation.
    """

    def __init__(self, path: str | os.PathLike):
        self.metadata, tensors = _read_parts(pathlib.Path(path))
        kind, architecture = self.metadata.get("general.type", "model"), self.metadata.get("general.architecture")
        if kind != "model":
            raise ValueError(f"{path} is of the type {quoted(kind)}; supported is 'model' alone")
        if architecture not in _ARCHITECTURES:
            raise ValueError(
                f"{path} has the architecture {quoted(architecture)}; supported are {', '.join(_ARCHITECTURES)}"
            )
        self._rope_factors = tensors.pop(ROPE_FACTORS, None)
        self._tensors = {_name(name, path): tensor for name, tensor in tensors.items()}
        # Rows of these are in llama.cpp's order: heads by their tensors.
        self._reordered = {}
        if architecture == "llama":
            heads = self._count("attention.head_count")
            self._reordered = {"q_proj": heads, "k_proj": self._count("attention.head_count_kv", heads)}

    def __getitem__(self, name: str) -> np.ndarray:
        array = _dequantized(self._tensors[name])
        heads = self._reordered.get(name.split(".")[-2])
        return array if heads is None else _halves_together(array, heads)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # without reading it

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, without reading it."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def shape(self) -> dict[str, Any]:
        """The fields of `TransformerConfig` that the file decides, by name.

        Raises:
            ValueError: on a hyperparameter that is missing, or that is not known to leave the model as `Transformer`
                computes it, such as a scaling of the rotary positions or a number of experts.
        """
        self._check_hyperparameters()
        heads, width = self._count("attention.head_count"), self._count("embedding_length")
        head_dim = self._count("attention.key_length", width // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._count(key, head_dim) != head_dim:
                raise ValueError(f"{key} must be the width of a head, {head_dim}, got {self._count(key)}")
        theta = self._number("rope.freq_base", 10_000.0)
        return {
            "vocab_size": self._tensors["model.embed_tokens.weight"].shape[0],
            "num_layers": self._count("block_count"),
            "d_model": width,
            "num_heads": heads,
            "num_kv_heads": self._count("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "d_ff": self._count("feed_forward_length"),
            "rope_theta": theta,
            "rope_scaling": self._rope_scaling(theta, head_dim),
            "norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "tie_embeddings": "lm_head.weight" not in self,
            "qk_norm": self.metadata["general.architecture"] == "qwen3",
        }

    def max_context(self) -> int:
        """The longest sequence, in tokens, that the model was trained for."""
        return self._count("context_length")

    def _rope_scaling(self, theta: float, head_dim: int) -> RopeScaling | None:
        """The rotary scaling, recovered from the factors that the file stores for each frequency.

        Of these all checkpoints of Llama 3.1 to 3.3 have three in common; the factor is the largest.
        """
        if self._rope_factors is None:
            return None
        factors = _dequantized(self._rope_factors)
        if factors.shape != (head_dim // 2,) or not (np.isfinite(factors) & (factors >= 1)).all():
            raise ValueError(f"{ROPE_FACTORS} must hold {head_dim // 2} factors of at least 1, one for each frequency")
        # They may be rounded to float16.
        scaling = RopeScaling(float(factors.max()), *LLAMA3_ROPE)
        plain: Any = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
        if not np.allclose(plain / scaling.scaled(plain), factors, rtol=1e-3):
            raise ValueError(
                f"{ROPE_FACTORS} scales the rotary positions in another way than Llama 3.1 with a factor of "
                f"{factors.max():g}, which alone is supported"
            )
        return scaling

    def _check_hyperparameters(self) -> None:
        prefix = f"{self.metadata['general.architecture']}."
        for key, value in self.metadata.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name not in _KNOWN and _WITHOUT_EFFECT.get(name, ...) != value:
                raise ValueError(
                    f"the file sets {shortened(key)}={quoted(value)}, which may change what the model computes and is "
                    "not supported"
                )
        if "model.embed_tokens.weight" not in self:
            raise ValueError("the file has no tensor token_embd.weight: is it a model, or a vocabulary alone?")

    def _get(self, key: str, default: Any = None) -> Any:
        key = f"{self.metadata['general.architecture']}.{key}"
        value = self.metadata.get(key, default)
        if value is None:
            raise ValueError(f"the file lacks {key}, without which the model's shape is unknown")
        return value

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} must be one positive integer for all layers, got {quoted(value)}")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{key} must be a positive number, got {quoted(value)}")
        return float(value)


def _read_parts(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """The metadata of the first part, and the tensors of all parts."""
    try:
        metadata, tensors = read_gguf(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    number, count, whole = (metadata.get(f"split.{name}", 0) for name in ("no", "count", "tensors.count"))
    if not all(isinstance(value, int) and 0 <= value < 1 << 31 for value in (number, count, whole)):
        raise ValueError(f"{path} must number its parts by integers, got {quoted((number, count, whole))}")
    if count <= 1:
        return metadata, tensors
    match = re.fullmatch(rf"(.+)-{number + 1:05}-of-{count:05}\.gguf", path.name)
    if match is None:
        raise ValueError(
            f"{path} is part {number + 1} of {count} of a split file and must be named so: NAME-{number + 1:05}-of-"
            f"{count:05}.gguf, else its other parts are not found; or join them by llama-gguf-split --merge"
        )
    names = [f"{match[1]}-{part + 1:05}-of-{count:05}.gguf" for part in range(min(count, 100_000))]
    if number != 0:
        raise ValueError(f"{path} is part {number + 1} of {count} of a split file: give the first, {names[0]}")
    for part, name in enumerate(names[1:], 1):
        _add_part(tensors, path.with_name(name), part, count)
    if len(tensors) != whole:
        raise ValueError(
            f"{path} and its other parts hold {len(tensors)} tensors, where {whole} were split: fetch them again"
        )
    return metadata, tensors


def _add_part(tensors: dict[str, GgufTensor], path: pathlib.Path, part: int, count: int) -> None:
    try:
        metadata, more = read_gguf(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing, part {part + 1} of {count} of a split file: fetch it") from error
    if (metadata.get("split.no"), metadata.get("split.count")) != (part, count):
        raise ValueError(f"{path} says that it is another part than {part + 1} of {count}: fetch it again")
    if twice := tensors.keys() & more.keys():
        raise ValueError(f"{path} has the tensor {quoted(min(twice))}, as another part does: fetch both again")
    tensors |= more


def _dequantized(tensor: GgufTensor) -> np.ndarray:
    try:
        with np.errstate(all="ignore"):  # what is not finite is found where the model takes it in
            return gguf.dequantize(tensor.rows, tensor.kind).astype(np.float32, copy=False)
    except NotImplementedError as error:
        raise ValueError(
            f"{tensor.name} has the quantisation {tensor.kind.name}, which the package gguf {version('gguf')} cannot "
            "undo; take a file with another, such as Q8_0, Q4_K or F16"
        ) from error


def _name(name: str, path: str | os.PathLike) -> str:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    match = re.fullmatch(r"blk\.([0-9]+)\.(.+)", name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}"
    raise ValueError(
        f"{path} has the tensor {shortened(name)}, for which the model here has no use; supported are plain "
        "Llama and Qwen3 decoders without biases or experts"
    )


def _halves_together(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of the rows [h * d, in]: from pairs (i, i + d/2) side by side to halves side by side."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
