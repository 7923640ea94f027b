"""The reference backend, against a definition written apart from it."""

from tests.kernels.contract import AttentionContract


class TestReference(AttentionContract):
    implementation = "reference"
    random_share = 6
