"""Documents: what is read from files, what is left out, and what is refused."""

import dataclasses
import gzip
import json
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.corpus import BOUNDARY, Corpus, content_bytes, load_corpus, standard_library
from training.left_out import shown

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
    assert corpus.left_out.reasons == {"hidden": (1, ".git"), "binary": (1, "z.png"), "empty": (1, "e")}


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
        ("empty", "got an empty directory"),
        ("blank", r"got none of them: 1 empty \(a.txt\)"),
        ("large.npy", "ids from 0 to 271 .* got 300 at position 2"),
        ("negative.npy", "got -2 at position 1"),
        ("floats.npy", "got shape .* of float64"),
        ("square.npy", r"got shape \(2, 2\)"),
        ("garbage.npy", "expected a NumPy array of token ids, got no such file"),
        ("odd.bin", "whole uint16 tokens .* got 3 bytes"),
        ("broken.jsonl", "line 2: expected a JSON object"),
        ("field.jsonl", "string field 'text'"),
        ("number.jsonl", "string field 'text'"),
        ("mixed", r"either text or token files .* got both: a.txt and b.npy\[0:2\]"),
    ],
)
def test_bad_data_is_refused_by_name(tmp_path, kind, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(write_bad(kind, tmp_path), **OPTIONS)


def test_an_unreadable_file_is_counted_and_alone_refused(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("a")
    opened = Path.open

    def refuse(path, *args, **kwargs):  # chmod would not stop root
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    corpus = load_corpus(tmp_path, **OPTIONS)
    assert [document.name for document in corpus.documents] == ["b.txt"]
    assert str(corpus.left_out) == "1 unreadable: Permission denied (a.txt)"
    with pytest.raises(ValueError, match=r"got none of them: 1 unreadable: Permission denied"):
        load_corpus(tmp_path / "a.txt", **OPTIONS)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (gzip.compress(b"a text", mtime=0), "compressed by gzip, to be unpacked first"),
        ("a text".encode("utf-16"), "in UTF-16 instead of UTF-8"),
        (b"%PDF-1.7 a text", "binary"),
    ],
)
def test_files_that_only_look_like_text_are_left_out(tmp_path, content, reason):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=f"got none of them: 1 {reason}"):
        load_corpus(tmp_path / "a", **OPTIONS)


def test_suffixes_are_known_in_capitals_too(tmp_path):
    np.array([3, 4], np.uint16).tofile(tmp_path / "A.BIN")
    assert whole(load_corpus(tmp_path, **OPTIONS).documents[0]) == [3, 4]


def test_a_name_that_is_not_utf8_has_a_fingerprint_and_is_shown_escaped(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    path.write_text("a text")
    corpus = load_corpus(tmp_path, **OPTIONS)
    assert corpus.fingerprint()
    assert shown(corpus.documents[0].name) == r"caf\udce9.txt"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 empty \(caf\\udce9.txt\)"):
        load_corpus(tmp_path, **OPTIONS)


def test_the_standard_library_has_no_tests_and_no_packages():
    corpus = standard_library()
    names = [document.name for document in corpus.documents]
    assert names == sorted(names)
    assert "argparse.py" in names
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")[:-1]) for name in names)
    source = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
    assert content_bytes(corpus.documents[names.index("argparse.py")]) == source


def test_the_fingerprint_changes_with_names_and_sizes(memory_document):
    documents = tuple(memory_document(f"d{i}", (1,) * 5) for i in range(3))
    mark = Corpus(documents, False).fingerprint()
    assert Corpus(documents, False).fingerprint() == mark
    assert Corpus(documents[:2], False).fingerprint() != mark
    renamed = dataclasses.replace(documents[2], name="other")
    assert Corpus((*documents[:2], renamed), False).fingerprint() != mark
    longer = dataclasses.replace(documents[2], stream=(1,) * 6)
    assert Corpus((*documents[:2], longer), False).fingerprint() != mark
