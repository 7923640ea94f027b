"""JAX's strict modes, by name: careful users set them, and everything in this project must run under each.

@strict_modes.EACH
def test_something(mode: str):
    inputs = jnp.ones(...)  # before the mode is on: the transfer guard refuses to make arrays
    with strict_modes.on(mode):
        function(inputs)
"""

import contextlib
from collections.abc import Callable

import jax
import pytest

MODES: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "debug nans": lambda: jax.debug_nans(True),
    "debug infs": lambda: jax.debug_infs(True),
    "tracer leaks": jax.checking_leaks,
    "transfer guard": lambda: jax.transfer_guard("disallow"),
    "x64": lambda: jax.enable_x64(True),
}
"""Each mode alone. x64 is one of them: in a 64-bit session, Python numbers and `arange` are 64-bit."""

QUICK = [mode for mode in MODES if mode != "tracer leaks"]
"""The modes that the quick tests turn on together: leaks are looked for without JAX's caches, three times as long."""

EACH = pytest.mark.parametrize("mode", list(MODES))
"""Runs a test once under each mode."""


@contextlib.contextmanager
def on(*modes: str):
    """A context in which the named modes are on; all of them if none is named."""
    with contextlib.ExitStack() as stack:
        for mode in modes or MODES:
            stack.enter_context(MODES[mode]())
        yield
