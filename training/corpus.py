"""Corpora: documents from files, or from the interpreter's own standard library."""

from __future__ import annotations

import stat
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from training.documents import (
    BOUNDARY,
    BYTE_VOCAB,
    Corpus,
    Document,
    JsonlDocument,
    Part,
    SpooledTokens,
    TextDocument,
    TokenDocument,
    content_bytes,
)
from training.file_listing import files_under, suffix_of
from training.held_out import hold_out
from training.jsonl import texts
from training.left_out import LeftOut, shown, shown_path
from training.record_files import RECORD_SUFFIXES, record_documents
from training.spool import Spool
from training.token_files import TOKEN_SUFFIXES, map_tokens, token_documents

__all__ = [
    "BOUNDARY",
    "BYTE_VOCAB",
    "Corpus",
    "Document",
    "JsonlDocument",
    "Part",
    "TextDocument",
    "TokenDocument",
    "content_bytes",
    "hold_out",
    "load_corpus",
    "standard_library",
]

JSONL_SUFFIXES = (".jsonl", ".ndjson")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"PK\3\4": "ZIP",
    b"\x04\x22\x4d\x18": "LZ4",
}
_BINARY = (b"\xff\xd8\xff", b"%PDF", b"PAR1", b"GGUF", b"GIF8", b"OggS")  # formats whose first NUL may come late


def standard_library() -> Corpus:
    """The running interpreter's own library sources: real text that every machine has.

    Tests are left out (they hold tables of odd characters), and so is site-packages, which differs between machines.
    """
    root = Path(sysconfig.get_path("stdlib"))
    elsewhere = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = sorted(p for p in root.rglob("*.py") if not elsewhere & set(p.relative_to(root).parts[:-1]))
    documents: list[Document] = []
    left_out = LeftOut()
    for path in paths:
        name, size = path.relative_to(root).as_posix(), path.stat().st_size
        if size:
            documents.append(TextDocument(name, path, size))
        else:
            left_out.add("empty", name)
    if not documents:
        raise ValueError(f"expected the standard library's sources in {root}, got no .py file; name a text with --data")
    return Corpus(tuple(documents), True, left_out)


def load_corpus(path: Path, *, vocab_size: int, text_field: str, token_dtype: str, end_token: int | None) -> Corpus:
    """The documents under `path`: a file, or a directory taken with all below it, behind links too.

    Args:
        path: text file (any suffix), `.jsonl`, `.npy`, `.bin` (raw tokens), `.parquet`, `.array_record`, or a directory
            of these.
        vocab_size: the ids of token files must lie below it.
        text_field: field of a JSONL line or of a record that holds its text.
        token_dtype: "uint16" or "uint32", of a `.bin` file.
        end_token: the id that closes a document in a token file; None takes each file as one document.

    Returns:
        Documents in the order of their files' names. Every file that is not used is counted in `left_out`.

    Raises:
        ValueError: no such path, nothing readable in it, text and tokens mixed, a malformed line, an id too large.
    """
    left_out = LeftOut()
    documents: list[Document] = []
    used: list[str] = []
    options = _Options(vocab_size, text_field, token_dtype, end_token)
    try:
        root, files = _files(path, left_out)
        for file in files:
            name = file.relative_to(root).as_posix()
            before = len(documents)
            try:
                documents += _documents(file, name, options, left_out)
            except OSError as error:
                left_out.add(f"unreadable: {error.strerror or error}", name)
            used += [name] * (len(documents) > before)
    except OSError as error:
        raise ValueError(f"--data: expected a file or a directory that can be read, got {_said(error)}") from error
    if not documents:
        got = f"none of them: {left_out}" if left_out else "an empty directory"
        raise ValueError(
            f"--data: expected text, .jsonl, .npy, .bin, .parquet or .array_record in {shown_path(path)}, got {got}"
        )
    tokens = {name for name, kind in _kinds(documents) if kind}
    if tokens and len(tokens) < len(documents):
        others = next(name for name, kind in _kinds(documents) if not kind)
        raise ValueError(
            f"--data: expected either text or token files in {shown_path(path)}, got both: {shown(others)} and "
            f"{shown(min(tokens))}"
        )
    return Corpus(tuple(documents), not tokens, left_out, tuple(used))


def _files(path: Path, left_out: LeftOut) -> tuple[Path, list[Path]]:
    """The directory that names are relative to, and the files."""
    if not path.exists():
        broken = "which is a broken link" if path.is_symlink() else "which does not exist"
        raise ValueError(f"--data: expected a file or a directory, got {shown_path(path)}, {broken}")
    if path.is_dir():
        return path, files_under(path, left_out)
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(
            f"--data: expected a file or a directory, got {shown_path(path)}, which is a pipe, socket or device"
        )
    return path.parent, [path]


def _kinds(documents: Iterable[Document]) -> list[tuple[str, bool]]:
    """Name of each document, and True for tokens."""
    return [(document.name, isinstance(document, TokenDocument | SpooledTokens)) for document in documents]


def _said(error: OSError) -> str:
    return shown(f"{error.strerror or error}: {error.filename}", 400)


@dataclass(frozen=True)
class _Options:
    """Arguments of `load_corpus`, and the copy that records are put in."""

    vocab_size: int
    text_field: str
    token_dtype: str
    end_token: int | None
    spool: Spool = field(default_factory=Spool)


def _documents(file: Path, name: str, options: _Options, left_out: LeftOut) -> list[Document]:
    """The documents of one file, by its suffix."""
    vocab_size, text_field = options.vocab_size, options.text_field
    suffix = suffix_of(file)
    if suffix in TOKEN_SUFFIXES:
        tokens = map_tokens(file, options.token_dtype)
        return [*token_documents(tokens, file, name, vocab_size, options.end_token, left_out)]
    if suffix in JSONL_SUFFIXES:
        before = left_out.total
        lines = texts(file, name, text_field, left_out)
        documents = [JsonlDocument(f"{name}#{line}", file, offset, text_field, size) for line, offset, size in lines]
        if not documents and left_out.total == before:  # blank lines, or none
            left_out.add("empty", name)
        return [*documents]
    if suffix in RECORD_SUFFIXES:
        return record_documents(file, name, text_field, vocab_size, options.spool, left_out)
    if reason := _no_text(file):
        left_out.add(reason, name)
        return []
    return [TextDocument(name, file, file.stat().st_size)]


def _no_text(path: Path) -> str | None:
    """The reason why a file is no text, if it is none: a NUL byte early on is git's sign of a binary file."""
    with path.open("rb") as file:
        head = file.read(8192)
    if not head:
        return "empty"
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            return f"compressed by {kind}, to be unpacked first"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "in UTF-16 instead of UTF-8"
    return "binary" if b"\0" in head or head.startswith(_BINARY) else None
