"""The XLA backend."""

import typing

import pytest

from pallas_kernels import XlaTiles
from pallas_kernels.xla import walking
from tests.kernels.contract import AttentionContract
from tests.kernels.transformations import TransformationContract


class TestXla(AttentionContract):
    implementation = "xla"
    tilings: typing.ClassVar = {
        # Three rows a tile, packs of three blocks, a few steps; numbers that divide nothing.
        "merged": XlaTiles(queries=100, keys=40, packed_keys=50, walked_queries=70),
        "small": XlaTiles(queries=1, keys=1, packed_keys=1, walked_queries=1),
    }

    @pytest.fixture(autouse=True)
    def many_chunks(self, monkeypatch):
        """So little at a time that units come in many chunks, the last of which is not full."""
        monkeypatch.setattr(walking, "CHUNK_BYTES", 1 << 16)


class TestTransformations(TransformationContract):
    implementation = "xla"
    tiles = XlaTiles(queries=64, keys=32, packed_keys=32, walked_queries=64)
