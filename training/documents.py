"""Documents: streams of token ids that are read by slices, from the files that hold them.

Byte-level documents open and close with `BOUNDARY`, so that their first byte is predicted too and a sample can end; a
token file is taken as it is. Nothing is read until a slice of it is asked for.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int, Integer

from training.jsonl import Changed, text_at
from training.left_out import LeftOut, shown, shown_path
from training.spool import Spool

BOUNDARY = 256  # opens and closes every byte-level document
BYTE_VOCAB = 257


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
            raise Changed(f"{shown_path(self.path)} had {self.size} bytes when the run began and is shorter now")
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
        if len(content) != self.size:
            raise Changed(
                f"{shown(self.name)} had {self.size} bytes of text when the run began and has {len(content)} now"
            )
        return _enclose(content[max(start - 1, 0) : max(stop - 1, 0)], start, stop, self.size)


# The rows of one long line come one after another only in evaluation, so few are kept.
_jsonl_text = functools.lru_cache(maxsize=64)(text_at)


@dataclass(frozen=True)
class SpooledDocument:
    """The text of one record of a file that has no random access, in a temporary copy."""

    name: str
    spool: Spool = field(repr=False)
    offset: int
    size: int

    @property
    def length(self) -> int:
        return self.size + 2

    def read(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        first, last = max(start - 1, 0), min(stop - 1, self.size)
        return _enclose(self.spool.read(self.offset + first, max(last - first, 0)), start, stop, self.size)


@dataclass(frozen=True)
class SpooledTokens:
    """The token ids of one record, int32, in a temporary copy."""

    name: str
    spool: Spool = field(repr=False)
    offset: int
    length: int

    def read(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        count = max(min(stop, self.length) - start, 0)
        return np.frombuffer(self.spool.read(self.offset + 4 * start, 4 * count), np.int32).copy()


@dataclass(frozen=True, eq=False)
class TokenDocument:
    """Tokens `start` to `stop` of a memory-mapped token file."""

    name: str
    tokens: Integer[np.ndarray, " n"]
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def read(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        return self.tokens[self.start + start : self.start + stop].astype(np.int32)


@dataclass(frozen=True)
class Part:
    """A slice of a document's stream: a document is cut where it is held out in part."""

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
    """The text of a byte-level document, without its boundaries."""
    stream = document.read(0, document.length)
    return stream[stream < BOUNDARY].astype(np.uint8).tobytes()


@dataclass(frozen=True)
class Corpus:
    """Documents of one kind: byte-level (the ids are bytes and `BOUNDARY`) or ready-made tokens."""

    documents: tuple[Document, ...]
    byte_level: bool
    left_out: LeftOut = field(default_factory=LeftOut)
    files: tuple[str, ...] = ()
    """Relative paths; the name of a document begins with its file's."""

    @property
    def num_tokens(self) -> int:
        return sum(document.length for document in self.documents)

    def first(self, tokens: int) -> Corpus:
        """The first `tokens` tokens, at least two: whole documents, and the beginning of one."""
        documents: list[Document] = []
        left = max(tokens, 2)
        for document in self.documents:
            if left < 2:
                break
            documents.append(document if document.length <= left else Part(document, 0, left))
            left -= document.length
        return replace(self, documents=tuple(documents))

    def fingerprint(self) -> str:
        """Changes when a document is added, taken away, renamed or resized."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(os.fsencode(f"{document.name}\0{document.length}\n"))
        return digest.hexdigest()[:16]
