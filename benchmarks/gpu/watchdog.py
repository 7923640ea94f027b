"""A watchdog against kernels that hang or spoil the GPU's context: a process of its own uses the GPU.

A process that hangs in a driver cannot be relied on to end itself. So the watching process does not touch the GPU. It
receives jobs and findings, and ends the other process when no message comes for too long.
"""

import dataclasses
import multiprocessing
import os
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from benchmarks.gpu.errors import EXPECTED, LeftOut, one_line

START_S = 90
"""Seconds until a process reports first: it imports JAX, finds the GPU and tries the clocks."""

HANGING_S, COMPILING_S = 60, 150
"""Seconds after which a call, or compiling, counts as hanging."""


class Job(typing.NamedTuple):
    """The case, the implementation and the pass or step at work; empty strings where there is none."""

    case: str = ""
    implementation: str = ""
    step: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, self))


class Reporter:
    """A watched process's link to the watchdog.

    Args:
      send: takes ("doing", jobs, seconds they may take), ("lost", reason) and ("keep", keyword arguments).
    """

    def __init__(self, send: Callable[[tuple], None]):
        self._send = send

    def doing(self, jobs: Iterable[Job], limit_s: float = HANGING_S) -> None:
        """Announces these jobs, which replace the ones before."""
        self._send(("doing", tuple(jobs), limit_s))

    def keep(self, rows: Iterable[dict] = (), **more: typing.Any) -> None:
        """Sends results rows and other findings."""
        self._send(("keep", {"rows": list(rows), **more}))

    def attempt[Result](self, row: dict, action: Callable[[], Result], outcome: str = "failed") -> Result | None:
        """The action's result, or None; the reason is then in the row, under `outcome` or "not run".

        An unexpected error ends the process, and so does a failure that spoiled the GPU's context. The watchdog then
        goes on without the implementation.
        """
        try:
            return action()
        except LeftOut as reason:
            row["not run"] = one_line(reason)
        except EXPECTED as error:
            traceback.print_exc(file=sys.stderr)
            row[outcome] = one_line(error)
            if spoiled := lost_context():
                self._send(("lost", f"{spoiled}, after {one_line(error)}"))
                sys.stdout.flush()
                os._exit(1)
        return None


def lost_context() -> str | None:
    """The reason why nothing more can run in this process, such as an illegal access, or None."""
    try:
        jax.block_until_ready(jnp.ones(8) + 1)
    except EXPECTED as error:
        return f"the GPU's context is lost: {one_line(error)}"
    return None


@dataclasses.dataclass(frozen=True)
class Ending:
    """The reason why a process did not finish, its jobs at that time, and True if it ran out of time."""

    reason: str
    jobs: tuple[Job, ...]
    too_late: bool = False

    def __str__(self) -> str:
        return f"{self.reason}: {'; '.join(map(str, self.jobs)) or 'nothing was begun'}"


def watch(work: Callable, arguments: tuple, keep: Callable[..., None], deadline: float) -> Ending | None:
    """Runs `work(Reporter, *arguments)` in a process of its own, and ends the process when it hangs.

    Args:
      keep: called with the findings as they come.
      deadline: in `time.monotonic()`.

    Returns:
      None where the work was done.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sending, work, arguments))
    process.start()
    sending.close()
    try:
        return _listen(process, receiving, keep, deadline)
    finally:
        process.kill()
        process.join(10)


def _listen(process: typing.Any, receiving: typing.Any, keep: Callable, deadline: float) -> Ending | None:
    jobs, limit_s, spoiled = (), START_S, None
    while True:
        left_s = deadline - time.monotonic()
        if not receiving.poll(max(0.0, min(limit_s, left_s))):
            late = left_s < limit_s
            return Ending("the time was up" if late else f"no answer for {limit_s:g} s", jobs, late)
        try:
            message = receiving.recv()
        except (EOFError, OSError):
            process.join(10)
            return Ending(spoiled or f"its process ended with {process.exitcode}", jobs)
        match message:
            case ("doing", jobs, limit_s):
                pass
            case ("keep", found):
                keep(**found)
            case ("lost", spoiled):
                pass
            case None:
                return None


def _run(sending: typing.Any, work: Callable, arguments: tuple) -> None:
    work(Reporter(sending.send), *arguments)
    sending.send(None)
