"""Packing: every pair of neighbouring tokens once, in order, and none across two documents."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.corpus import Corpus
from training.packing import PackedRows

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=12)


def corpus_of(memory_document, lengths) -> Corpus:
    """Documents whose tokens all differ, so that a pair tells where it comes from."""
    starts = np.cumsum([0, *lengths]).tolist()
    streams = [tuple(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]
    return Corpus(tuple(memory_document(f"d{i}", stream) for i, stream in enumerate(streams)), False)


def pairs_of(corpus: Corpus) -> list[tuple[int, int]]:
    return [pair for d in corpus.documents for pair in zip(d.stream[:-1], d.stream[1:], strict=True)]


@given(lengths=LENGTHS, length=st.integers(2, 16), overlap=st.integers(0, 15))
def test_every_pair_counts_exactly_once_and_in_order(memory_document, lengths, length, overlap):
    corpus = corpus_of(memory_document, lengths)
    rows = PackedRows(corpus, length, overlap=min(overlap, length - 1))
    counted = []
    for i in range(len(rows)):
        row = rows[i]
        mask = row["loss_mask"] == 1
        counted += zip(row["tokens"][mask].tolist(), row["targets"][mask].tolist(), strict=True)
    assert counted == pairs_of(corpus)


@given(lengths=LENGTHS, length=st.integers(2, 16), overlap=st.integers(0, 15))
def test_segments_are_documents_and_positions_start_anew(memory_document, lengths, length, overlap):
    corpus = corpus_of(memory_document, lengths)
    owner = {token: i for i, document in enumerate(corpus.documents) for token in document.stream}
    rows = PackedRows(corpus, length, overlap=min(overlap, length - 1))
    for i in range(len(rows)):
        row = rows[i]
        used = row["segment_ids"] > 0
        assert row["segment_ids"][used].tolist() == sorted(row["segment_ids"][used])
        assert not row["loss_mask"][~used].any()
        assert not used[np.argmin(used) :].any() or used.all()  # padding only at the end
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            tokens = row["tokens"][here]
            assert len({owner[token] for token in [*tokens, *row["targets"][here]]}) == 1
            assert tokens.tolist() == list(range(tokens[0], tokens[0] + len(tokens)))  # contiguous
            assert row["positions"][here].tolist() == list(range(len(tokens)))


def test_only_the_last_row_is_padded(memory_document):
    rows = PackedRows(corpus_of(memory_document, [9, 5, 30, 2, 7]), 8)
    assert [int((rows[i]["segment_ids"] > 0).sum()) for i in range(len(rows))] == [8] * (len(rows) - 1) + [48 - 8 * 5]


def test_shapes_and_types(memory_document):
    row = PackedRows(corpus_of(memory_document, [9, 5]), 8)[1]
    assert {name: (array.shape, str(array.dtype)) for name, array in row.items()} == {
        **dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), ((8,), "int32")),
        "loss_mask": ((8,), "float32"),
    }


def test_an_overlap_must_leave_something_new(memory_document):
    with pytest.raises(ValueError, match="overlap from 0 to 7, got 8"):
        PackedRows(corpus_of(memory_document, [9]), 8, overlap=8)
