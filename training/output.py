"""Lines on the screen, none of which can end a run: of any text in any encoding, to readers that may be gone."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO


def tolerate_any_text() -> None:
    """Lets the standard streams write `?`, or an escape on stderr, for what their encoding lacks."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def on_terminal() -> bool:
    """True if stdout is a terminal, on which a line can be rewritten."""
    return sys.stdout is not None and sys.stdout.isatty()


def show(text: str, end: str = "\n") -> None:
    """Prints to stdout at once."""
    _print(sys.stdout, text, end)


def warn(line: str) -> None:
    """Prints to stderr at once."""
    _print(sys.stderr, line, "\n")


def _print(stream: TextIO | None, text: str, end: str) -> None:
    try:
        print(text, end=end, file=stream, flush=True)
    except (OSError, ValueError) as error:  # a closed pipe or terminal, a full disk; a stream that is closed
        if stream is sys.stdout:
            warn(f"stdout cannot be written any more ({error}); the run goes on without it")
        _discard(stream)


def _discard(stream: TextIO | None) -> None:
    """Discards the rest of a stream's buffer, which Python would otherwise try to write at exit."""
    try:
        descriptor = -1 if stream is None else stream.fileno()
    except (OSError, ValueError):  # closed, or no file
        return
    if descriptor >= 0:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
