"""Limits on untrusted files and texts: bytes read of a file, characters repeated in a message."""

import json
import os
import pathlib
import reprlib
import stat
from typing import Any

_QUOTED = 200
LARGEST_JSON = 1 << 28
"""Bytes of a JSON file: the largest tokenizer.json that is in use has an eighth of that."""


_short = reprlib.Repr(
    maxlevel=3, maxdict=16, maxlist=16, maxtuple=16, maxset=16, maxstring=_QUOTED, maxlong=_QUOTED, maxother=_QUOTED
)


def quoted(value: object) -> str:
    """The `repr` of a value for a message, on one line and cut if it is long."""
    return shortened(_short.repr(value))


def shortened(text: object) -> str:
    """A name, or an error of a library, on one line, cut where it is long."""
    line = "".join(character if character.isprintable() else " " for character in str(text)[: 4 * _QUOTED])
    line = " ".join(line.split())
    return line if len(line) <= _QUOTED else f"{line[:_QUOTED]}..."


def regular_file(path: str | os.PathLike, largest: int | None = None) -> int:
    """The size of a file in bytes.

    Raises:
        ValueError: it cannot be read; it is a pipe, a device or a directory, whose reading might never end; or it is
            larger than `largest` bytes.
    """
    try:
        state = os.stat(path)
        if stat.S_ISREG(state.st_mode):
            os.close(os.open(path, os.O_RDONLY))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path} cannot be read: {reason}") from error
    if not stat.S_ISREG(state.st_mode):
        raise ValueError(f"{path} cannot be read: it is no regular file")
    if largest is not None and state.st_size > largest:
        raise ValueError(f"{path} has {state.st_size} bytes, at most {largest} are read")
    return state.st_size


def read_text(path: str | os.PathLike, largest: int = LARGEST_JSON) -> str:
    """A UTF-8 file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: see `regular_file`; or it is no UTF-8.
    """
    regular_file(path, largest)
    try:
        return pathlib.Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is torn or no UTF-8 ({error.reason} at byte {error.start}): fetch it again"
        ) from error


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: if the file is missing, torn, nested too deeply, or holds something other than an object.
    """
    try:
        values = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: a checkpoint directory in the Hugging Face format has one") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is torn or no JSON ({shortened(error)}): fetch it again") from error
    except RecursionError as error:
        raise ValueError(f"{path} is no file of a checkpoint: its values are nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values
