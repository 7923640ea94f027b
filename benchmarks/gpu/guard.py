"""Against kernels that hang or spoil the GPU's context: all that runs on it runs in a process that is watched.

A process that hangs in a driver cannot end itself for sure: its own threads may never run again. So the one that
watches has nothing to do with the GPU. It hears what goes on and keeps what was found, and ends the other when that is
silent for too long.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from benchmarks.gpu import smoke
from benchmarks.gpu.attempt import attempt
from benchmarks.gpu.sides import lost_with

START_S = 90
"""A process must say something in so many seconds: it imports JAX, finds the GPU and tries its clocks."""


Lost = dict[int, dict[str, str]]


class Job(typing.NamedTuple):
    """What goes on: at which case, for which side, and of that which pass; empty where it is for nobody."""

    case: str = ""
    side: str = ""
    what: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, self))


class Teller:
    """What a watched process says: the jobs that are open, and whatever is to be kept.

    Args:
      send: to whoever watches; takes ("jobs", open ones, seconds that they may take), ("lost", why), ("keep", what).
    """

    def __init__(self, send: Callable[[tuple], None]):
        self._send, self._lock = send, threading.Lock()
        self._main, self._beside, self._limit_s = Job(), [], START_S

    def doing(self, job: Job, limit_s: float) -> None:
        """The main thread begins this, and has ended what it did before."""
        with self._lock:
            self._main, self._limit_s = job, limit_s
            self._tell()

    @contextlib.contextmanager
    def beside(self, job: Job) -> Iterator[None]:
        """Another thread does this."""
        with self._lock:
            self._beside.append(job)
            self._tell()
        try:
            yield
        finally:
            with self._lock:
                self._beside.remove(job)
                self._tell()

    def keep(self, what: typing.Any) -> None:
        with self._lock:
            self._send(("keep", what))

    def attempt[Result](self, action: Callable[[], Result]) -> tuple[Result, None] | tuple[None, str]:
        """As `attempt`; but where the failure spoiled the GPU for all that follows, the process ends."""
        found, reason = attempt(action)
        if reason is None:
            return typing.cast(Result, found), None
        if spoiled := lost():
            with self._lock:
                self._send(("lost", f"{spoiled}, after {reason}"))
            sys.stdout.flush()
            os._exit(1)
        return None, reason

    def _tell(self) -> None:
        jobs = (self._main, *self._beside) if self._main != Job() else tuple(self._beside)
        self._send(("jobs", jobs, self._limit_s))


@dataclasses.dataclass(frozen=True)
class Ending:
    """Why a process did not come to its end, what it was doing, and whether there was no time left for it."""

    reason: str
    jobs: tuple[Job, ...]
    too_late: bool = False

    def __str__(self) -> str:
        return f"{self.reason}: {'; '.join(map(str, self.jobs)) or 'nothing was begun'}"


def watched(work: Callable, arguments: tuple, kept: Callable[[typing.Any], None], deadline: float) -> Ending | None:
    """Runs `work(Teller, *arguments)` in a process of its own, and ends that when it hangs.

    Args:
      kept: takes what the process keeps, as it comes.
      deadline: of `time.monotonic()`.

    Returns:
      None where the work was done.
    """
    context = multiprocessing.get_context("spawn")
    heard, told = context.Pipe(duplex=False)
    process = context.Process(target=_begin, args=(told, work, arguments))
    process.start()
    told.close()
    try:
        return _listen(process, heard, kept, deadline)
    finally:
        process.kill()
        process.join(10)


def _listen(process: typing.Any, heard: typing.Any, kept: Callable, deadline: float) -> Ending | None:
    jobs, limit_s, spoiled = (), START_S, None
    while True:
        left_s = deadline - time.monotonic()
        if not heard.poll(max(0.0, min(limit_s, left_s))):
            late = left_s < limit_s
            return Ending("the time was up" if late else f"no answer for {limit_s:g} s", jobs, late)
        try:
            message = heard.recv()
        except (EOFError, OSError):
            process.join(10)
            return Ending(spoiled or f"its process ended with {process.exitcode}", jobs)
        match message:
            case ("jobs", jobs, limit_s):
                pass
            case ("keep", what):
                kept(what)
            case ("lost", spoiled):
                pass
            case None:
                return None


def _begin(connection: typing.Any, work: Callable, arguments: tuple) -> None:
    work(Teller(connection.send), *arguments)
    connection.send(None)


def tried_first(command: list[str] | None = None, timeout_s: float = 120) -> tuple[list[dict], Lost]:
    """What the small calls gave; and by block size the passes that are lost, as not all gave something, and why.

    Wrong numbers are no reason to leave anything out: they are a failure of the run, and what the kernel does at real
    sizes is to be seen.
    """
    command = command or [sys.executable, "-m", smoke.__name__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        told, ended = done.stdout, f"ended with {done.returncode}: {_last_line(done.stderr)}"
    except subprocess.TimeoutExpired as error:
        told, ended = _text(error.stdout), f"did not end in {timeout_s:g} s"
    found = [json.loads(line) for line in told.splitlines() if line.startswith("{") and line.endswith("}")]
    answered = {(row["case"], row["block"], row["pass"]): row for row in found}
    lost: dict[int, dict[str, str]] = {}
    for case, block, what in smoke.calls():
        row = answered.get((case.name, block, what), {"error": f"gave nothing: the process {ended}"})
        if "error" in row:
            reason = f"the small call {case.name}, block {block}, {what}: {row['error']}"
            lost[block] = dict.fromkeys(lost_with(what), reason) | lost.get(block, {})
    return found, lost


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def _text(output: typing.Any) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def lost() -> str | None:
    """Why nothing more can run in this process: an illegal access spoils it for everybody. None where all is well."""
    _, reason = attempt(lambda: jax.block_until_ready(jnp.ones(8) + 1))
    return None if reason is None else f"the GPU's context is lost: {reason}"
