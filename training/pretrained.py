"""Pretrained models in training: data in their tokens, a state of their weights, export of the result."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
from flax import nnx
from jax.experimental import multihost_utils

from models.byte_tokenizer import BOUNDARY, BOUNDARY_TOKEN, byte_tokenizer
from models.checkpoints.huggingface_tokenizer import of_tokenizers
from models.checkpoints.locate import find_checkpoint
from models.checkpoints.pretrained import Checkpoint, Pretrained, open_checkpoint, save
from models.transformer import Transformer
from training.cluster import agreeing
from training.config import Config, ModelOptions, require
from training.documents import Corpus, TokenDocument, content_bytes
from training.files import sync_directory
from training.left_out import LeftOut, shown
from training.step import Trainer, TrainState

_TOGETHER = 64  # documents handed to the tokenizer's threads at once
# What the weights leave open.
_FREE = {"pattern", "dense_layers", "rope_theta", "rope_scaling", "dtype", "remat", "implementation"}


def checkpoint_of(config: Config) -> Checkpoint:
    """The checkpoint that --pretrained names, to be read by the run's pattern.

    Raises:
        ValueError: it cannot be read, or a flag asks for a model of another shape, or for it to be overwritten.
    """
    assert config.pretrained is not None
    checkpoint = open_checkpoint(config.pretrained)
    stored = ModelOptions.of(checkpoint.config)
    for field in dataclasses.fields(ModelOptions):
        expected, got = getattr(stored, field.name), getattr(config.model, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        require(field.name in _FREE or expected == got, flag, f"{expected}, as in {config.pretrained}", got)
    if config.run_dir is not None:
        target = exported(config)
        apart = not target.exists() or (target.is_dir() and not target.samefile(find_checkpoint(config.pretrained)))
        require(apart, "--run-dir", f"one in which the tuned model may be written to {target}", "a file or its source")
    wanted = config.model.transformer()
    settings = {name: getattr(wanted, name) for name in _FREE}
    longest = max(checkpoint.max_context, config.input.seq_len)
    return dataclasses.replace(
        checkpoint, config=dataclasses.replace(checkpoint.config, **settings), max_context=longest
    )


def exported(config: Config) -> Path:
    """The directory of a run's tuned model."""
    return Path(config.run_dir or "", "model")


def in_tokens(corpus: Corpus, checkpoint: Checkpoint) -> Corpus:
    """Texts as the checkpoint's tokenizer cuts them, each closed by the token that ends a text; tokens as they are.

    Raises:
        ValueError: there is no tokenizer, or it gives tokens that the model lacks; a text is not UTF-8; or all are too
            short to predict anything.
    """
    if not corpus.byte_level:
        return corpus
    tokenizer, vocab_size = checkpoint.tokenizer, checkpoint.config.vocab_size
    if tokenizer is None:
        raise ValueError("--data: expected token files (.npy, .bin), as the checkpoint has no tokenizer, got text")
    documents: list[TokenDocument] = []
    left_out = LeftOut()
    for some in itertools.batched(corpus.documents, _TOGETHER):
        texts = [_decoded(document.name, content_bytes(document)) for document in some]
        encodings = of_tokenizers(
            functools.partial(tokenizer.encode_batch_fast, texts), f"--data: no tokens for {shown(some[0].name)}"
        )
        for document, encoding in zip(some, encodings, strict=True):
            closed = encoding.ids[-1:] and encoding.ids[-1] in checkpoint.eos_ids  # by the tokenizer itself
            tokens = np.array([*encoding.ids, *(() if closed else checkpoint.eos_ids[:1])], np.int32)
            if tokens.size and tokens.max() >= vocab_size:
                raise ValueError(
                    f"--pretrained: expected a tokenizer of at most the model's {vocab_size} tokens, got token "
                    f"{tokens.max()} in {document.name}"
                )
            if len(tokens) > 1:
                documents.append(TokenDocument(document.name, tokens, 0, len(tokens)))
            else:
                left_out.add("of a single token, which predicts nothing", document.name)
    if not documents:
        raise ValueError("--data: expected texts of more than one token, got none")
    return dataclasses.replace(
        corpus, documents=tuple(documents), byte_level=False, left_out=corpus.left_out.with_more(left_out)
    )


def _decoded(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--data: expected UTF-8 in {shown(name)}, got byte {content[error.start]} at {error.start}"
        ) from error


def pretrained_state(trainer: Trainer, checkpoint: Checkpoint) -> TrainState:
    """Step 0 with the checkpoint's weights, each device given its part of them."""

    def placed(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(array.shape, like.sharding, lambda part: array[part])

    return trainer.begin(jax.tree.map(placed, checkpoint.parameters(), trainer.abstract_state.params))


def from_scratch(config: Config, params: Any, *, byte_level: bool) -> Pretrained:
    """The model and tokenizer of a run that started from no checkpoint.

    Args:
        config: of the run.
        params: of the model.
        byte_level: True gives it the tokenizer of bytes; of other tokens the run knows the end alone.
    """
    model = nnx.eval_shape(lambda: Transformer(config.model.transformer(), rngs=nnx.Rngs(0)))
    nnx.update(model, params)
    if byte_level:
        return Pretrained(
            model=model,
            max_context=config.input.seq_len,
            tokenizer=byte_tokenizer(),
            bos_id=BOUNDARY,
            eos_ids=(BOUNDARY,),
            special_tokens={"bos_token": BOUNDARY_TOKEN, "eos_token": BOUNDARY_TOKEN},
        )
    end = config.input.end_token
    return Pretrained(model=model, max_context=config.input.seq_len, eos_ids=() if end is None else (end,))


def export(config: Config, model_of: Callable[[Any], Pretrained], params: Any) -> None:
    """Writes the model as a Hugging Face directory; every process takes part, the first writes.

    It is written beside its place and then renamed: a run that is killed, or a full disk, leaves the old one whole.
    The others wait: who leaves early ends the cluster for all.

    Args:
        config: of the run.
        model_of: makes the model of parameters: `Checkpoint.with_parameters`, or `from_scratch`.
        params: of the model, on any mesh.

    Raises:
        OSError: it cannot be written; on every process.
        Failed: the same, on the processes that write nothing.
    """
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    with agreeing(OSError):
        if jax.process_index() == 0:
            model = model_of(jax.tree.map(np.asarray, params))
            replace_directory(exported(config), lambda directory: save(directory, model))


def replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Puts a directory that `write` fills in the place of another, once it is whole and on the disk.

    Raises:
        OSError: it could not be written; `target` is as it was.
    """
    new, old = (target.with_name(f".{target.name}.{word}") for word in ("new", "old"))
    for leftover in (new, old):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        write(new)
        for path in new.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, safetensors.SafetensorError):  # what a full disk is to safetensors
            raise OSError(f"{target} could not be written: {' '.join(str(error).split())}") from error
        raise
    if target.exists():
        target.rename(old)
    new.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)
