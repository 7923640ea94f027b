"""Pretrained Llama-family models: in from a Hugging Face directory or a GGUF file, out to a Hugging Face directory.

    pretrained = load("SmolLM2-135M-Instruct.Q4_1.gguf", LocalStride(64, 16, 8), dense_layers=(0, 1))
    logits = pretrained.model(jnp.asarray([pretrained.tokenizer.encode("Once upon").ids]))

Needs the packages of the extra `generate`.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from models.config import TransformerConfig
from models.gguf import GgufFile
from models.gguf_tokenizer import tokenizer_from_gguf
from models.huggingface import from_huggingface, save_safetensors, to_huggingface
from models.huggingface_config import config_from_huggingface, config_to_huggingface, positive_integer
from models.huggingface_directory import ShardedTensors, read_json
from models.saved_pattern import pattern_settings, saved_pattern
from models.transformer import Transformer
from s2jax.patterns import Dense, Pattern


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Conventions:
    """What it takes to talk to a model."""

    max_context: int
    tokenizer: Tokenizer | None = None
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    eos_token: str | None = None
    chat_template: str | None = None

    def end_of_text(self) -> str | None:
        """What the tokenizer calls the end of a text; where nothing says, the first of the tokens that end one."""
        if self.eos_token is not None or self.tokenizer is None or not self.eos_ids:
            return self.eos_token
        return self.tokenizer.id_to_token(self.eos_ids[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained(_Conventions):
    """A model and what it takes to talk to it.

    Attributes:
        model: with its weights, float32; `model.config` has its shape.
        max_context: the longest sequence, in tokens, that the model was trained for.
        tokenizer: None if the checkpoint has none.
        eos_ids: the tokens that end a text, or a turn of a conversation.
        bos_id: the token that begins a text, if the model has one; the tokenizer adds it where the model wants it.
        eos_token: what the tokenizer calls the end of a text, if the checkpoint says so; see `end_of_text`.
        chat_template: the Jinja template that lays out a conversation, if the checkpoint has one.
    """

    model: Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(_Conventions):
    """A checkpoint whose weights are still in its files; see `Pretrained` for what is around them.

    Attributes:
        config: the model that they are for.
        tensors: by their Hugging Face names, each read when it is asked for.
    """

    config: TransformerConfig
    tensors: Mapping[str, np.ndarray]

    def __post_init__(self):
        for token in (*self.eos_ids, *(() if self.bos_id is None else (self.bos_id,))):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"tokens that begin and end a text must be ids from 0 to {self.config.vocab_size - 1}, the "
                    f"checkpoint has {token!r}"
                )

    def parameters(self) -> dict:
        """Reads and checks the weights: float32 on the host, nested as `nnx.update` takes them.

        Raises:
            ValueError: in one line, if tensors are missing, torn, of another shape, NaN or infinite.
        """
        return from_huggingface(self.tensors, self.config)

    def with_parameters(self, parameters: dict) -> Pretrained:
        """The model with these weights, its own or others that came of them; they stay where they are."""
        model = nnx.eval_shape(lambda: Transformer(self.config, rngs=nnx.Rngs(0)))
        nnx.update(model, parameters)
        conventions = {field.name: getattr(self, field.name) for field in dataclasses.fields(_Conventions)}
        return Pretrained(model=model, **conventions)


def load(path: str | os.PathLike, pattern: Pattern | None = None, **settings: Any) -> Pretrained:
    """Loads a Llama, Mistral or Qwen3 checkpoint, see `open_checkpoint`.

    Tensors are read, checked and converted one by one, so that the peak is the float32 model and little more.
    """
    checkpoint = open_checkpoint(path, pattern, **settings)
    arrays = nnx.traversals.flatten_mapping(checkpoint.parameters())
    for name in arrays:  # one by one: two copies of a tensor at a time, not of the model
        arrays[name] = jnp.asarray(arrays[name])
    return checkpoint.with_parameters(nnx.traversals.unflatten_mapping(arrays))


def open_checkpoint(
    path: str | os.PathLike,
    pattern: Pattern | None = None,
    *,
    tokenizer: str | os.PathLike | None = None,
    **settings: Any,
) -> Checkpoint:
    """Reads all of a Llama, Mistral or Qwen3 checkpoint but its weights.

    Args:
        path: a GGUF file, or a directory with config.json, safetensors and, usually, tokenizer.json.
        pattern: who attends to whom, in the layers that are not dense. By default the pattern and the dense layers that
            `save` recorded in config.json, or else dense attention in every layer.
        tokenizer: a tokenizer.json to take in place of the checkpoint's own tokenizer.
        settings: further fields of `TransformerConfig` that a checkpoint leaves open: `dense_layers`, `dtype`, `remat`,
            `query_spec`, `implementation`.

    Raises:
        ValueError: in one line, if a file is missing or torn; if the model is not one that `Transformer` computes
            exactly; on a quantisation or a tokenizer that cannot be read.
    """
    path = pathlib.Path(path)
    read = _read_directory if path.is_dir() else _read_gguf
    if pattern is not None:
        settings["pattern"] = pattern
    return read(path, None if tokenizer is None else read_tokenizer(tokenizer), **settings)


def save(directory: str | os.PathLike, pretrained: Pretrained) -> None:
    """Writes a checkpoint that `load` reads, and transformers as `LlamaForCausalLM` or `Qwen3ForCausalLM`.

    It holds config.json, model.safetensors in float32 and, if there is a tokenizer, tokenizer.json and
    tokenizer_config.json. config.json records the pattern and the dense layers under the key `s2jax`, see
    `models.saved_pattern`; other readers ignore it and attend densely in every layer. config.json comes last, so a
    directory in which writing was interrupted is not taken for whole.

    Args:
        directory: made if it does not exist. A checkpoint in it is overwritten.
        pretrained: the model and its tokenizer.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").unlink(missing_ok=True)
    save_safetensors(directory / "model.safetensors", to_huggingface(pretrained.model))
    special = {"bos_token_id": pretrained.bos_id, "eos_token_id": list(pretrained.eos_ids) or None}
    if pretrained.tokenizer is not None:
        pretrained.tokenizer.save(str(directory / "tokenizer.json"))
        _write_json(directory / "tokenizer_config.json", _tokenizer_config(pretrained, pretrained.tokenizer))
    _write_json(directory / "generation_config.json", special)
    config = config_to_huggingface(pretrained.model.config, pretrained.max_context)
    _write_json(directory / "config.json", config | special | saved_pattern(pretrained.model.config))


