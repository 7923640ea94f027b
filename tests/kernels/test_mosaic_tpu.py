"""The TPU backend in the interpreter, which simulates copies and semaphores and finds races."""

import dataclasses
import typing

import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import TpuTiles
from tests.kernels.cases import Case, Selected
from tests.kernels.contract import AttentionContract

INTERPRETER = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NaN on purpose
class TestInterpreted(AttentionContract):
    implementation = "mosaic_tpu"
    random_share = 8
    tilings: typing.ClassVar = {"small": TpuTiles(heads=1, queries=16, keys=128)}

    @pytest.fixture(autouse=True)
    def interpreted(self):
        with pltpu.force_tpu_interpret_mode(INTERPRETER):
            yield
        # Where the backend refused, nothing ran.
        assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found

    def adapted(self, case: Case) -> Case:
        if case.dtype == "float16":
            case = dataclasses.replace(case, dtype="bfloat16")
        return case

    def refusal(self, case: Case) -> str | None:
        if case.dtype == "float64":
            return "needs dtype bfloat16 or float32, got float64"
        if isinstance(case.pattern, Selected) and case.pattern.block_size < 16:
            return f"needs a block size that is a power of two from 16 to 512, got {case.pattern.block_size}"
        if isinstance(case.pattern, Selected) and case.pattern.query_block % 16:
            return f"needs query blocks of a multiple of 16 tokens, got {case.pattern.query_block}"
        return None
