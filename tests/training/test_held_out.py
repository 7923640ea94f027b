"""Held out: the share of tokens that was asked for, at a sensible place, and nothing of it trained on."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.corpus import load_corpus
from training.documents import BOUNDARY, Corpus, TextDocument, content_bytes
from training.held_out import hold_out, named_splits, split

OPTIONS = {"vocab_size": 1000, "text_field": "text", "token_dtype": "uint16", "end_token": None}


def whole(document) -> list[int]:
    return document.read(0, document.length).tolist()


def streams(corpus: Corpus) -> dict[str, list[int]]:
    return {document.name: whole(document) for document in corpus.documents}


@given(
    lengths=st.lists(st.integers(2, 300), min_size=1, max_size=30),
    fraction=st.floats(1e-6, 0.999),
    seed=st.integers(),
)
def test_the_share_is_of_tokens_and_no_token_is_on_both_sides(memory_document, lengths, fraction, seed):
    starts = np.cumsum([0, *lengths]).tolist()
    documents = [memory_document(f"d{i}", tuple(range(starts[i], starts[i + 1]))) for i in range(len(lengths))]
    total = sum(lengths)
    if total < 4:
        with pytest.raises(ValueError, match="long enough"):
            hold_out(Corpus(tuple(documents), False), fraction)
        return
    train, heldout = hold_out(Corpus(tuple(documents), False), fraction)
    tokens = [token for corpus in (train, heldout) for document in corpus.documents for token in whole(document)]
    assert sorted(tokens) == list(range(total))
    assert all(document.length >= 2 for corpus in (train, heldout) for document in corpus.documents)
    assert train.documents
    assert heldout.documents
    # A document of two or three tokens cannot be cut.
    assert abs(heldout.num_tokens - fraction * total) <= 3
    random.Random(seed).shuffle(documents)
    again = hold_out(Corpus(tuple(documents), False), fraction)[1]
    assert streams(again) == streams(heldout)


@pytest.mark.parametrize("names", [("corpus.txt", "notes.md"), ("wiki.txt", "extra.txt"), ("train.txt", "readme.txt")])
def test_a_large_document_beside_a_small_one_is_not_held_out_whole(tmp_path, names):
    for name, size in zip(names, (300_000, 300), strict=True):
        (tmp_path / name).write_bytes(b"one line of text\n" * (size // 17))
    train, heldout = hold_out(load_corpus(tmp_path, **OPTIONS), 0.02)
    total = train.num_tokens + heldout.num_tokens
    assert 0.018 * total <= heldout.num_tokens <= 0.022 * total


def text_corpus(tmp_path, content: bytes) -> Corpus:
    (tmp_path / "a.txt").write_bytes(content)
    return load_corpus(tmp_path / "a.txt", **OPTIONS)


@pytest.mark.parametrize(
    ("unit", "starts"),
    [
        ("A paragraph of\nsome lines.\n\n", "A paragraph"),
        ("A line of text.\n", "A line"),
        ("words ", "words"),
        ("漢", "漢"),
        ("😀", "😀"),
    ],
)
def test_a_text_is_cut_at_a_paragraph_line_word_or_character(tmp_path, unit, starts):
    content = (unit * (40_000 // len(unit.encode()))).encode()
    train, heldout = hold_out(text_corpus(tmp_path, content), 0.0301)
    before, after = content_bytes(train.documents[0]), content_bytes(heldout.documents[0])
    assert before + after == content
    assert after.decode().startswith(starts)
    assert len(after) / len(content) == pytest.approx(0.0301, rel=0.11)


def test_bytes_that_are_no_text_are_cut_at_the_place_itself(tmp_path):
    train, heldout = hold_out(text_corpus(tmp_path, b"\x80" * 1000), 0.1)
    assert (train.num_tokens, heldout.num_tokens) == (902, 100)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("fraction", [1e-9, 0.5, 0.999])
def test_the_held_out_end_of_a_tiny_text_has_a_byte_to_predict(tmp_path, size, fraction):
    corpus = text_corpus(tmp_path, b"x" * size)
    if size < 3:
        with pytest.raises(ValueError, match=rf"--heldout: expected a text long enough .* got {size + 2} tokens"):
            hold_out(corpus, fraction)
        return
    train, heldout = hold_out(corpus, fraction)
    assert whole(heldout.documents[0])[-1] == BOUNDARY
    assert any(token != BOUNDARY for token in whole(heldout.documents[0])[1:])
    assert train.num_tokens >= 2


def test_one_of_several_tiny_texts_is_held_out_whole(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text("x")
    train, heldout = hold_out(load_corpus(tmp_path, **OPTIONS), 0.01)
    assert (len(train.documents), len(heldout.documents)) == (2, 1)


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), tokens=st.integers(0, 200))
def test_the_first_tokens_are_no_more_than_asked_for(memory_document, sizes, tokens):
    corpus = Corpus(tuple(memory_document(f"d{i}", (i,) * (size + 1)) for i, size in enumerate(sizes)), False)
    first = corpus.first(tokens)
    everything = [token for document in corpus.documents for token in whole(document)]
    got = [token for document in first.documents for token in whole(document)]
    assert got == everything[: len(got)]
    assert min(max(tokens, 2) - 1, len(everything)) <= len(got) <= max(tokens, 2)  # a single token predicts nothing
    assert all(document.length >= 2 for document in first.documents)


# ---------------------------------------------------------------------------------------------------------------------
# Splits by name


def names_of(corpus: Corpus) -> list[str]:
    return [document.name for document in corpus.documents]


def test_val_bin_beside_train_bin_is_what_is_held_out(tmp_path):
    np.arange(500, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(40, dtype=np.uint16).tofile(tmp_path / "val.bin")
    train, heldout, how = split(load_corpus(tmp_path, **OPTIONS), 0.02, by_name=True)
    assert (names_of(train), names_of(heldout)) == (["train.bin[0:500]"], ["val.bin[0:40]"])
    assert how.startswith("40 tokens (7.41%), 1 document, such as val.bin[0:40], as named (--no-named-splits")
    train, heldout, how = split(load_corpus(tmp_path, **OPTIONS), 0.02, by_name=False)
    assert heldout.num_tokens == 11
    assert "as named" not in how


def test_folders_and_shards_are_splits_too_and_a_test_split_is_left_out(tmp_path):
    for name in ("data/train-00000-of-00001.jsonl", "validation/a.jsonl", "train/b.jsonl", "test/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "some"}\n{"text": "more"}\n')
    splits = named_splits(load_corpus(tmp_path, **OPTIONS))
    assert splits is not None
    train, heldout = splits
    assert names_of(heldout) == ["validation/a.jsonl#1", "validation/a.jsonl#2"]
    assert len(train.documents) == 4
    assert str(train.left_out) == "1 of a test split (test/a.jsonl)"


@pytest.mark.parametrize(
    ("names", "heldout"),
    [
        (("train.txt", "test.txt"), ["test.txt"]),
        (("Train.txt", "DEV.txt"), ["DEV.txt"]),
        (("c4-train-00-of-02.txt", "c4-train-01-of-02.txt", "c4-val-00-of-01.txt"), ["c4-val-00-of-01.txt"]),
        (("my_train_set.txt", "my_valid_set.txt", "notes.txt"), ["my_valid_set.txt"]),
        (("a/training/x.txt", "a/testing/y.md"), ["a/testing/y.md"]),
        (("train.txt", "requirements-dev.txt"), None),  # no pair
        (("a/train.txt", "b/val.txt"), None),
        (("trainer.txt", "value.txt"), None),  # other words
        (("train.py", "test.py"), None),  # source code
        (("val.txt", "other.txt"), None),  # nothing says what to train on
        (("train.txt", "a.txt"), None),
    ],
)
def test_names_that_are_splits(tmp_path, names, heldout):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("some text")
    splits = named_splits(load_corpus(tmp_path, **OPTIONS))
    assert (None if splits is None else names_of(splits[1])) == heldout


def test_a_split_survives_any_suffix_of_names(tmp_path):
    """A file whose own name ends as a place in a file does is itself."""
    for name in ("train#1.txt", "val[0:5]", "train.txt"):
        (tmp_path / name).write_text("some text")
    corpus = load_corpus(tmp_path, **OPTIONS)
    assert all(isinstance(document, TextDocument) for document in corpus.documents)
    assert named_splits(corpus) is None
