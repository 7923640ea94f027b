"""Ctrl-C in the programs of this package: none is lost, and none cuts a token short.

Imports nothing that is slow, so that a program can catch Ctrl-C before its slow imports.
"""

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

_AGAIN_AFTER = 0.02  # seconds, in which the callback that raised has returned


def end_at_once(program: str) -> None:
    """Makes Ctrl-C end the process in one line, with exit code 130: while it imports, until `none_lost` takes over."""

    def end(number: int, frame: object) -> None:
        print(f"{program}: ended by Ctrl-C", file=sys.stderr, flush=True)
        os._exit(130)

    if _is_ours():
        signal.signal(signal.SIGINT, end)


def _is_ours() -> bool:
    """True in the main thread, which alone may set handlers, unless Ctrl-C is ignored (nohup, a background job)."""
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None)  # None: set by another language


@contextlib.contextmanager
def none_lost() -> Iterator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt, and once more where Python dropped it and would print a traceback.

    Python drops what a `__del__` or a callback raises, JAX's callback at garbage collection among them.
    """
    before, timers = sys.unraisablehook, list[threading.Timer]()
    ours = _is_ours()

    def raise_again(unraisable) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        timers.append(threading.Timer(_AGAIN_AFTER, _thread.interrupt_main))
        timers[-1].start()

    sys.unraisablehook = raise_again
    handler = signal.signal(signal.SIGINT, signal.default_int_handler) if ours else None
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, handler)
        sys.unraisablehook = before
        waiting = [timer for timer in timers if timer.is_alive()]
        for timer in waiting:
            timer.cancel()
    if waiting:  # dropped just before the end
        raise KeyboardInterrupt


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], None]]:
    """Notes a first Ctrl-C for the caller's `check`; a second one raises KeyboardInterrupt at once.

    Yields:
        The function `check`, to be called between tokens. It raises KeyboardInterrupt if a Ctrl-C was noted, as the end
        of the context does.
    """
    asked = False

    def note(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    ours = _is_ours()
    before = signal.signal(signal.SIGINT, note) if ours else None
    try:
        yield check
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
    check()
