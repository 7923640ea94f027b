"""What the kernels' tests share."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import pytest


@pytest.fixture
def interpreted():
    """The Hopper backend is taken on any platform, for tests that put something in its kernels' place."""
    with plgpu.force_gpu_interpret_mode():
        yield
