"""The TPU backend in the interpreter, which simulates copies and semaphores and finds races."""

import dataclasses
import typing

import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import TpuTiles
from tests.kernels.cases import Case, Selected
from tests.kernels.contract import AttentionContract

INTERPRETER = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NaN on purpose
class TestInterpreted(AttentionContract):
    implementation = "mosaic_tpu"
    random_share = 8
    tilings: typing.ClassVar = {
        "small": TpuTiles(heads=1, queries=16, keys=128),
    }

    @pytest.fixture(autouse=True)
    def interpreted(self):
        with pltpu.force_tpu_interpret_mode(INTERPRETER):
            yield

    def adapted(self, case: Case) -> Case:
        if case.dtype == "float16":
            case = dataclasses.replace(case, dtype="bfloat16")
        chosen = case.pattern
        if isinstance(chosen, Selected) and chosen.query_block % 16 and case.name != "selection, short rows":
            case = dataclasses.replace(case, pattern=dataclasses.replace(chosen, query_block=16))
        return case

    def refusal(self, case: Case) -> str | None:
        if case.dtype == "float64":
            return "needs dtype bfloat16 or float32, got float64"
        return None
