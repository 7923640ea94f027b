"""Which implementation is for which platform, and the modes of JAX that kernels are traced in."""

import contextlib

import jax
from jax._src import config

PLATFORMS = {"mosaic_gpu": "cuda", "mosaic_tpu": "tpu"}
"""The one platform of implementations that have one; all others are for every platform."""


def interpreted() -> bool:
    """Whether kernels traced now run in an interpreter."""
    return config.pallas_tpu_interpret_mode_context_manager.value is not None


@contextlib.contextmanager
def default_modes():
    """JAX's own modes, whatever the caller's are: 32-bit numbers, and promotion of ranks and dtypes.

    A kernel's numbers are 32-bit by its own choice. Pallas counts blocks and grids with Python's numbers, which 64-bit
    mode and strict promotion would refuse to combine with them.
    """
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
