"""Documents to train on: text files, JSONL, token files, or the interpreter's own standard library.

A document is a *stream* of token ids. Byte-level documents open and close with `BOUNDARY`, so that their first byte is
predicted too and a sample can end; a token file is taken as it is. Nothing is read until a slice of it is asked for.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int

BOUNDARY = 256  # opens and closes every byte-level document
BYTE_VOCAB = 257
TOKEN_SUFFIXES = (".npy", ".bin")
_SCAN = 1 << 24  # tokens looked at together while a token file is checked


class Document(Protocol):
    """A stream of token ids that can be read by slices."""

    @property
    def name(self) -> str:
        """Names the document among its corpus, the same on every machine."""
        ...

    @property
    def length(self) -> int:
        """Tokens in the stream, boundaries included."""
        ...

    def read(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Tokens `start` to `stop` of the stream, int32."""
        ...


@dataclass(frozen=True)
class Corpus:
    """Documents of one kind: byte-level (the ids are bytes and `BOUNDARY`) or ready-made tokens."""

    documents: tuple[Document, ...]
    byte_level: bool
    skipped: int = 0  # files left out because they hold no text

    @property
    def num_tokens(self) -> int:
        return sum(document.length for document in self.documents)

    def first(self, tokens: int) -> Corpus:
        """The documents that hold the first `tokens` tokens; the last of them may go on beyond, a lone one is cut."""
        count = int(np.searchsorted(np.cumsum([document.length for document in self.documents]), tokens)) + 1
        documents = self.documents[:count]
        if len(documents) == 1 and documents[0].length > tokens:
            documents = (Part(documents[0], 0, max(tokens, 2)),)
        return Corpus(documents, self.byte_level, self.skipped)

    def fingerprint(self) -> str:
        """Changes when a document is added, taken away, renamed or resized."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(f"{document.name}\0{document.length}\n".encode())
        return digest.hexdigest()[:16]


def _enclose(content: bytes, start: int, stop: int, size: int) -> Int[np.ndarray, " n"]:
    """Stream tokens start:stop of a document of `size` bytes, of which `content` are the bytes asked for."""
    parts = [np.frombuffer(content, np.uint8).astype(np.int32)]
    if start == 0 < stop:
        parts.insert(0, np.full(1, BOUNDARY, np.int32))
    if stop == size + 2 > start:
        parts.append(np.full(1, BOUNDARY, np.int32))
    return np.concatenate(parts)


@dataclass(frozen=True)
class TextDocument:
    """The bytes of one file, as they are."""

    name: str
    path: Path
    size: int

    @property
    def length(self) -> int:
        return self.size + 2

    def read(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        first, last = max(start - 1, 0), min(stop - 1, self.size)
        with self.path.open("rb") as file:
            file.seek(first)
            content = file.read(max(last - first, 0))
        if len(content) != max(last - first, 0):
            raise ValueError(f"{self.path} had {self.size} bytes when the run began and is shorter now")
        return _enclose(content, start, stop, self.size)


@dataclass(frozen=True)
class JsonlDocument:
    """The text field of one line of a JSONL file, encoded as UTF-8."""

    name: str
    path: Path
    offset: int  # of the line, bytes
    field: str
    size: int  # of the encoded text, bytes

    @property
    def length(self) -> int:
        return self.size + 2

    def read(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        content = _jsonl_text(self.path, self.offset, self.field)
        return _enclose(content[max(start - 1, 0) : max(stop - 1, 0)], start, stop, self.size)


@functools.lru_cache(maxsize=64)  # the rows of one long line come one after another only in evaluation; keep a few
def _jsonl_text(path: Path, offset: int, field: str) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return json.loads(file.readline())[field].encode()


@dataclass(frozen=True, eq=False)
class TokenDocument:
    """Tokens `start` to `stop` of a memory-mapped token file."""

    name: str
    tokens: Int[np.ndarray, " n"]
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def read(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        return self.tokens[self.start + start : self.start + stop].astype(np.int32)


@dataclass(frozen=True)
class Part:
    """A slice of a document's stream: a corpus of one document is held out by its tail."""

    whole: Document
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.whole.name}[{self.start}:{self.stop}]"

    @property
    def length(self) -> int:
        return self.stop - self.start

    def read(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        return self.whole.read(self.start + start, self.start + stop)


def content_bytes(document: Document) -> bytes:
    """What a byte-level document says, without its boundaries."""
    stream = document.read(0, document.length)
    return stream[stream < BOUNDARY].astype(np.uint8).tobytes()


def standard_library() -> Corpus:
    """The running interpreter's own library sources: real text that every machine has.

    Tests are left out (they hold tables of odd characters), and so is site-packages, which differs between machines.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = sorted(p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts[:-1]))
    documents = tuple(TextDocument(p.relative_to(root).as_posix(), p, p.stat().st_size) for p in paths)
    documents = tuple(document for document in documents if document.size)
    if not documents:
        raise ValueError(f"expected the standard library's sources in {root}, got no .py file; name a text with --data")
    return Corpus(documents, byte_level=True)


def load_corpus(path: Path, *, vocab_size: int, text_field: str, token_dtype: str, end_token: int | None) -> Corpus:
    """The documents under `path`: a file, or a directory taken with all below it, hidden files left out.

    Args:
        path: text file (any suffix), `.jsonl`, `.npy` or `.bin` (raw tokens), or a directory of these.
        vocab_size: the ids of token files must lie below it.
        text_field: the field of a JSONL line that holds its text.
        token_dtype: "uint16" or "uint32", of a `.bin` file.
        end_token: the id that closes a document in a token file; None takes each file as one document.

    Raises:
        ValueError: no such path, nothing readable in it, text and tokens mixed, a malformed line, an id too large.
    """
    if not path.exists():
        raise ValueError(f"--data: expected a file or a directory, got {path}, which does not exist")
    root = path if path.is_dir() else path.parent
    try:
        files = sorted(_visible_files(path)) if path.is_dir() else [path]
        documents: list[Document] = []
        skipped = 0
        for file in files:
            name = file.relative_to(root).as_posix()
            if file.suffix in TOKEN_SUFFIXES:
                documents += _token_documents(file, name, vocab_size, token_dtype, end_token)
            elif file.suffix == ".jsonl":
                documents += _jsonl_documents(file, name, text_field)
            elif _is_text(file):
                documents += [TextDocument(name, file, file.stat().st_size)]
            else:
                skipped += 1
    except OSError as error:
        raise ValueError(f"--data: expected readable files in {path}, got {error}") from error
    if not documents:
        what = f"{len(files)} file{'s' * (len(files) != 1)}, all empty or binary" if files else "no file"
        raise ValueError(f"--data: expected text, .jsonl, .npy or .bin in {path}, got {what}")
    kinds = {isinstance(document, TokenDocument) for document in documents}
    if len(kinds) > 1:
        raise ValueError(f"--data: expected either text or token files in {path}, got both")
    return Corpus(tuple(documents), not kinds.pop(), skipped)


def _visible_files(directory: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:  # os.walk passes over what it cannot list, silently
        raise error

    for folder, subfolders, names in os.walk(directory, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _is_text(path: Path) -> bool:
    """Whether a file holds something and no NUL byte early on (as git tells binary files)."""
    with path.open("rb") as file:
        head = file.read(8192)
    return bool(head) and b"\0" not in head


def _jsonl_documents(path: Path, name: str, field: str) -> list[Document]:
    documents: list[Document] = []
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    text = json.loads(line)[field]
                    size = len(text.encode())
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"{path} line {number}: expected a JSON object with a string field {field!r} (--text-field), "
                        f"got {line[:60].decode(errors='replace').strip()!r}"
                    ) from error
                if size:
                    documents.append(JsonlDocument(f"{name}#{number}", path, offset, field, size))
            offset += len(line)
    return documents


def _token_documents(path: Path, name: str, vocab_size: int, dtype: str, end_token: int | None) -> list[Document]:
    tokens = _map_tokens(path, dtype)
    ends: list[np.ndarray] = []
    for start in range(0, tokens.size, _SCAN):
        chunk = tokens[start : start + _SCAN]
        if chunk.max() >= vocab_size or chunk.min() < 0:
            place = int(np.flatnonzero((chunk >= vocab_size) | (chunk < 0))[0])
            raise ValueError(
                f"{path}: expected token ids from 0 to {vocab_size - 1} (the vocabulary is {vocab_size}), "
                f"got {chunk[place]} at position {start + place}"
            )
        if end_token is not None:
            ends.append(np.flatnonzero(chunk == end_token) + start + 1)
    stops = np.unique(np.concatenate([*ends, [tokens.size]])).astype(int).tolist()
    starts = [0, *stops[:-1]]
    # A document of one token predicts nothing.
    spans = [(start, stop) for start, stop in zip(starts, stops, strict=True) if stop - start > 1]
    return [TokenDocument(f"{name}[{start}:{stop}]", tokens, start, stop) for start, stop in spans]


def _map_tokens(path: Path, dtype: str) -> Int[np.ndarray, " n"]:
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{path}: expected a NumPy array of token ids, got a file that NumPy cannot read"
            ) from error
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"{path}: expected a one-dimensional array of integers, got shape {tokens.shape} of {tokens.dtype}"
            )
        return tokens
    size = path.stat().st_size
    if size % np.dtype(dtype).itemsize:
        raise ValueError(f"{path}: expected whole {dtype} tokens (--token-dtype), got {size} bytes")
    return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)


def hold_out(corpus: Corpus, fraction: float) -> tuple[Corpus, Corpus]:
    """Splits into (training, held-out) by document; a document falls on the same side on every machine.

    Documents are held out in the order of a hash of their names until they hold `fraction` of the tokens. A corpus of
    one document is cut, and its tail held out.

    Raises:
        ValueError: the corpus is too short to be split.
    """

    def rank(document: Document) -> bytes:
        return hashlib.sha256(document.name.encode()).digest()

    wanted = fraction * corpus.num_tokens
    if len(corpus.documents) == 1:
        (whole,) = corpus.documents
        cut = whole.length - max(2, round(wanted))
        if cut < 2:
            raise ValueError(f"expected a text long enough to hold a part of it out, got {whole.length} tokens")
        train: Sequence[Document] = [Part(whole, 0, cut)]
        heldout: Sequence[Document] = [Part(whole, cut, whole.length)]
    else:
        ranked = sorted(corpus.documents, key=rank)
        cumulative = np.cumsum([document.length for document in ranked])
        count = min(int(np.searchsorted(cumulative, wanted)) + 1, len(ranked) - 1)
        chosen = {document.name for document in ranked[:count]}
        train = [document for document in corpus.documents if document.name not in chosen]
        heldout = [document for document in corpus.documents if document.name in chosen]
    return Corpus(tuple(train), corpus.byte_level, corpus.skipped), Corpus(tuple(heldout), corpus.byte_level)
