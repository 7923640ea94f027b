"""Races of copies that a warpgroup starts itself.

The interpreter counts copies in a few clocks, in turn. Two copies that share a clock look as if one came after the
other, which hides a missing wait: here every copy has a clock of its own.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
import pytest

from tests.kernels import test_mosaic_gpu, test_mosaic_gpu_gradients
from tests.kernels.cases import BY_NAME, arrays

COPIES = 500


@pytest.mark.usefixtures("strict_dtypes", "quick_compilation")
@pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        (test_mosaic_gpu.TestInterpreted(), "block by block"),
        pytest.param(test_mosaic_gpu_gradients.TestGradients(), "selection by KV head", marks=pytest.mark.slow),
    ],
    ids=["forward", "gradients"],
)
def test_every_copy_is_waited_for(backend, name: str):
    params = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=COPIES)
    with plgpu.force_gpu_interpret_mode(params):
        case = backend.adapted(BY_NAME[name])
        backend.run(case, arrays(case))
    assert not test_mosaic_gpu.gpu_callbacks.get_races().races_found
