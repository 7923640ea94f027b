"""Pretrained Llama-family models: loaded from a Hugging Face directory or a GGUF file, saved to a directory.

    pretrained = load("SmolLM2-135M-Instruct.Q4_1.gguf", LocalStride(64, 16, 8), dense_layers=(0, 1))
    logits = pretrained.model(jnp.asarray([pretrained.encode("Once upon")]))

Needs the packages of the extra `generate`.
"""

import abc
import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from tokenizers import Tokenizer

from models.checkpoints.gguf import GgufFile
from models.checkpoints.gguf_tokenizer import (
    end_ids,
    gguf_chat_template,
    sampling_of_gguf,
    special_tokens,
    tokenizer_from_gguf,
)
from models.checkpoints.huggingface_config import (
    config_from_huggingface,
    config_to_huggingface,
    longest_context,
    unknown_keys,
)
from models.checkpoints.huggingface_generation import sampling_from, unknown_settings
from models.checkpoints.huggingface_tokenizer import of_tokenizers, read_tokenizer, read_tokenizer_files
from models.checkpoints.huggingface_weights import EMBEDDINGS, HEAD, check_shapes, from_huggingface, to_huggingface
from models.checkpoints.locate import find_checkpoint
from models.checkpoints.safetensors import ShardedTensors, save_safetensors
from models.checkpoints.saved_pattern import pattern_settings, saved_pattern
from models.config import TransformerConfig
from models.sampling import Sampling
from models.transformer import Transformer
from models.untrusted import quoted, read_json, shortened
from s2jax.patterns import Dense, Pattern

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Conventions(abc.ABC):
    """Conventions of a model's text: tokenizer, special tokens, chat template, sampling."""

    max_context: int
    tokenizer: Tokenizer | None = None
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat_template: str | None = None
    sampling: Sampling = Sampling()  # noqa: RUF009 - a frozen value
    refused_sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, all of which the model knows.

        Args:
            text: to be cut into tokens.
            add_special_tokens: puts the tokens around it that the checkpoint wants around a text.

        Raises:
            ValueError: there is no tokenizer, or it gives an id that is beyond the model's vocabulary.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer: put a tokenizer.json beside its weights")
        encoding = of_tokenizers(
            lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens),
            "the tokenizer cannot encode the text",
        )
        if strays := [i for i in encoding.ids if i >= self.vocab_size]:
            token, last = tokenizer.id_to_token(strays[0]), self.vocab_size - 1
            raise ValueError(
                f"the text has the token {quoted(token)} with the id {strays[0]}, where the model knows ids from 0 to "
                f"{last}: leave that token out, or take a model whose embeddings have a row for it"
            )
        return encoding.ids

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """The vocabulary size of the model, which may differ from the tokenizer's."""

    def end_of_text(self) -> str | None:
        """The token that ends a text, as the tokenizer names it; by default the first of the end tokens."""
        end = self.special_tokens.get("eos_token")
        if end is not None or self.tokenizer is None or not self.eos_ids:
            return end
        return self.tokenizer.id_to_token(self.eos_ids[0])

    def own_sampling(self) -> Sampling:
        """The sampling that the checkpoint asks for.

        Raises:
            ValueError: it asks for what `Sampling` cannot do, such as a penalty on repetition.
        """
        if self.refused_sampling:
            wanted = ", ".join(f"{shortened(key)}={quoted(value)}" for key, value in self.refused_sampling.items())
            raise ValueError(
                f"the checkpoint asks for tokens to be chosen by {shortened(wanted)}, which is not supported: say how "
                "else to choose them (--temperature, --top-k or --top-p; sampling=Sampling(...))"
            )
        return self.sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained(_Conventions):
    """A model with its tokenizer, special tokens, chat template and sampling.

    Attributes:
        model: with its weights, float32; `model.config` has its shape.
        max_context: the longest sequence, in tokens, that the model was trained for.
        tokenizer: None if the checkpoint has none.
        eos_ids: the tokens that end a text, or a turn of a conversation.
        bos_id: the token that begins a text, if the model has one; the tokenizer adds it where the model wants it.
        special_tokens: the texts of the tokens that chat templates know by name, such as `eos_token`.
        chat_template: the Jinja template that lays out a conversation, if the checkpoint has one.
        sampling: how the checkpoint wants its tokens to be chosen; see `own_sampling`.
        refused_sampling: what else it asks for in choosing them, which `Sampling` cannot do.
    """

    model: Transformer

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(_Conventions):
    """A checkpoint whose weights are not read yet; see `Pretrained` for its other fields.

    Attributes:
        config: the model that they are for.
        tensors: by their Hugging Face names, each read when it is asked for.
    """

    config: TransformerConfig
    tensors: ShardedTensors | GgufFile

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def __post_init__(self):
        for token in (*self.eos_ids, *(() if self.bos_id is None else (self.bos_id,))):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"tokens that begin and end a text must be ids from 0 to {self.config.vocab_size - 1}, the "
                    f"checkpoint has {quoted(token)}"
                )

    def parameters(self) -> dict:
        """Reads and checks the weights: float32 on the host, nested as `nnx.update` takes them.

        Raises:
            ValueError: in one line, if tensors are missing, torn, of another shape, NaN or infinite.
        """
        return from_huggingface(self.tensors, self.config)

    def with_parameters(self, parameters: dict) -> Pretrained:
        """The model with the given weights, such as fine-tuned ones; they stay on their devices."""
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
        arrays[name] = jax.device_put(arrays[name])
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
        path: a GGUF file; a directory with config.json, safetensors and, usually, tokenizer.json; the directory of a
            run; or `org/name[@revision]` on Hugging Face, see `models.checkpoints.locate`.
        pattern: who attends to whom, in the layers that are not dense. By default the pattern and the dense layers that
            `save` recorded in config.json, or else dense attention in every layer.
        tokenizer: a tokenizer.json to take in place of the checkpoint's own tokenizer.
        settings: further fields of `TransformerConfig` that a checkpoint leaves open: `dense_layers`, `dtype`, `remat`,
            `implementation`.

    Raises:
        ValueError: in one line, if a file is missing or torn; if the model is not one that `Transformer` computes
            exactly; on a quantisation or a tokenizer that cannot be read.
    """
    path = find_checkpoint(path)
    read = _read_directory if path.is_dir() else _read_gguf
    if pattern is not None:
        settings["pattern"] = pattern
    checkpoint = read(path, None if tokenizer is None else read_tokenizer(tokenizer), **settings)
    check_shapes(checkpoint.tensors.shapes(), checkpoint.config)
    return checkpoint


def save(directory: str | os.PathLike, pretrained: Pretrained) -> None:
    """Writes a checkpoint that `load` reads, and transformers as `LlamaForCausalLM` or `Qwen3ForCausalLM`.

    The files are config.json, model.safetensors in float32 and, if there is a tokenizer, tokenizer.json and
    tokenizer_config.json. config.json records the pattern and the dense layers under the key `s2jax`, see
    `models.checkpoints.saved_pattern`; other readers ignore it and attend densely in every layer. config.json is
    written last, so an interrupted write leaves no directory that looks complete.

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
        # Its own `save` takes no path but one in UTF-8.
        (directory / "tokenizer.json").write_text(pretrained.tokenizer.to_str(pretty=True), "utf-8")
        _write_json(directory / "tokenizer_config.json", _tokenizer_config(pretrained, pretrained.tokenizer))
    _write_json(directory / "generation_config.json", special | _generation_config(pretrained))
    config = config_to_huggingface(pretrained.model.config, pretrained.max_context)
    _write_json(directory / "config.json", config | special | saved_pattern(pretrained.model.config))


