"""Documents: what is read from files, how they are split, and what is refused."""

import dataclasses
import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.corpus import BOUNDARY, Corpus, content_bytes, hold_out, load_corpus, standard_library

OPTIONS = {"vocab_size": 272, "text_field": "text", "token_dtype": "uint16", "end_token": None}


def whole(document) -> list[int]:
    return document.read(0, document.length).tolist()


def test_text_is_its_bytes_between_boundaries(tmp_path):
    content = "naïve — 漢字\r\n".encode() + b"\xff\xfe"  # not all of it UTF-8
    (tmp_path / "a.txt").write_bytes(content)
    (document,) = load_corpus(tmp_path / "a.txt", **OPTIONS).documents
    assert whole(document) == [BOUNDARY, *content, BOUNDARY]
    assert content_bytes(document) == content


@given(content=st.binary(min_size=1, max_size=20).filter(lambda b: b"\0" not in b), data=st.data())
def test_a_slice_is_the_slice_of_the_whole(tmp_path_factory, content, data):
    folder = tmp_path_factory.mktemp("slices")
    (folder / "a.txt").write_bytes(content)
    text = content.decode("latin1")
    (folder / "b.jsonl").write_text(json.dumps({"text": text}) + "\n")
    for document in load_corpus(folder, **OPTIONS).documents:
        start = data.draw(st.integers(0, document.length))
        stop = data.draw(st.integers(start, document.length))
        assert document.read(start, stop).tolist() == whole(document)[start:stop]


