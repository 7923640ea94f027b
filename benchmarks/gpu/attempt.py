"""One side's failure is a line of its row: the others go on, and nothing is hidden."""

import sys
import traceback
from collections.abc import Callable


class LeftOut(Exception):
    """Why a side does not take part; nothing is wrong."""


class NoDeviceTime(RuntimeError):
    """A measurement that cannot be believed; the message says why."""


FORESEEN = (RuntimeError, ValueError, TypeError, ImportError, OSError)
"""Of JAX, XLA, Triton's callers and PyTorch, out of memory and not implemented among them."""


def attempt[Result](action: Callable[[], Result]) -> tuple[Result, None] | tuple[None, str]:
    """What the action gives and None, or None and why it failed, in one line.

    What compilers, drivers and libraries raise where they cannot do something, `FORESEEN`, is printed with its
    traceback as well. Anything else ends the process, and whoever watches it notes that and goes on without the side.
    """
    try:
        return action(), None
    except (LeftOut, NoDeviceTime) as reason:
        return None, one_line(reason)
    except FORESEEN as error:
        traceback.print_exc(file=sys.stderr)
        return None, one_line(error)


def one_line(error: BaseException) -> str:
    """What was raised, short enough for a row."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[0] if lines else ""
    return (told if isinstance(error, LeftOut) else f"{type(error).__name__}: {told}")[:300]