def read_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    Raises:
        ValueError: if the file is missing, torn, or no tokenizer.
    """
    # Here, as the errors of `tokenizers` have no class of their own.
    if "model" not in read_json(path):
        raise ValueError(f"{path} must have a 'model', which it lacks: it is no tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    # Left over from someone's training: texts are neither cut nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_gguf(path: pathlib.Path, tokenizer: Tokenizer | None, **settings: Any) -> Checkpoint:
    file = GgufFile(path)
    metadata = file.metadata
    if tokenizer is None and "tokenizer.ggml.model" in metadata:
        tokenizer = tokenizer_from_gguf(metadata)
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    end = None if tokenizer is None or ends[0] is None else tokenizer.id_to_token(ends[0])
    return Checkpoint(
        config=TransformerConfig(**file.shape(), **{"pattern": Dense(), **settings}),
        tensors=file,
        max_context=file.max_context(),
        tokenizer=tokenizer,
        eos_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token=end,
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _read_directory(path: pathlib.Path, tokenizer: Tokenizer | None, **settings: Any) -> Checkpoint:
    values = read_json(path / "config.json")
    recorded = {} if "pattern" in settings else pattern_settings(values)
    config = config_from_huggingface(values, **{"pattern": Dense(), **recorded, **settings})
    if tokenizer is None and (path / "tokenizer.json").exists():
        tokenizer = read_tokenizer(path / "tokenizer.json")
    # Where the two differ, it is this one that generation goes by.
    generation = _optional_json(path / "generation_config.json")
    ends, begin = (
        values.get(name) if generation.get(name) is None else generation[name]
        for name in ("eos_token_id", "bos_token_id")
    )
    eos_token = _optional_json(path / "tokenizer_config.json").get("eos_token")
    return Checkpoint(
        config=config,
        tensors=ShardedTensors(path),
        max_context=positive_integer({"max_position_embeddings": 2048, **values}, "max_position_embeddings"),
        tokenizer=tokenizer,
        eos_ids=tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
        bos_id=begin,
        eos_token=eos_token.get("content") if isinstance(eos_token, dict) else eos_token,
        chat_template=_chat_template(path),
    )


def _chat_template(path: pathlib.Path) -> str | None:
    if (path / "chat_template.jinja").exists():
        return (path / "chat_template.jinja").read_text("utf-8")
    template = _optional_json(path / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _tokenizer_config(pretrained: Pretrained, tokenizer: Tokenizer) -> dict[str, Any]:
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": pretrained.max_context,
        "clean_up_tokenization_spaces": False,
    }
    if pretrained.bos_id is not None:
        values["bos_token"] = tokenizer.id_to_token(pretrained.bos_id)
    if (end := pretrained.end_of_text()) is not None:
        values["eos_token"] = end
    if pretrained.chat_template is not None:
        values["chat_template"] = pretrained.chat_template
    return values


def _optional_json(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
