"""Files under a directory: behind links too, each once, and what is left out."""

from __future__ import annotations

import os
import re
import stat
from collections import deque
from pathlib import Path

from training.left_out import LeftOut
from training.run_dir import LOCK, is_output

_SEEN_ALREADY = "link(s) to what was read already"


def suffix_of(path: Path) -> str:
    """The suffix in lower case; of a shard, such as `a.array_record-00000-of-00008`, that before its number."""
    return Path(re.sub(r"-\d+-of-\d+$", "", path.name.lower())).suffix


def files_under(directory: Path, left_out: LeftOut) -> list[Path]:
    """Regular files in a directory and all below it, sorted by path; hidden ones, and what runs wrote, are left out.

    Links are followed, after everything that is no link, and a file or a directory with several names is taken once:
    no cycle of links is endless, and no document counts twice.

    Args:
        directory: absolute or relative; may be a link itself, and hidden.
        left_out: counts what is not returned.

    Raises:
        OSError: the directory itself cannot be listed.
    """
    os.listdir(directory)
    found: list[Path] = []
    seen: set[tuple[int, int]] = {_identity(directory.stat())}
    folders, links = deque([directory]), deque[Path]()
    while folders or links:
        if folders:
            _list(folders.popleft(), directory, folders, links, found, seen, left_out)
        else:
            _take(links.popleft(), directory, folders, found, seen, left_out)
    return sorted(found)


def _list(folder: Path, root: Path, folders: deque, links: deque, found: list, seen: set, left_out: LeftOut) -> None:
    """Takes the entries of one directory; links wait."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        left_out.add(f"unreadable: {error.strerror}", f"{folder.relative_to(root).as_posix()}/")
        return
    of_run = any(entry.name == LOCK for entry in entries)
    for entry in entries:
        path = folder / entry.name
        if of_run and is_output(entry.name):
            left_out.add("of a run", path.relative_to(root).as_posix())
        elif entry.name.startswith("."):
            left_out.add("hidden", path.relative_to(root).as_posix())
        elif entry.is_symlink():
            links.append(path)
        else:
            _take(path, root, folders, found, seen, left_out)


def _take(path: Path, root: Path, folders: deque, found: list, seen: set, left_out: LeftOut) -> None:
    """Takes a file or notes a directory, whichever `path` is or links to."""
    name = path.relative_to(root).as_posix()
    try:
        status = path.stat()
    except OSError as error:
        reason = "broken link(s)" if path.is_symlink() else f"unreadable: {error.strerror}"
        return left_out.add(reason, name)
    if _identity(status) in seen:
        return left_out.add(_SEEN_ALREADY, name)
    if stat.S_ISDIR(status.st_mode):
        seen.add(_identity(status))
        folders.append(path)
    elif stat.S_ISREG(status.st_mode):
        seen.add(_identity(status))
        found.append(path)
    else:
        left_out.add("pipe, socket or device", name)
    return None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
