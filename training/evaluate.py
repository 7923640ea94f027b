"""Scores of a trained model: held-out bits beside baselines, the gain of far context, a sample."""

from __future__ import annotations

import contextlib
import gzip
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from models.decoder import Decoder
from models.sampling import Sampling
from training.corpus import BOUNDARY, Corpus, Document, content_bytes
from training.data import Share, evaluation_batches, process_share, to_devices
from training.mesh import batch_sharding
from training.packing import PackedRows, Row, empty_row
from training.step import Trainer

Tick = Callable[[int, int], None]  # is told after each batch how many are scored, and of how many
MAX_WINDOWS = 32  # of far context, each scored once per context length


def _untold(_done: int, _total: int) -> None:
    """Tells nobody of the progress."""


def heldout_bits(trainer: Trainer, params: Any, corpus: Corpus, *, overlap: int, tick: Tick = _untold) -> float:
    """Bits per byte of the held-out text (per token, for token files): every target once, boundaries included.

    Args:
        trainer: holds the compiled functions.
        params: of the model.
        corpus: held-out documents.
        overlap: tokens of the row before that each row sees again, as context only.
        tick: may raise to end it.
    """
    rows = PackedRows(corpus, trainer.config.input.seq_len, overlap=overlap)
    batch_size = evaluation_batch_size(trainer)
    share = process_share(batch_sharding(trainer.mesh), batch_size)
    batches = evaluation_batches(rows, batch_size=batch_size, share=share)
    count = -(-len(rows) // batch_size)
    nats = sum(float(nll.sum(dtype=np.float64)) for nll in _scores(trainer, params, batches, count, tick))
    # A document's first token is no target; its closing boundary is one, and costs bits, but is no byte.
    units = sum(int((document.read(1, document.length) != BOUNDARY).sum()) for document in corpus.documents)
    return nats / math.log(2) / (units if corpus.byte_level else rows.num_pairs)


def evaluation_batch_size(trainer: Trainer) -> int:
    """Rows scored together: as many as one part of an accumulated batch has, which fit into memory."""
    return trainer.config.input.batch_size // trainer.config.optimizer.accumulate


def _scores(
    trainer: Trainer, params: Any, batches: Iterator[Row], count: int, tick: Tick
) -> Iterator[Float[np.ndarray, "b t"]]:
    sharding = batch_sharding(trainer.mesh)
    for done, batch in enumerate(batches, 1):
        yield np.asarray(trainer.token_nll(params, to_devices(batch, sharding, evaluation_batch_size(trainer))))
        tick(done, count)


def unigram_bits(corpus: Corpus) -> float:
    """Entropy of the bytes' own frequencies, in bits per byte: what a model without context could reach."""
    counts = np.zeros(256)
    for document in corpus.documents:
        counts += np.bincount(np.frombuffer(content_bytes(document), np.uint8), minlength=256)
    shares = counts[counts > 0] / counts.sum()
    return abs(float((shares * np.log2(shares)).sum()))


def gzip_bits(corpus: Corpus) -> float:
    """Bits per byte of `gzip -9`, each document compressed alone."""
    contents = [content_bytes(document) for document in corpus.documents]
    return 8 * sum(len(gzip.compress(content, 9, mtime=0)) for content in contents) / sum(map(len, contents))


@dataclass(frozen=True)
class ContextScore:
    """The same targets, each seeing at least `context` tokens before itself and fewer than `context + targets`."""

    context: int
    targets: int  # in a window
    windows: int
    bits: float  # per target
    excess: float  # bits over those with the context whole
    standard_error: float | None  # of the excess, over windows; None of a single one


def far_context(trainer: Trainer, params: Any, corpus: Corpus, *, tick: Tick = _untold) -> list[ContextScore]:
    """Scores the same target tokens with their context cut short and whole, whole last; empty if no text is that long.

    The targets are the last eighth of windows of `seq_len` tokens in long held-out documents. The rows are the same for
    every length, positions too: what lies further back is cut off by its segment id alone.
    """
    length = trainer.config.input.seq_len
    targets = max(length // 8, 1)
    windows = _windows(corpus, length)
    if not windows:
        return []
    whole = length - targets
    contexts = [c for c in (2**i for i in range(4, 32)) if c < whole]
    contexts = [*contexts[-4:], whole]
    batches = -(-len(windows) // evaluation_batch_size(trainer))

    def score(index: int) -> Float[np.ndarray, " w"]:
        so_far = lambda done, _: tick(index * batches + done, len(contexts) * batches)  # noqa: E731
        return _score_windows(trainer, params, windows, contexts[index], targets, so_far)

    nats = np.stack([score(index) for index in range(len(contexts))])
    bits = nats / math.log(2) / targets
    excess = bits - bits[-1]
    return [
        ContextScore(
            context,
            targets,
            len(windows),
            float(bits[i].mean()),
            float(excess[i].mean()),
            float(excess[i].std(ddof=1) / len(windows) ** 0.5) if len(windows) > 1 else None,
        )
        for i, context in enumerate(contexts)
    ]


def _windows(corpus: Corpus, length: int) -> list[tuple[Document, int]]:
    """Up to MAX_WINDOWS starts of windows that do not overlap, spread evenly over the long documents."""
    starts = [(d, s) for d in corpus.documents for s in range(0, d.length - length, length)]
    chosen = np.linspace(0, len(starts) - 1, min(MAX_WINDOWS, len(starts))).round().astype(int)
    return [starts[i] for i in chosen]


def _score_windows(
    trainer: Trainer, params: Any, windows: list[tuple[Document, int]], context: int, targets: int, tick: Tick
) -> Float[np.ndarray, " w"]:
    """Nats of each window's targets with `context` tokens before the first of them."""
    length, batch_size = trainer.config.input.seq_len, evaluation_batch_size(trainer)
    visible = np.arange(length) >= length - targets - context
    share = process_share(batch_sharding(trainer.mesh), batch_size)

    def row(index: int) -> Row:
        if index >= len(windows):
            return empty_row(length)
        document, start = windows[index]
        stream = document.read(start, start + length + 1)
        return Row(
            tokens=stream[:-1],
            targets=stream[1:],
            segment_ids=visible.astype(np.int32),
            positions=np.arange(length, dtype=np.int32),
            loss_mask=(np.arange(length) >= length - targets).astype(np.float32),
        )

    def batches(share: Share) -> Iterator[Row]:
        per_process = batch_size // share.count
        for start in range(share.index * per_process, _round_up(len(windows), batch_size), batch_size):
            rows = [row(index) for index in range(start, start + per_process)]
            yield Row(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})

    count = -(-len(windows) // batch_size)
    nats = [nll.sum(axis=1, dtype=np.float64) for nll in _scores(trainer, params, batches(share), count, tick)]
    return np.concatenate(nats)[: len(windows)]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def sample_text(trainer: Trainer, params: Any, *, prompt: str, length: int, temperature: float, seed: int) -> str:
    """A continuation of `prompt` by up to `length` bytes.

    The sample stops where a document ends, or where the logits define no distribution.

    Args:
        trainer: of a byte-level model.
        params: of the model.
        prompt: beginning of the sample; its end alone, if it fills the context.
        length: bytes to add; the context bounds prompt and sample together.
        temperature: 0 takes the likeliest byte each time.
        seed: of the draws.
    """
    context = trainer.config.input.seq_len
    opening = [BOUNDARY, *prompt.encode()[-(context // 2) :]]
    sampling, drawn = Sampling(temperature), []
    rows = trainer.mesh.shape["data"] * trainer.mesh.shape["fsdp"]  # one for each group of devices; the first counts
    with jax.set_mesh(trainer.mesh):
        decoder = Decoder(
            trainer.model(params),
            batch=rows,
            max_length=context,
            sampling=lambda logits, key: sampling(logits[:, : BOUNDARY + 1], key),
            seed=seed % 2**32,
        )
        decoder.feed([opening, *[[] for _ in range(rows - 1)]])
        steps = decoder.decode(min(length, context - len(opening)), end_ids=(BOUNDARY,), ended=set(range(1, rows)))
        with contextlib.suppress(FloatingPointError):
            for step in steps:
                drawn.append(step[0])
    stream = [*opening[1:], *(token for token in drawn if token != BOUNDARY)]
    return bytes(stream).decode(errors="replace")
