"""The reference backend, against a definition written apart from it."""

import pytest

from tests.kernels.cases import Case, parameters
from tests.kernels.contract import AttentionContract

QUICK = (
    "dense both ways", "patterns by query head", "mask of tokens", "t > s", "narrow values", "sinks in float64",
    "documents both ways", "strangers", "an offset for each", "selection for each",
)  # fmt: skip
"""Cases of the table that are not left to the slow tests: no other backend computes by this one."""


class TestReference(AttentionContract):
    implementation = "reference"
    random_share = 6

    @pytest.mark.usefixtures("quick_compilation")
    @pytest.mark.parametrize("case", parameters(quick=QUICK))
    def test_case(self, case: Case):
        self.check(case)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["blocks of 64", "soft cap, low precision", "an offset for each"])
    def test_optimised(self, name: str):
        super().test_optimised(name)
