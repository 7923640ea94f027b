"""GGUF files, the format of llama.cpp, for reading: hyperparameters, and tensors under their Hugging Face names.

The package gguf parses the file and undoes the quantisation. For the architecture "llama", llama.cpp's converter
reorders the rows of the query and key projections so that rotary positions pair neighbouring features; here the order
is the original one again, which pairs the two halves of a head. "qwen3" is stored in the original order.
"""

import os
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import gguf
import numpy as np

from s2jax.heads import RopeScaling

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

    Attributes:
        metadata: the file's metadata by key, as Python values.

    Raises:
        ValueError: if the file is missing, not GGUF, torn, or big-endian; if its architecture is another than llama or
            qwen3; if it has a tensor that such a model has no use for; and, on reading a tensor, if the package gguf
            cannot undo its quantisation.
    """

    def __init__(self, path: str | os.PathLike):
        self.metadata, tensors = _read(path)
        architecture = self.metadata.get("general.architecture")
        if architecture not in _ARCHITECTURES:
            raise ValueError(f"{path} has the architecture {architecture!r}; supported are {', '.join(_ARCHITECTURES)}")
        self._rope_factors = next((tensor for tensor in tensors if tensor.name == ROPE_FACTORS), None)
        self._tensors = {_name(tensor.name, path): tensor for tensor in tensors if tensor.name != ROPE_FACTORS}
        # Rows of these are in llama.cpp's order: heads by their tensors.
        self._reordered = {}
        if architecture == "llama":
            heads = self._count("attention.head_count")
            self._reordered = {"q_proj": heads, "k_proj": self._count("attention.head_count_kv", heads)}

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{tensor.name} has the quantisation {tensor.tensor_type.name}, which the package gguf "
                f"{version('gguf')} cannot undo; take a file with another, such as Q8_0, Q4_K or F16"
            ) from error
        heads = self._reordered.get(name.split(".")[-2])
        return array if heads is None else _halves_together(array, heads)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # without reading it

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
        return {
            "vocab_size": int(self._tensors["model.embed_tokens.weight"].shape[-1]),  # sizes are stored last first
            "num_layers": self._count("block_count"),
            "d_model": width,
            "num_heads": heads,
            "num_kv_heads": self._count("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "d_ff": self._count("feed_forward_length"),
            "rope_theta": self._get("rope.freq_base", 10_000.0),
            "rope_scaling": self._rope_scaling(head_dim),
            "norm_eps": self._get("attention.layer_norm_rms_epsilon"),
            "tie_embeddings": "lm_head.weight" not in self,
            "qk_norm": self.metadata["general.architecture"] == "qwen3",
        }

    def max_context(self) -> int:
        """The longest sequence, in tokens, that the model was trained for."""
        return self._count("context_length")

    def _rope_scaling(self, head_dim: int) -> RopeScaling | None:
        """The scaling whose effect the file tells, a factor for every frequency, but not its four numbers.

        Of these all checkpoints of Llama 3.1 to 3.3 have three in common; the factor is the largest.
        """
        if self._rope_factors is None:
            return None
        factors = np.asarray(self._rope_factors.data, np.float32)
        theta = self._get("rope.freq_base", 10_000.0)
        scaling = RopeScaling(float(factors.max()), *LLAMA3_ROPE)
        plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
        # They may be rounded to float16.
        if factors.shape != plain.shape or not np.allclose(plain / scaling.scaled(plain), factors, rtol=1e-3):
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
                    f"the file sets {key}={value!r}, which may change what the model computes and is not supported"
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
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} must be one positive integer for all layers, got {value!r}")
        return value


def _read(path: str | os.PathLike) -> tuple[dict[str, Any], list[gguf.ReaderTensor]]:
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise ValueError(f"{path} is no GGUF file: it begins with {magic!r} where b'GGUF' stands in one")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    # What the reader's array arithmetic raises where the bytes run out, or say what cannot be.
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{path} is torn at its {os.path.getsize(path)} bytes, or newer than the package gguf {version('gguf')} "
            f"knows, which says: {str(error).rstrip('.')}. Fetch the file again, or update the package"
        ) from error
    if reader.byte_order == "S":
        raise ValueError(f"{path} is big-endian GGUF; supported is little-endian")
    return metadata, reader.tensors


def _name(name: str, path: str | os.PathLike) -> str:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}"
    raise ValueError(
        f"{path} has the tensor {name}, for which the model here has no use; supported are plain "
        "Llama and Qwen3 decoders without biases or experts"
    )


def _halves_together(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of the rows [h * d, in]: from pairs (i, i + d/2) side by side to halves side by side."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