def _read_gguf(path: pathlib.Path, tokenizer: Tokenizer | None, **settings: Any) -> Checkpoint:
    file = GgufFile(path)
    metadata = file.metadata
    if tokenizer is None and "tokenizer.ggml.model" in metadata:
        tokenizer = tokenizer_from_gguf(metadata)
    sampling, refused = sampling_of_gguf(metadata)
    return Checkpoint(
        config=TransformerConfig(**file.shape(), **{"pattern": Dense(), **settings}),
        tensors=file,
        max_context=file.max_context(),
        tokenizer=tokenizer,
        eos_ids=end_ids(metadata),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        special_tokens=special_tokens(metadata),
        chat_template=gguf_chat_template(metadata),
        sampling=sampling,
        refused_sampling=refused,
    )


def _read_directory(path: pathlib.Path, tokenizer: Tokenizer | None, **settings: Any) -> Checkpoint:
    values = read_json(path / "config.json")
    recorded = {} if "pattern" in settings else pattern_settings(values)
    config = config_from_huggingface(values, **{"pattern": Dense(), **recorded, **settings})
    tensors = ShardedTensors(path)
    if config.tie_embeddings and {HEAD, EMBEDDINGS} <= tensors.keys() and not tensors.equal(HEAD, EMBEDDINGS):
        _log.warning("%s has tie_word_embeddings=true and %s that differ: both are kept", path, f"{HEAD}, {EMBEDDINGS}")
        config = dataclasses.replace(config, tie_embeddings=False)
    # Without a file of its own, generation goes by config.json.
    own = path / "generation_config.json"
    generation = read_json(own) if own.exists() else values
    sampling, refused = sampling_from(generation)
    ends, begin = (
        values.get(name) if generation.get(name) is None else generation[name]
        for name in ("eos_token_id", "bos_token_id")
    )
    tokens = read_tokenizer_files(path, tokenizer)
    if unknown := sorted({*unknown_keys(values), *(unknown_settings(generation) if own.exists() else ())}):
        _log.warning("%s: settings without effect here, as they are not known: %s", path, quoted(unknown))
    return Checkpoint(
        config=config,
        tensors=tensors,
        max_context=longest_context(values),
        tokenizer=tokens.tokenizer,
        eos_ids=tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
        bos_id=begin,
        special_tokens=tokens.special_tokens,
        chat_template=tokens.chat_template,
        sampling=sampling,
        refused_sampling=refused,
    )


def _tokenizer_config(pretrained: Pretrained, tokenizer: Tokenizer) -> dict[str, Any]:
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": pretrained.max_context,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": tokenizer.encode_special_tokens,
        **pretrained.special_tokens,
    }
    if not pretrained.special_tokens and pretrained.bos_id is not None:
        values["bos_token"] = tokenizer.id_to_token(pretrained.bos_id)
    if (end := pretrained.end_of_text()) is not None:
        values["eos_token"] = end
    if pretrained.chat_template is not None:
        values["chat_template"] = pretrained.chat_template
    return values


def _generation_config(pretrained: Pretrained) -> dict[str, Any]:
    sampling, values = pretrained.sampling, dict(pretrained.refused_sampling)
    if sampling.temperature > 0:
        values |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        values["top_k"] = sampling.top_k or 0
    return values


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