def test_directories_are_read_sorted_and_hidden_and_binary_files_left_out(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in {"b.txt": b"b", "a.md": b"a", "sub/c": b"c", ".git/x": b"x", "z.png": b"\0", "e": b""}.items():
        (tmp_path / name).write_bytes(content)
    corpus = load_corpus(tmp_path, **OPTIONS)
    assert [document.name for document in corpus.documents] == ["a.md", "b.txt", "sub/c"]
    assert corpus.skipped == 2


def test_jsonl_takes_the_named_field_and_skips_empty_texts(tmp_path):
    lines = [{"body": "één"}, {"body": ""}, {"body": "two"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    corpus = load_corpus(tmp_path / "a.jsonl", **{**OPTIONS, "text_field": "body"})
    assert [content_bytes(document).decode() for document in corpus.documents] == ["één", "two"]


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_token_files_are_cut_after_each_end_token(tmp_path, suffix):
    tokens = np.array([5, 6, 1, 1, 7, 8, 9, 1, 2, 3], np.uint16)
    path = tmp_path / f"tokens{suffix}"
    np.save(path, tokens) if suffix == ".npy" else tokens.tofile(path)
    corpus = load_corpus(path, **{**OPTIONS, "end_token": 1})
    assert not corpus.byte_level
    assert [whole(document) for document in corpus.documents] == [[5, 6, 1], [7, 8, 9, 1], [2, 3]]
    (document,) = load_corpus(path, **OPTIONS).documents
    assert whole(document) == tokens.tolist()


def test_uint32_tokens(tmp_path):
    np.array([70_000, 3], np.uint32).tofile(tmp_path / "a.bin")
    (document,) = load_corpus(
        tmp_path / "a.bin", **{**OPTIONS, "vocab_size": 80_000, "token_dtype": "uint32"}
    ).documents
    assert whole(document) == [70_000, 3]


def write_bad(kind: str, folder: Path) -> Path:
    path = folder / kind
    match kind:
        case "empty":
            path.mkdir()
        case "blank":
            path.mkdir()
            (path / "a.txt").touch()
        case "large.npy":
            np.save(path, np.array([1, 2, 300, 4]))
        case "negative.npy":
            np.save(path, np.array([1, -2]))
        case "floats.npy":
            np.save(path, np.ones(3))
        case "square.npy":
            np.save(path, np.ones((2, 2), int))
        case "garbage.npy":
            path.write_bytes(b"no array")
        case "odd.bin":
            path.write_bytes(b"abc")
        case "broken.jsonl":
            path.write_text('{"text": "a"}\n{"text": ')
        case "field.jsonl":
            path.write_text('{"body": "a"}\n')
        case "number.jsonl":
            path.write_text('{"text": 3}\n')
        case "mixed":
            path.mkdir()
            (path / "a.txt").write_text("a")
            np.save(path / "b.npy", np.array([1, 2]))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "which does not exist"),
        ("empty", "got no file"),
        ("blank", "got 1 file, all empty or binary"),
        ("large.npy", "ids from 0 to 271 .* got 300 at position 2"),
        ("negative.npy", "got -2 at position 1"),
        ("floats.npy", "got shape .* of float64"),
        ("square.npy", r"got shape \(2, 2\)"),
        ("garbage.npy", "NumPy cannot read"),
        ("odd.bin", "whole uint16 tokens .* got 3 bytes"),
        ("broken.jsonl", "line 2: expected a JSON object"),
        ("field.jsonl", "string field 'text'"),
        ("number.jsonl", "string field 'text'"),
        ("mixed", "either text or token files"),
    ],
)
def test_bad_data_is_refused_by_name(tmp_path, kind, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(write_bad(kind, tmp_path), **OPTIONS)


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied", "a.txt")

    monkeypatch.setattr(Path, "open", refuse)  # chmod would not stop root
    with pytest.raises(ValueError, match=r"expected readable files .* Permission denied"):
        load_corpus(tmp_path, **OPTIONS)


def test_the_standard_library_has_no_tests_and_no_packages():
    corpus = standard_library()
    names = [document.name for document in corpus.documents]
    assert names == sorted(names)
    assert "argparse.py" in names
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")[:-1]) for name in names)
    source = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
    assert content_bytes(corpus.documents[names.index("argparse.py")]) == source


@given(lengths=st.lists(st.integers(3, 50), min_size=2, max_size=30), fraction=st.floats(0.01, 0.9), seed=st.integers())
def test_holding_out_splits_by_document_and_depends_on_names_alone(memory_document, lengths, fraction, seed):
    documents = [memory_document(f"d{i}", (1,) * length) for i, length in enumerate(lengths)]
    train, heldout = hold_out(Corpus(tuple(documents), False), fraction)
    assert {*train.documents} | {*heldout.documents} == {*documents}
    assert not {*train.documents} & {*heldout.documents}
    assert train.documents
    assert heldout.documents
    if len(train.documents) > 1:  # enough is held out, and no document more than it takes
        assert heldout.num_tokens >= fraction * sum(lengths)
        assert heldout.num_tokens - fraction * sum(lengths) <= max(lengths)
    random.Random(seed).shuffle(documents)
    again = hold_out(Corpus(tuple(documents), False), fraction)[1]
    assert {*again.documents} == {*heldout.documents}


def test_a_lone_document_is_held_out_by_its_tail(memory_document):
    document = memory_document("only", tuple(range(100)))
    train, heldout = hold_out(Corpus((document,), False), 0.1)
    assert whole(train.documents[0]) == list(range(90))
    assert whole(heldout.documents[0]) == list(range(90, 100))
    with pytest.raises(ValueError, match="long enough"):
        hold_out(Corpus((memory_document("short", (1, 2, 3)),), False), 0.1)


def test_the_first_documents_up_to_a_number_of_tokens(memory_document):
    corpus = Corpus(tuple(memory_document(f"d{i}", (i,) * 10) for i in range(5)), False)
    assert [document.name for document in corpus.first(25).documents] == ["d0", "d1", "d2"]
    assert corpus.first(1000).documents == corpus.documents
    assert whole(corpus.first(4).documents[0]) == [0, 0, 0, 0]


def test_the_fingerprint_changes_with_names_and_sizes(memory_document):
    documents = tuple(memory_document(f"d{i}", (1,) * 5) for i in range(3))
    mark = Corpus(documents, False).fingerprint()
    assert Corpus(documents, False).fingerprint() == mark
    assert Corpus(documents[:2], False).fingerprint() != mark
    renamed = dataclasses.replace(documents[2], name="other")
    assert Corpus((*documents[:2], renamed), False).fingerprint() != mark
    longer = dataclasses.replace(documents[2], stream=(1,) * 6)
    assert Corpus((*documents[:2], longer), False).fingerprint() != mark
