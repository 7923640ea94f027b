"""JAX's modes while a kernel is traced: the interpreter, and the defaults that kernels rely on."""

import contextlib

import jax
from jax._src import config


def interpreted() -> bool:
    """True while kernels are traced for an interpreter."""
    return config.pallas_tpu_interpret_mode_context_manager.value is not None


@contextlib.contextmanager
def default_modes():
    """Sets JAX's defaults, whatever the caller's modes: 32-bit numbers, and promotion of ranks and dtypes.

    A kernel's numbers are 32-bit by its own choice. Pallas counts blocks and grids with Python's numbers, which 64-bit
    mode and strict promotion would refuse to combine with them.
    """
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
