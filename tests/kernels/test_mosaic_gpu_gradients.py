"""The Hopper backend's backward pass in the interpreter: the shared table's gradients."""

import jax
import pytest

from tests.kernels.cases import Case, parameters
from tests.kernels.contract import traced
from tests.kernels.test_mosaic_gpu import SHAPES
from tests.kernels.test_mosaic_gpu import TestInterpreted as Interpreted

QUICK = ("local stride", "soft cap, low precision", "documents both ways", "an offset for each")
SLOW = (
    "blocks of 64", "first tokens both ways", "offsets in step", "t > s", "dense both ways", "local stride both ways",
    "strided", "ranges", "relative stride, causal", "window of tokens both ways", "first tokens and a window",
    "mixed block sizes", "one query", "one of each", "t < s", "offset within a block", "queries beyond the keys",
    "no groups", "groups of four", "block by block", "scale", "soft cap", "sinks", "empty rows with sinks", "documents",
    "strangers with sinks", "offset at run time", "an offset and documents", "an offset both ways",
)  # fmt: skip
"""Cases whose groups read alike: all their gradients come from kernels, and XLA's loops beside them would wait for the
interpreter's threads."""


class TestGradients(Interpreted):
    test_random_cases = test_optimised = test_shape = test_offsets_beyond_the_keys_and_nan_queries_give_nan = None

    def compiled(self, case: Case):
        return jax.jit(traced(case, self.implementation, self.tilings.get(case.tiling)))

    @pytest.mark.usefixtures("quick_compilation")
    @pytest.mark.parametrize("case", parameters(*QUICK))
    def test_case(self, case: Case):
        self.check(case)

    @pytest.mark.slow
    @pytest.mark.usefixtures("quick_compilation")
    @pytest.mark.parametrize("case", [*parameters(*SLOW), *SHAPES[:2]])
    def test_other_case(self, case: Case):
        self.check(case)
