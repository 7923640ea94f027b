"""The reference backend, against a definition written apart from it."""

import pytest

from tests.kernels.contract import AttentionContract


class TestReference(AttentionContract):
    implementation = "reference"
    random_share = 6

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["blocks of 64", "soft cap, low precision", "an offset for each"])
    def test_optimised(self, name: str):
        super().test_optimised(name)
