"""A fuzz of data directories and damaged files: read, or refused in one line; every file used or counted."""

import contextlib
import dataclasses
import io
import json
import os
import random
import re
import resource
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from train import load_data
from training import corpus as corpus_module
from training.config import Config, recipe
from training.corpus import load_corpus
from training.left_out import LeftOut
from training.packing import PackedRows

WORDS = ["alpha", "naïve", "漢字", "😀", "line\nbreak", "\r\n\r\n", "tab\t", "", "x" * 300, "\ufeff", "\u2028", "'\"\\"]
NAMES = [
    "a",
    "b.txt",
    "c.md",
    "train",
    "val",
    "test",
    "sp ace",
    "new\nline",
    "caf\udce9",
    "-x",
    "#1",
    "x[0:2]",
    "é" * 40,
]
SUFFIXES = ["", ".txt", ".jsonl", ".npy", ".bin", ".parquet", ".array_record", ".JSONL", ".gz", ".py", ".ndjson"]


class Templates:
    """Whole files of the formats that take long to write."""

    def __init__(self, folder: Path):
        texts = pa.table({"text": ["one text", "", "a second\n\ntext"], "n": [1, 2, 3]})
        pq.write_table(texts, folder / "t", row_group_size=2)
        self.parquet = [(folder / "t").read_bytes()]
        pq.write_table(pa.table({"tokens": pa.array([[1, 2, 3], [4], [300, 5]], pa.list_(pa.int32()))}), folder / "t")
        self.parquet.append((folder / "t").read_bytes())
        writer = ArrayRecordWriter(str(folder / "r"), "group_size:1")
        for record in (b"one text", b"", "zwei Töne".encode()):
            writer.write(record)
        writer.close()
        self.records = (folder / "r").read_bytes()


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> Templates:
    return Templates(tmp_path_factory.mktemp("templates"))


def text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randrange(60)))


def jsonl(rng: random.Random) -> bytes:
    good = [json.dumps({"text": text(rng), "n": rng.random()}).encode() for _ in range(rng.randrange(6))]
    odd = [
        b"", b"\r", b'{"text": 3}', b"[]", b"null", rb'{"text": "\udcb2"}', b'{"text": "\xff"}', b'{"body": "a"}', b"{",
        b'{"n": ' + b"9" * 5000 + b', "text": "a"}', b"[" * 3000, b'{"text": NaN}', b'{"text": "a"} {}', b"\0",
    ]  # fmt: skip
    lines = good + rng.choices(odd, k=rng.choice([0, 0, 0, 0, 0, 0, 1, 2]))
    rng.shuffle(lines)
    return rng.choice([b"", b"", b"\xef\xbb\xbf"]) + b"\n".join(lines) + rng.choice([b"", b"\n"])


def array(rng: random.Random) -> bytes:
    shape = rng.choice([(rng.randrange(50),)] * 8 + [(3, 3), (), (1,), (2,)])
    kind = rng.choice(["<u2", "<i8", ">i4", "|u1", "<i4", "<u2"] * 3 + ["<f4", "|b1", "O", "<U3"])
    values = np.array(rng.choices(range(-1 if rng.random() < 0.05 else 0, 250), k=int(np.prod(shape))))
    file = io.BytesIO()
    np.lib.format.write_array(file, values.reshape(shape).astype(kind), rng.choice([(1, 0), (2, 0), (3, 0)]))
    return file.getvalue()


def content(rng: random.Random, suffix: str, templates: Templates) -> bytes:
    """Bytes that are mostly, but not always, those of the suffix."""
    kind = suffix if rng.random() < 0.97 else rng.choice(SUFFIXES)
    match kind.lower():
        case ".jsonl" | ".ndjson":
            return jsonl(rng)
        case ".npy":
            return array(rng)
        case ".bin":
            return np.array(rng.choices(range(260), k=rng.randrange(60)), np.uint16).tobytes()
        case ".parquet":
            return rng.choice(templates.parquet)
        case ".array_record":
            return templates.records
        case ".gz":
            return b"\x1f\x8b" + rng.randbytes(20)
    return rng.choice([text(rng).encode(), rng.randbytes(rng.randrange(200)), b"", text(rng).encode("utf-16")])


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Cut, or with some bytes changed, put in, repeated or taken out."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0:
                changed = changed[:place]
            case 1:
                changed[place : place + 1] = rng.randbytes(1)
            case 2:
                changed[place:place] = rng.choice(
                    [b"\0", b"\n", b"[", b"(", b'"', b"\xff" * 8, b"9" * 30, b"{'", b"-1"]
                )
            case 3:
                changed[place:place] = changed[place : place + rng.randrange(40)]
            case 4:
                del changed[place : place + rng.randrange(1, 10)]
    return bytes(changed)


