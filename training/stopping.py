"""Requests to stop a run: SIGTERM (preemption), SIGHUP (a terminal that closes), Ctrl-C.

Imports nothing that is slow, so that a program can catch signals before its slow imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from training.output import warn

_AGAIN_AFTER = 0.02  # seconds, in which the callback that raised has returned


class Stopped(BaseException):
    """Raised by a request to stop in a phase that has nothing to save.

    Like `KeyboardInterrupt` it is no `Exception`: libraries that catch those let it through.
    """


def stop_signals() -> list[signal.Signals]:
    """SIGINT, SIGTERM and, unless `nohup` or the like has it ignored, SIGHUP."""
    found = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return found


def end_at_once_on_signals() -> None:
    """Makes a request to stop end the process with exit code 0, for the seconds before `StopRequest` takes over."""

    def end(number: int, _frame: object) -> None:
        warn(f"train.py: {signal.Signals(number).name}: stopped before anything had begun")
        os._exit(0)

    for number in stop_signals():
        signal.signal(number, end)


def ignore_signals() -> None:
    """Keeps requests to stop from changing the exit code of a run that is over."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Handlers of the signals that ask a run to stop. A second Ctrl-C ends it at once.

    Outside `deferred` a signal raises `Stopped` at once. Within, it is noted, to be asked for by `reached` or `check`.

    In a cluster SIGTERM to any process stops all of them at the same point, on which JAX's preemption service agrees:
    there, every process must call `reached` and `check` equally often. The other signals are passed on as SIGTERM.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.in_cluster = False
        self._agreed, self._asked, self._deferred = False, 0, 0
        self._before: dict[signal.Signals, Any] = {}
        self._hook, self._again = sys.unraisablehook, list[threading.Timer]()

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in stop_signals()}
        self._hook, sys.unraisablehook = sys.unraisablehook, self._raise_again
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._hook
        for timer in self._again:
            timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _raise_again(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Asks once more where Python dropped `Stopped`, as it does with what a finalizer or a callback raises."""
        asked = self.signal
        if not issubclass(unraisable.exc_type, Stopped | KeyboardInterrupt) or asked is None:
            self._hook(unraisable)
            return
        if issubclass(unraisable.exc_type, Stopped):
            self.signal = None
        else:
            asked = signal.SIGINT  # the second Ctrl-C
        self._again.append(threading.Timer(_AGAIN_AFTER, os.kill, (os.getpid(), asked)))
        self._again[-1].start()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Notes signals without raising; one that came within is raised by the next `check`."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def over(self) -> None:
        """Notes signals from here on, without an effect: all that is left is to let go."""
        self._deferred += 1

    def _note(self, number: int, _frame: object) -> None:
        if self.signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signal = signal.Signals(number)
        if self.in_cluster:
            warn(f"\n{self.signal.name}: stopping all processes after this step")
            os.kill(os.getpid(), signal.SIGTERM)  # the preemption service's
        elif self._deferred:
            warn(f"\n{self.signal.name}: stopping as soon as all is saved")
        else:
            raise Stopped(self.signal.name)

    def reached(self) -> bool:
        """True once the run is to stop; in a cluster, on all processes after the same call."""
        if not self.in_cluster:
            return self.signal is not None
        from jax.experimental import multihost_utils

        self._asked += 1
        self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(self._asked)
        return self._agreed

    def check(self) -> None:
        """Raises `Stopped` if a stop was requested.

        Raises:
            Stopped: see `reached`.
        """
        if self.reached():
            raise Stopped(self.signal.name if self.signal else "SIGTERM")
