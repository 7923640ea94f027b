"""Failures that cost one measurement and no more."""


class LeftOut(Exception):
    """Raised for an implementation that does not take part although nothing is wrong."""


class NoDeviceTime(RuntimeError):
    """Raised for a measured time that cannot be right."""


EXPECTED = (RuntimeError, ValueError, TypeError, ImportError, OSError)
"""Errors of JAX, XLA, PyTorch and drivers, running out of memory and NotImplementedError among them."""


def one_line(error: BaseException) -> str:
    """The error's type and the first line of its message, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else ""
    return (message if isinstance(error, LeftOut) else f"{type(error).__name__}: {message}")[:300]