def make_directory(rng: random.Random, root: Path, templates: Templates) -> None:
    """Files, folders, links, pipes and hidden things, any of them odd."""
    root.mkdir()
    folders = [root]
    flavour = rng.choice(
        [SUFFIXES, [".txt", "", ".jsonl", ".py"], [".txt", ""], [".jsonl", ".parquet"], [".bin", ".npy"]]
    )
    for _ in range(rng.choice([0, 1, 1, 2, 3, 5, 8])):
        suffix = rng.choice(flavour)
        path = rng.choice(folders) / (rng.choice(NAMES) + suffix)
        with contextlib.suppress(FileExistsError, IsADirectoryError, OSError):  # a name that is taken, or a broken link
            match rng.choices(["file", "folder", "link", "hidden", "pipe", "twin"], [14, 2, 3, 1, 0.5, 1])[0]:
                case "file":
                    data = content(rng, suffix, templates)
                    path.write_bytes(damaged(rng, data) if rng.random() < 0.05 else data)
                case "folder":
                    path.mkdir()
                    folders.append(path)
                case "link":
                    targets = [*root.rglob("*"), root, Path("nowhere"), Path("."), path]
                    path.symlink_to(rng.choice(targets))
                case "hidden":
                    (path.parent / f".{path.name}").write_text("hidden")
                case "pipe":
                    os.mkfifo(path)
                case "twin":
                    os.link(rng.choice([p for p in root.rglob("*") if p.is_file()] or [path]), path)


def options(rng: random.Random, path: Path) -> Config:
    config = recipe("tiny")
    values = dataclasses.replace(
        config.input,
        seq_len=rng.choice([2, 16, 1024]),
        batch_size=1,
        heldout=rng.choice([0.02, 0.02, 1e-9, 0.5, 0.999]),
        heldout_tokens=rng.choice([1, 2, 10, 150_000]),
        named_splits=rng.random() < 0.5,
        text_field=rng.choice(["text"] * 8 + ["body", "é"]),
        token_dtype=rng.choice(["uint16"] * 5 + ["uint32"]),
        end_token=rng.choice([None] * 12 + [0, 5]),
    )
    model = dataclasses.replace(config.model, vocab_size=rng.choice([272, 300, 1000, 1000, 70_000, 70_000, 256]))
    return dataclasses.replace(config, model=model, data=str(path), input=values)


@dataclasses.dataclass
class Recording(LeftOut):
    """Keeps every name, not only the first of a kind."""

    names: list[str] = dataclasses.field(default_factory=list)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        super().add(reason, name, count)
        self.names.append(name)


def entries(root: Path) -> list[str]:
    """Every name that is no folder, and every link and hidden name; links are not gone into."""
    found = []
    for folder, subfolders, files in os.walk(root):
        apart = [name for name in subfolders if name.startswith(".") or Path(folder, name).is_symlink()]
        subfolders[:] = [name for name in subfolders if name not in apart]
        found += [Path(folder, name).relative_to(root).as_posix() for name in [*files, *apart]]
    return found


def silently_left_out(root: Path, recorded: Recording, used: tuple[str, ...]) -> list[str]:
    named = {*used, *recorded.names, *(re.sub(r"(#\d+|\[\d+:\d+\])$", "", name) for name in recorded.names)}
    return [name for name in entries(root) if name not in named and not any(n.startswith(f"{name}/") for n in named)]


