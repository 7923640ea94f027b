"""JSONL: every line is read as it is, or refused with its number and the true cause."""

import dataclasses

import pytest

from training.corpus import load_corpus
from training.documents import content_bytes

OPTIONS = {"vocab_size": 257, "text_field": "text", "token_dtype": "uint16", "end_token": None}


def load(tmp_path, content: bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    return load_corpus(path, **OPTIONS)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a"),
        (b'{"n": [NaN, -Infinity, 1e999, -0], "text": "a"}', "a"),
        (b'{"text": "\\ud83d\\ude00"}', "😀"),
        (b'\xef\xbb\xbf{"text": "a"}\r', "a"),
        (b' \t{"text": "a\\u0000b"} ', "a\0b"),
        (b'{"text": "no", "text": "a"}', "a"),
    ],
)
def test_odd_lines_are_read(tmp_path, line, text):
    (document,) = load(tmp_path, line + b"\n\r\n \n").documents
    assert content_bytes(document).decode() == text
    assert document.read(2, 3).tolist() == [*text.encode()][1:2] or [256]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (rb'{"text": "bad \udcb2 here"}', r"lone surrogate \\udcb2 at its character 4"),
        (rb'{"text": "\ud83d"}', r"lone surrogate \\ud83d at its character 0"),
        (b'{"text": "caf\xe9"}', "byte 0xe9 at 13, which is not UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "byte 0xed at 10, which is not UTF-8"),
        (b'{"text": "a"', r"no JSON \(Expecting ',' delimiter at character 13\)"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "a", "x": ' + b'{"y": ' * 100_000, "nested too deeply"),
        (b'["text"]', "a list instead of an object"),
        (b'"text"', "a string instead of an object"),
        (b"null", "null instead of an object"),
        (b"1" * 5000, "a number instead of an object"),
        (b'{"text": ' + b"1" * 5000 + b"}", "a number in that field"),
        (b'{"text": true}', "a boolean in that field"),
        (b'{"text": null}', "null in that field"),
        (b'{"text": ["a"]}', "a list in that field"),
        (b'{"Text": "a", "body": 1}', "an object with the fields 'Text', 'body'"),
        (b"{}", "an object with the fields none"),
        (b'{"' + b"k" * 10_000 + b'": 1}', "an object with the fields 'kkk"),
        (b'{"text": "a"}{"text": "b"}', "no JSON .Extra data"),
        ('{"text": "a"}'.encode("utf-16"), "byte 0xff at 0, which is not UTF-8"),
        (b"x" * 1_000_000, "no JSON .Expecting value at character 0. in the line that begins 'xxx"),
    ],
)
def test_the_cause_is_named_in_a_short_line(tmp_path, line, cause):
    with pytest.raises(ValueError, match=rf"a.jsonl line 2: expected a JSON object .* got .*{cause}") as raised:
        load(tmp_path, b'{"text": "fine"}\n' + line + b"\n")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400 + len(str(tmp_path))


def test_empty_texts_and_files_are_counted(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b" \r\n\n")
    corpus = load(tmp_path, b'{"text": "fine"}\n{"text": ""}\n')
    assert str(corpus.left_out) == "1 JSONL line with an empty text (a.jsonl#2)"
    assert str(load_corpus(tmp_path, **OPTIONS).left_out).endswith("1 empty (b.jsonl)")


def test_a_file_that_changed_is_named(tmp_path):
    (document,) = load(tmp_path, b'{"text": "fine"}\n').documents
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "other than it was"}\n')
    with pytest.raises(OSError, match="had 4 bytes of text when the run began and has 17 now"):
        document.read(0, 3)
    (tmp_path / "b.jsonl").write_bytes(b"[]")
    document = dataclasses.replace(document, path=tmp_path / "b.jsonl")
    with pytest.raises(OSError, match=r"b.jsonl was changed since the run began: got a list instead of an object"):
        document.read(0, 3)
