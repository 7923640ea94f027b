"""Processes that act as one: what fails on one of them ends all, with the same line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from training.output import show

_LONGEST = 1000  # bytes of an error that the other processes hear of


class Failed(Exception):
    """Another process could not do its part."""


class Lost(Failed):
    """Another process is gone: what all do together cannot be done."""


# How a collective of JAX ends where a peer is gone: by Gloo (CPUs), NCCL (GPUs) or the coordination service.
_PEER_IS_GONE = re.compile(r"\bGloo\b|\bNCCL\b|coordination service|Connection (?:closed|reset) by peer", re.IGNORECASE)


def lost_peer(error: BaseException) -> Lost | None:
    """The error in words, if it is that of a collective whose peer is gone."""
    if not isinstance(error, ValueError | RuntimeError) or not _PEER_IS_GONE.search(str(error)):
        return None
    return Lost(f"another process of the run is gone ({' '.join(str(error).split())[:200]})")


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
