"""Parquet and ArrayRecord: texts and tokens, and one line for what is damaged or holds neither."""

import builtins
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from training.corpus import load_corpus
from training.documents import content_bytes
from training.record_files import _Example

OPTIONS = {"vocab_size": 1000, "text_field": "text", "token_dtype": "uint16", "end_token": None}
TEXTS = ["naïve — 漢字", "", "two\nlines", "x" * 5000]


def write_records(path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def example(**features) -> bytes:
    message = _Example()
    for name, value in features.items():
        entry = message.features.feature.add(key=name)
        if isinstance(value, bytes):
            entry.value.bytes_list.value.append(value)
        elif isinstance(value[0], float):
            entry.value.float_list.value.extend(value)
        else:
            entry.value.int64_list.value.extend(value)
    return message.SerializeToString()


def write_texts(path, kind: str) -> None:
    match kind:
        case "string" | "large_string" | "binary":
            values = [text.encode() for text in TEXTS] if kind == "binary" else TEXTS
            table = pa.table({"id": range(4), "text": pa.array([*values], getattr(pa, kind)())})
            pq.write_table(table, path, row_group_size=2)
        case "dictionary":
            pq.write_table(pa.table({"text": pa.array(TEXTS).dictionary_encode()}), path)
        case "records":
            write_records(path, [text.encode() for text in TEXTS])
        case "examples":
            write_records(path, [example(n=[7], text=text.encode()) for text in TEXTS])


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary", "records", "examples"])
def test_texts(tmp_path, kind):
    name = "a.array_record" if kind in ("records", "examples") else "a.parquet"
    write_texts(tmp_path / name, kind)
    corpus = load_corpus(tmp_path, **OPTIONS)
    assert corpus.byte_level
    assert [content_bytes(document).decode() for document in corpus.documents] == [text for text in TEXTS if text]
    assert [document.name for document in corpus.documents] == [f"{name}#{i}" for i in (0, 2, 3)]
    assert str(corpus.left_out) == f"1 record without text ({name}#1)"
    document = corpus.documents[2]
    stream = document.read(0, document.length)
    for start, stop in ((0, 1), (0, 4), (2, 9), (4999, 5002), (5001, 5002), (3, 3)):
        assert document.read(start, stop).tolist() == stream[start:stop].tolist()


@pytest.mark.parametrize("name", ["a-train.array_record-00000-of-00002", "a.parquet-1-of-2", "A.PARQUET"])
def test_shards_and_capitals(tmp_path, name):
    write_texts(tmp_path / name, "records" if "record" in name else "string")
    assert [document.name for document in load_corpus(tmp_path, **OPTIONS).documents] == [
        f"{name}#{i}" for i in (0, 2, 3)
    ]


@pytest.mark.parametrize("kind", ["text.parquet", "input_ids.parquet", "tokens.array_record"])
def test_lists_of_token_ids(tmp_path, kind):
    column = kind.partition(".")[0]
    rows = [[5, 6, 7], [8], [1, 999]]
    if kind.endswith("parquet"):
        pq.write_table(pa.table({column: pa.array(rows, pa.list_(pa.int32()))}), tmp_path / kind)
    else:
        write_records(tmp_path / kind, [example(**{column: row}) for row in rows])
    corpus = load_corpus(tmp_path, **OPTIONS)
    assert not corpus.byte_level
    assert [document.read(0, document.length).tolist() for document in corpus.documents] == [[5, 6, 7], [1, 999]]
    assert corpus.documents[0].read(1, 2).tolist() == [6]
    assert str(corpus.left_out) == f"1 of a single token, which predicts nothing ({kind}#1)"
    with pytest.raises(ValueError, match=rf"{kind} record 2: expected token ids from 0 to 998 .* 999 at position 1"):
        load_corpus(tmp_path, **{**OPTIONS, "vocab_size": 999})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", pa.table({"body": ["a"]}), r"expected a column 'text' \(--text-field\), got 'body'"),
        ("a.parquet", pa.table({"text": [1.5]}), "expected texts or lists of token ids in column 'text' .* got double"),
        ("a.parquet", pa.table({"text": [["a"]]}), "expected texts or lists .* got list<"),
        ("a.parquet", pa.table({"text": pa.array([b"\xff"])}), "record 0: expected text in UTF-8"),
        ("a.parquet", pa.table({"text": pa.array([], pa.string())}), r"got none of them: 1 without records"),
        ("a.parquet", b"", "expected a whole Parquet file"),
        ("a.parquet", b"PAR1 and more PAR1", "expected a whole Parquet file"),
        ("a.array_record", b"", "expected a whole ArrayRecord file"),
        ("a.array_record", b"\0" * 70_000, "expected a whole ArrayRecord file"),
        ("a.array_record", [b"\xff\xfe"], "record 0: expected text in UTF-8"),
        ("a.array_record", [example(body=b"a")], "record 0: expected a column 'text' .* got 'body'"),
        ("a.array_record", [example(text=[0.5])], "record 0: expected one text or a list of token ids in 'text'"),
        ("a.array_record", [], r"got none of them: 1 without records"),
    ],
)
def test_what_holds_no_text_is_one_line(tmp_path, name, content, message):
    if isinstance(content, pa.Table):
        pq.write_table(content, tmp_path / name)
    elif isinstance(content, list):
        write_records(tmp_path / name, content)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_corpus(tmp_path, **OPTIONS)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("kind", ["a.parquet", "a.array_record"])
def test_damaged_files_are_one_line_or_read(tmp_path, kind):
    write_texts(tmp_path / kind, "records" if kind.endswith("record") else "string")
    whole = (tmp_path / kind).read_bytes()
    rng = random.Random(0)
    for case in range(40):
        damaged = bytearray(whole[: rng.randrange(len(whole))] if case % 2 else whole)
        for _ in range(case % 5):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / kind).write_bytes(damaged)
        said = ""
        try:
            load_corpus(tmp_path, **OPTIONS)
        except ValueError as error:
            said = str(error)
        assert "\n" not in said
        assert not said or kind in said


@pytest.mark.parametrize("suffix", [".parquet", ".array_record"])
def test_a_name_that_readers_cannot_take_is_refused(tmp_path, suffix):
    (tmp_path / f"caf\udce9{suffix}").write_bytes(b"any")
    with pytest.raises(ValueError, match=r"caf\\udce9.*: expected a name in UTF-8"):
        load_corpus(tmp_path, **OPTIONS)


def test_without_pyarrow_it_is_named(tmp_path, monkeypatch):
    write_texts(tmp_path / "a.parquet", "string")
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match="Parquet needs pyarrow, which is missing: pip install pyarrow"):
        load_corpus(tmp_path, **OPTIONS)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    write_texts(tmp_path / "a.parquet", "string")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no such folder"))
    with pytest.raises(ValueError, match=r"--data: expected room for a copy of the texts in .*TMPDIR"):
        load_corpus(tmp_path, **OPTIONS)


def test_ids_are_whole_numbers(tmp_path):
    pq.write_table(pa.table({"tokens": pa.array([[1, None, 2]], pa.list_(pa.int32()))}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="record 0: expected whole token ids, got float64 in the list"):
        load_corpus(tmp_path, **OPTIONS)
