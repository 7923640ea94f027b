"""JSONL: the text of a line, or in one line what is wrong with it."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from training.left_out import LeftOut, shown, shown_path

_LONGEST_LINE = 1 << 28  # bytes; a longer one is a file of another kind
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


class Changed(OSError):
    """A file is no longer what it was when the run began."""


def texts(path: Path, name: str, field: str, left_out: LeftOut) -> Iterator[tuple[int, int, int]]:
    """Checks every line of a file.

    Yields:
        Number, offset in bytes, and size of the text in bytes, of each line that has a text.

    Raises:
        ValueError: a line is no JSON object with a text; names file, line and cause.
    """
    offset = number = 0
    with path.open("rb") as file:
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            if not _without_mark(line, offset).strip():
                offset += len(line)
                continue
            try:
                size = len(_text(line, offset, field))
            except ValueError as error:
                raise ValueError(
                    f"{shown_path(path)} line {number}: expected a JSON object with a string field {shown(field)!r} "
                    f"(--text-field), got {error}"
                ) from error
            if size:
                yield number, offset, size
            else:
                left_out.add("JSONL line(s) with an empty text", f"{name}#{number}")
            offset += len(line)


def text_at(path: Path, offset: int, field: str) -> bytes:
    """Reads the text of the line that begins at `offset`, in UTF-8.

    Raises:
        Changed: the line has no text; it had one when `texts` looked.
    """
    with path.open("rb") as file:
        file.seek(offset)
        line = file.readline(_LONGEST_LINE + 1)
    try:
        return _text(line, offset, field)
    except ValueError as error:
        raise Changed(f"{shown_path(path)} was changed since the run began: got {error}") from error


def _without_mark(line: bytes, offset: int) -> bytes:
    return line if offset else line.removeprefix(codecs.BOM_UTF8)


def _text(line: bytes, offset: int, field: str) -> bytes:
    """The text field of a line in UTF-8; the ValueError says what came instead."""
    if len(line) > _LONGEST_LINE:
        raise ValueError(f"a line of more than {_LONGEST_LINE >> 20} MiB")
    try:
        # Numbers are not looked at: Python would refuse whole ones of more than 4,300 digits.
        value = json.loads(_without_mark(line, offset).decode(), parse_int=float)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte 0x{line[error.start]:02x} at {error.start}, which is not UTF-8") from error
    except json.JSONDecodeError as error:
        begin = shown(line[:40].decode(errors="replace").strip(), 40)
        raise ValueError(f"no JSON ({error.msg} at character {error.pos}) in the line that begins {begin!r}") from error
    except RecursionError as error:
        raise ValueError("lists or objects that are nested too deeply to be read") from error
    if not isinstance(value, dict):
        raise ValueError(f"{_KINDS.get(type(value), 'a number')} instead of an object")
    if field not in value:
        raise ValueError(f"an object with the fields {shown(', '.join(map(repr, value)) or 'none')}")
    text = value[field]
    if not isinstance(text, str):
        raise ValueError(f"{_KINDS.get(type(text), 'a number')} in that field")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a text that cannot be encoded: the lone surrogate \\u{ord(text[error.start]):04x} at its character "
            f"{error.start}; replace it by \\ufffd"
        ) from error
