"""The report's figures: bits, baselines, far context, sample."""

import dataclasses
import gzip
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.corpus import BOUNDARY, Corpus
from training.data import to_devices
from training.evaluate import far_context, gzip_bits, heldout_bits, sample_text, unigram_bits
from training.mesh import batch_sharding
from training.step import Trainer


@pytest.fixture(scope="module")
def trainer(small_config, one_device) -> Trainer:
    return Trainer(small_config, one_device)


@pytest.fixture(scope="module")
def params(trainer):
    return trainer.init(0).params


def text_corpus(memory_document, *contents: bytes) -> Corpus:
    documents = [memory_document(f"d{i}", (BOUNDARY, *content, BOUNDARY)) for i, content in enumerate(contents)]
    return Corpus(tuple(documents), byte_level=True)


@pytest.fixture(scope="module")
def corpus(memory_document) -> Corpus:
    rng = np.random.default_rng(0)
    return text_corpus(memory_document, *(rng.integers(32, 127, size, np.uint8).tobytes() for size in (700, 90, 300)))


def nll_by_hand(trainer, params, stream) -> np.ndarray:
    """Nats of each target of a stream that fits into one row."""
    length = trainer.config.input.seq_len
    count = len(stream) - 1
    row = {
        name: np.zeros((8, length), np.int32) for name in ("tokens", "targets", "segment_ids", "positions", "loss_mask")
    }
    row["tokens"][:, :count], row["targets"][:, :count] = stream[:-1], stream[1:]
    row["segment_ids"][:, :count], row["positions"][:, :count] = 1, np.arange(count)
    row["loss_mask"] = (row["segment_ids"] > 0).astype(np.float32)
    return np.asarray(trainer.token_nll(params, to_devices(row, batch_sharding(trainer.mesh), 8)))[0, :count]


def test_bits_are_per_byte_of_content_and_count_the_closing_boundary(trainer, params, memory_document):
    content = b"def f(x): return x + 1"
    nats = nll_by_hand(trainer, params, [BOUNDARY, *content, BOUNDARY]).sum()
    bits = heldout_bits(trainer, params, text_corpus(memory_document, content), overlap=0)
    assert bits == pytest.approx(nats / math.log(2) / len(content), rel=1e-5)


def test_an_overlap_gives_context_and_counts_nothing_twice(trainer, params, corpus):
    """Under a model that ignores the context, overlapping rows give the same bits as rows that do not."""
    blind = dict(params, final_norm={"scale": jnp.zeros_like(params["final_norm"]["scale"])})
    plain, overlapped = (heldout_bits(trainer, blind, corpus, overlap=overlap) for overlap in (0, 32))
    assert plain == pytest.approx(overlapped, rel=1e-6)
    targets = sum(document.length - 1 for document in corpus.documents)
    content = sum(document.length - 2 for document in corpus.documents)
    assert plain == pytest.approx(math.log2(272) * targets / content, rel=1e-5)
    assert heldout_bits(trainer, params, corpus, overlap=0) != heldout_bits(trainer, params, corpus, overlap=32)


def test_token_files_are_scored_per_token(trainer, params, memory_document):
    blind = dict(params, final_norm={"scale": jnp.zeros_like(params["final_norm"]["scale"])})
    tokens = Corpus((memory_document("t", tuple(range(100))),), byte_level=False)
    assert heldout_bits(trainer, blind, tokens, overlap=0) == pytest.approx(math.log2(272), rel=1e-5)


def test_baselines(memory_document):
    corpus = text_corpus(memory_document, b"aaab", b"abbb" * 100)
    counts = np.array([3 + 100, 1 + 300]) / 404
    assert unigram_bits(corpus) == pytest.approx(-(counts * np.log2(counts)).sum())
    sizes = len(gzip.compress(b"aaab", 9)) + len(gzip.compress(b"abbb" * 100, 9))
    assert gzip_bits(corpus) == pytest.approx(8 * sizes / 404)


