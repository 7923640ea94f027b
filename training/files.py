"""Small files that are whole or not there: a temporary file beside the target, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces a file's content; what it held before stays until the new content is on the disk.

    Args:
        path: of the file; its directory exists, and nobody else writes into it.
        content: text is written as UTF-8, lone surrogates as the bytes that they stand for in file names.

    Raises:
        OSError: the content could not be written; the file is as it was.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogateescape")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None:  # that of a write
            error.filename = str(path)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes renames within a directory last through a loss of power, where the file system can."""
    with contextlib.suppress(OSError):  # some network file systems open no directory
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
