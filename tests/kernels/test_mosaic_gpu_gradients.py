"""The Hopper backend's backward pass in the interpreter: the shared table's gradients."""

import jax
import pytest

from s2jax import LocalStride
from tests.kernels.cases import CASES, Case, parameters
from tests.kernels.contract import traced
from tests.kernels.test_mosaic_gpu import SHAPES
from tests.kernels.test_mosaic_gpu import TestInterpreted as Interpreted
from tests.kernels.test_mosaic_gpu_selections import CASES as SELECTIONS

QUICK = (
    "local stride", "soft cap, low precision", "documents both ways", "an offset for each", "stripes by query head",
    "selection by KV head",
)  # fmt: skip

WIDE = [
    # More features than registers can sum at once.
    Case("wide heads", LocalStride(16, 1, 2), "bfloat16", 1, 70, 70, 2, 1, 192, 128),
]


class TestGradients(Interpreted):
    test_random_cases = test_optimised = test_shape = test_offsets_beyond_the_keys_and_nan_queries_give_nan = None

    def compiled(self, case: Case):
        return jax.jit(traced(case, self.implementation, self.tilings.get(case.tiling)))

    @pytest.mark.usefixtures("quick_compilation")
    @pytest.mark.parametrize("case", [*parameters(*QUICK), *WIDE])
    def test_case(self, case: Case):
        self.check(case)

    @pytest.mark.slow
    @pytest.mark.usefixtures("quick_compilation")
    @pytest.mark.parametrize(
        "case",
        [*parameters(*(each.name for each in CASES if each.name not in QUICK)), *SHAPES, *SELECTIONS],
    )
    def test_other_case(self, case: Case):
        self.check(case)
