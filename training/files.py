"""Small files that are whole or not there: a temporary file beside the target, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces a file's content; what it held before stays until the new content is on the disk.

    Args:
        path: of the file; its directory exists.
        content: text is written as UTF-8, lone surrogates as the bytes that they stand for in file names.

    Raises:
        OSError: the content could not be written; the file is as it was.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogateescape")
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _mode_of(path))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
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


def _mode_of(path: Path) -> int:
    """The permissions that a file has, or that a new one would get."""
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask
