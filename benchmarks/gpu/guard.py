"""Against kernels that hang or spoil the GPU's context: a process that tries them first, and a look at the clock."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gpu import smoke
from gpu.attempt import attempt


def tried_first(command: list[str] | None = None, timeout_s: float = 150) -> tuple[list[dict], dict[int, str]]:
    """What the small calls gave, and for each block size whose calls did not all come to an end, why."""
    command = command or [sys.executable, str(pathlib.Path(smoke.__file__))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        told, ended = done.stdout, f"ended with {done.returncode}: {_last_line(done.stderr)}"
    except subprocess.TimeoutExpired as error:
        told, ended = _text(error.stdout), f"did not end in {timeout_s:g} s"
    found = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    answered = {(row["point"], row["block"]): row for row in found}
    reasons: dict[int, str] = {}
    for point, block in smoke.cases():
        row = answered.get((point.name, block))
        if row is None:
            reasons.setdefault(block, f"the small call {point.name}, block {block}, gave nothing: the process {ended}")
        elif "error" in row:
            reasons.setdefault(block, f"the small call {point.name}, block {block}: {row['error']}")
    return found, reasons


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def _text(output: typing.Any) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


class Watch:
    """Ends the process when nothing new was told to it for too long: a hanging kernel cannot be stopped otherwise.

    Args:
      stalled: told what was going on, it saves what there is.
    """

    def __init__(self, limit_s: float, stalled: Callable[[str], None], end: Callable[[int], None] = os._exit):
        self._limit_s, self._stalled, self._end = limit_s, stalled, end
        self._what, self._since = "start", time.monotonic()
        self._over = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def __call__(self, what: str) -> None:
        self._what, self._since = what, time.monotonic()

    def over(self) -> None:
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(min(1.0, self._limit_s / 4)):
            if time.monotonic() - self._since > self._limit_s:
                try:
                    self._stalled(f"no answer for {self._limit_s:g} s, and the run was ended: {self._what}")
                finally:
                    self._end(3)
                return


def lost() -> str | None:
    """Why nothing more can run in this process: an illegal access spoils it for everybody. None where all is well."""
    _, reason = attempt(lambda: jax.block_until_ready(jnp.ones(8) + 1))
    return None if reason is None else f"the GPU's context is lost: {reason}"
