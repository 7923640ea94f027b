"""Processes that act as one: what fails on one of them ends all, with the same line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from training.output import show

_LONGEST = 1000  # bytes of an error that the other processes hear of


class Failed(Exception):
    """Another process could not do its part."""


@contextlib.contextmanager
def agreeing(*errors: type[Exception]) -> Iterator[None]:
    """Raises on every process what its block raised on any; the block itself may not communicate.

    Args:
        errors: classes that are shared; others pass through, on their process alone.

    Raises:
        Failed: another process raised one of `errors`; with its text.
    """
    if jax.process_count() == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except errors as error:
        own = error
    heard = gather("" if own is None else str(own) or type(own).__name__)
    if own is not None:
        raise own
    for process, text in enumerate(heard):
        if text:
            raise Failed(f"process {process}: {text}")


def gather(text: str) -> list[str]:
    """The texts of all processes, each cut to 1,000 bytes; every process must call it."""
    content = text.encode("utf-8", "replace")[:_LONGEST]
    row = np.zeros(_LONGEST, np.uint8)
    row[: len(content)] = np.frombuffer(content, np.uint8)
    rows = multihost_utils.process_allgather(row)
    return [bytes(other).rstrip(b"\0").decode("utf-8", "replace") for other in rows.reshape(-1, _LONGEST)]


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def say(line: str) -> None:
    """Prints once, whatever the number of processes."""
    if jax.process_index() == 0:
        show(line)