def run_case(seed: int, folder: Path, templates: Templates, monkeypatch) -> str:
    """One directory through the program's loading.

    Returns:
        "read", or the kind of refusal.
    """
    rng = random.Random(seed)
    root = folder / str(seed)
    make_directory(rng, root, templates)
    files = [path for path in root.rglob("*") if path.is_file()]
    path = rng.choice(files) if files and rng.random() < 0.2 else root
    config = options(rng, path)
    recorded: list[Recording] = []

    def record() -> Recording:
        recorded.append(Recording())
        return recorded[-1]

    monkeypatch.setattr(corpus_module, "LeftOut", record)
    given = config.input
    kwargs = {
        "vocab_size": config.model.vocab_size,
        "text_field": given.text_field,
        "token_dtype": given.token_dtype,
        "end_token": given.end_token,
    }
    printed = io.StringIO()
    try:
        corpus = load_corpus(path, **kwargs)
        missing = silently_left_out(root, recorded[0], corpus.files) if path == root else []
        assert not missing, f"seed {seed}: not used and not counted: {missing}"
        with contextlib.redirect_stdout(printed):
            train, heldout = load_data(config, None)
    except ValueError as error:
        said = str(error)
        assert "\n" not in said, f"seed {seed}: {said!r}"
        assert len(said) < 900 + len(str(path)), f"seed {seed}: {said!r}"
        return f"refused: {kind_of(said)}"
    assert (str(recorded[-1]) in printed.getvalue()) or not recorded[-1], f"seed {seed}"
    for part in (train, heldout):
        rows = PackedRows(part, given.seq_len)
        pairs = sum(int(rows[i]["loss_mask"].sum()) for i in range(min(len(rows), 3000)))
        assert pairs == rows.num_pairs or len(rows) > 3000, f"seed {seed}"
        assert all(rows[i]["tokens"].max() < config.model.vocab_size for i in range(min(len(rows), 20))), f"seed {seed}"
    return "read"


def kind_of(message: str) -> str:
    """The words of a message without its names and numbers."""
    found = re.search(r"expected ([\w\- ]+)", message)
    return " ".join(found[1].split()[:6]) if found else message[:40]


@contextlib.contextmanager
def within_limits(seed: int):
    """At most ten seconds, and a gigabyte more than before."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - began < 10, f"seed {seed}"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, f"seed {seed}"  # KiB


def fuzz_directories(seeds: range, folder: Path, templates: Templates, monkeypatch) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        with within_limits(seed):
            outcomes[run_case(seed, folder, templates, monkeypatch)] += 1
    return outcomes


def test_some_data_directories(tmp_path, templates, monkeypatch):
    outcomes = fuzz_directories(range(60), tmp_path, templates, monkeypatch)
    assert outcomes["read"] >= 10
    assert outcomes.total() - outcomes["read"] >= 10


@pytest.mark.slow
def test_two_thousand_data_directories(tmp_path, templates, monkeypatch):
    outcomes = fuzz_directories(range(1000, 3000), tmp_path, templates, monkeypatch)
    print("\n".join(f"{count:6} {kind}" for kind, count in outcomes.most_common()))
    assert outcomes.total() == 2000
    assert outcomes["read"] >= 400


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files


def read_or_refused(seed: int, folder: Path, templates: Templates) -> str:
    """One damaged file through the loading."""
    rng = random.Random(seed)
    suffix = rng.choice([".jsonl", ".npy", ".bin", ".jsonl", ".npy", ".bin", ".parquet", ".array_record"])
    path = folder / f"{seed}{suffix}"
    path.write_bytes(damaged(rng, content(rng, suffix, templates)))
    try:
        corpus = load_corpus(
            path,
            vocab_size=rng.choice([300, 70_000]),
            text_field="text",
            token_dtype=rng.choice(["uint16", "uint32"]),
            end_token=rng.choice([None, 0]),
        )
    except ValueError as error:
        said = str(error)
        assert "\n" not in said, f"seed {seed}: {said!r}"
        assert len(said) < 700 + len(str(path)), f"seed {seed}: {said!r}"
        return f"{suffix} refused"
    for document in corpus.documents:
        stream = document.read(0, document.length)
        assert len(stream) == document.length, f"seed {seed}"
        assert stream.min() >= 0, f"seed {seed}"
        assert stream.max() < 70_000, f"seed {seed}"
    return f"{suffix} read"


def test_some_damaged_files(tmp_path, templates):
    outcomes = Counter(read_or_refused(seed, tmp_path, templates) for seed in range(100))
    assert len(outcomes) >= 6


@pytest.mark.slow
def test_thousands_of_damaged_files(tmp_path, templates):
    outcomes: Counter[str] = Counter()
    for seed in range(1000, 3500):
        with within_limits(seed):
            outcomes[read_or_refused(seed, tmp_path, templates)] += 1
    print("\n".join(f"{count:6} {kind}" for kind, count in outcomes.most_common()))
    assert outcomes.total() == 2500
