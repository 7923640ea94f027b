"""The XLA backend."""

import typing

import jax
import numpy as np
import pytest

from pallas_kernels import XlaConfig, xla
from pallas_kernels.xla import layout
from pallas_kernels.xla.block_lists import entries_per_step
from tests.kernels.cases import BY_NAME, Case, arrays, parameters
from tests.kernels.contract import AttentionContract, arguments
from tests.kernels.transformations import TransformationContract


class TestXla(AttentionContract):
    implementation = "xla"
    random_share = 10
    tilings: typing.ClassVar = {
        # Three rows a tile, packs of three blocks, a few steps; numbers that divide nothing.
        "merged": XlaConfig(block_q=100, block_kv=40, grad_block_kv=50, grad_block_q=70),
        "small": XlaConfig(block_q=1, block_kv=1, grad_block_kv=1, grad_block_q=1),
    }

    @pytest.fixture(autouse=True)
    def many_chunks(self, monkeypatch):
        """So little at a time that units come in many chunks, the last of which is not full."""
        monkeypatch.setattr(layout, "CACHE_BYTES", 1 << 16)

    @pytest.fixture
    def two_passes(self, monkeypatch):
        """The backward pass of platforms other than a CPU, on a CPU."""
        # Programs traced before have the other one.
        monkeypatch.setattr(xla, "ONE_PASS", ())
        jax.clear_caches()
        yield
        jax.clear_caches()

    @pytest.mark.usefixtures("quick_compilation", "two_passes")
    @pytest.mark.parametrize(
        "case",
        parameters(
            "stripes by query head", "offset within a block", "an offset and documents", "selection",
        ),
    )  # fmt: skip
    def test_two_passes(self, case: Case):
        self.check(case)

    def test_one_pass_is_for_the_cpu_alone(self):
        """Exported for a GPU or TPU, nothing is scattered, since the order of a scatter's sums is not fixed there."""
        case = BY_NAME["local stride"]
        given = arguments(case, arrays(case))
        function = self.compiled(case)
        for platform, scatters in (("cpu", True), ("cuda", False), ("tpu", False)):
            exported = jax.export.export(function, platforms=[platform])(*given)
            assert ("stablehlo.scatter" in exported.mlir_module()) == scatters, platform


def test_lists_are_walked_in_steps_that_leave_little_over():
    """Of at most four blocks of 64: eight in two steps, nine in three; many short lists count more than a long one."""
    assert entries_per_step(np.bincount([8, 8]), 4, 64) == 4
    assert entries_per_step(np.bincount([9, 9]), 4, 64) == 3
    assert entries_per_step(np.bincount([2] * 9 + [8]), 4, 64) == 2
    assert entries_per_step(np.bincount([0, 0]), 4, 64) == 1


class TestTransformations(TransformationContract):
    implementation = "xla"
    config = XlaConfig(block_q=64, block_kv=32, grad_block_kv=32, grad_block_q=64)