def test_far_context_is_cut_off_and_nothing_else_changes(trainer, params, memory_document):
    """Each length scores as a document does that begins where its context ends; the whole scores as the text does."""
    content = np.random.default_rng(1).integers(32, 127, 200, np.uint8).tolist()
    document = memory_document("long", tuple(content))
    scores = far_context(trainer, params, Corpus((document,), byte_level=True))
    length, targets = 64, 8
    assert [score.context for score in scores] == [16, 32, 56]
    assert {(score.windows, score.targets) for score in scores} == {(3, 8)}
    for score in scores:
        begin = length - targets - score.context
        nats = [
            nll_by_hand(trainer, params, content[start + begin : start + length + 1])[-targets:].sum()
            for start in (0, 64, 128)
        ]
        # Rotary positions count distances alone, and the pattern's blocks are absolute: shift by whole blocks only.
        if begin % 16 == 0:
            assert score.bits == pytest.approx(np.mean(nats) / math.log(2) / targets, rel=2e-4)
        assert score.excess == pytest.approx(score.bits - scores[-1].bits, abs=1e-6)
    assert scores[-1].excess == 0


def test_far_tokens_do_not_reach_a_context_cut_short(trainer, params, memory_document):
    content = np.random.default_rng(2).integers(32, 127, 65, np.uint8)
    changed = content.copy()
    changed[:40] = 33  # the last 8 targets with 16 tokens of context see 40 and later
    scores = [
        far_context(trainer, params, Corpus((memory_document("d", tuple(text.tolist())),), byte_level=True))
        for text in (content, changed)
    ]
    assert scores[0][0].bits == scores[1][0].bits
    assert scores[0][-1].bits != scores[1][-1].bits
    assert scores[0][0].standard_error is None  # of one window


def test_short_texts_have_no_far_context(trainer, params, memory_document):
    assert far_context(trainer, params, text_corpus(memory_document, b"short")) == []


def test_a_sample_is_the_likeliest_continuation_at_temperature_0(trainer, params):
    text = sample_text(trainer, params, prompt="ab", length=6, temperature=0, seed=0)
    stream = [BOUNDARY, *b"ab"]
    for _ in range(6):
        padded = np.zeros((8, 64), np.int32)
        padded[:, : len(stream)] = stream
        batch = {"tokens": padded, "segment_ids": padded * 0, "positions": np.broadcast_to(np.arange(64), (8, 64))}
        stream.append(int(np.argmax(trainer.logits(params, batch)[0, len(stream) - 1, :257])))
    assert text == bytes(stream[1:]).decode(errors="replace")


def test_samples_are_the_seed_s(trainer, params):
    options = {"prompt": "def ", "length": 20, "temperature": 1.0}
    first, again, other = (sample_text(trainer, params, seed=seed, **options) for seed in (0, 0, 1))
    assert first == again != other
    assert first.startswith("def ")
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    assert sample_text(trainer, broken, seed=0, **options) == "def "


def test_a_long_prompt_leaves_room(trainer, params):
    text = sample_text(trainer, params, prompt="x" * 500, length=5, temperature=0, seed=0)
    assert text.startswith("x" * 32)
    assert not text.startswith("x" * 40)


def test_evaluation_over_a_mesh(small_config, trainer, params, corpus):
    from training.config import DeviceOptions
    from training.mesh import make_mesh

    config = dataclasses.replace(small_config, devices=DeviceOptions((2, 2, 2)))
    sharded = Trainer(config, make_mesh(config))
    sharded_params = sharded.init(0).params
    assert heldout_bits(sharded, sharded_params, corpus, overlap=32) == pytest.approx(
        heldout_bits(trainer, params, corpus, overlap=32), abs=1e-5
    )
    options = {"prompt": "def ", "length": 8, "temperature": 0, "seed": 0}
    assert sample_text(sharded, sharded_params, **options) == sample_text(trainer, params, **options)
