"""Ctrl-C in the programs of this package: none is lost, and none cuts a token short."""

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

_AGAIN_AFTER = 0.02  # seconds, in which the callback that raised has returned


@contextlib.contextmanager
def none_lost() -> Iterator[None]:
    """Raises KeyboardInterrupt once more where Python dropped it and would print a traceback.

    Python drops what a `__del__` or a callback raises, JAX's callback at garbage collection among them.
    """
    before, timers = sys.unraisablehook, list[threading.Timer]()

    def raise_again(unraisable) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        timers.append(threading.Timer(_AGAIN_AFTER, _thread.interrupt_main))
        timers[-1].start()

    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()


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

    # Only the main thread may set handlers, and where Ctrl-C is ignored (nohup, a background job) it stays so.
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN
    before = signal.signal(signal.SIGINT, note) if ours else None
    try:
        yield check
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
    check()
