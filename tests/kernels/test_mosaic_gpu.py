"""The Hopper backend in the interpreter, which simulates warpgroups, copies and barriers and finds races.

Here the forward pass alone; the gradients are in test_mosaic_gpu_gradients.py.
"""

import dataclasses
import typing

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels import HopperConfig
from s2jax import FirstTokens, Local, LocalStride
from tests.kernels.cases import Case, Selected, parameters
from tests.kernels.contract import AttentionContract, traced_forward

INTERPRETER = plgpu.InterpretGPUParams(detect_races=True)

SHAPES = [
    # Two heads in a warpgroup, accumulators of two widths with padding, rings that go round more than once.
    Case(
        "four heads a tile", LocalStride(16, 5, 3), "bfloat16", 1, 160, 160, 8, 2, 24, 40,
        scale=-0.3, sinks=True, tiling="four heads",
    ),
    # A block comes in two steps, and every row has several words of mask for each.
    Case(
        "half a block a step", LocalStride(128, 1, 2) & (Local(tokens=170) | FirstTokens(70)), "float16", 1, 300, 300,
        2, 1, tiling="half blocks",
    ),
    # A block comes in steps of half a word of mask each.
    Case(
        "half a word a step", LocalStride(64, 1, 2) & Local(tokens=77), "float16", 1, 150, 150, 2, 1, tiling="small",
    ),
    # Tiles of two heads, which choose their own blocks.
    Case(
        "two heads a tile", Selected(block_size=32, query_block=128, heads=2, most=5), "bfloat16", 1, 200, 200,
        num_heads=4, num_kv_heads=2, sinks=True,
    ),
]  # fmt: skip
"""What this backend alone has."""

QUICK = (
    "strangers", "an offset for each", "selection for each", "half a block a step",
)  # fmt: skip
"""Cases that are not left to the slow tests; the gradients' tests check the forward pass too."""


def less(cases: list) -> list:
    """The cases, marked slow where they are not quick."""
    slow = pytest.mark.slow
    return [pytest.param(*each.values, id=each.id, marks=[] if each.id in QUICK else [slow]) for each in cases]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NaN on purpose
class TestInterpreted(AttentionContract):
    implementation = "mosaic_gpu"
    random_share = 8
    tilings: typing.ClassVar = {
        "small": HopperConfig(heads_per_tile=1, block_kv=16, num_stages=2),
        "four heads": HopperConfig(heads_per_tile=4, block_kv=32, num_stages=2),
        "half blocks": HopperConfig(heads_per_tile=1, block_kv=64, num_stages=3),
    }

    test_gradients_show_the_pattern = None  # of gradients there are none here

    @pytest.fixture(autouse=True)
    def interpreted(self):
        with plgpu.force_gpu_interpret_mode(INTERPRETER):
            yield
        # Where the backend refused, nothing ran.
        assert gpu_callbacks._races is None or not gpu_callbacks.get_races().races_found

    def adapted(self, case: Case) -> Case:
        if case.dtype == "float32":
            case = dataclasses.replace(case, dtype="bfloat16")
        chosen = case.pattern
        if isinstance(chosen, Selected) and chosen.query_block % 64 and case.name != "selection, short rows":
            # Rows of queries that fill a tile, with two heads or with one.
            rows = 128 if chosen.heads == case.num_heads else 64
            case = dataclasses.replace(case, pattern=dataclasses.replace(chosen, query_block=rows))
        return case

    def refusal(self, case: Case) -> str | None:
        if case.dtype == "float64":
            return "needs dtype bfloat16 or float16, got float64"
        if isinstance(case.pattern, Selected) and case.pattern.block_size < 16:
            return f"needs a block size of 16, 32, 64, 128, got {case.pattern.block_size}"
        if isinstance(case.pattern, Selected) and case.pattern.query_block % 64:
            return "needs query blocks that fill a tile of 128 rows"
        return None

    def compiled(self, case: Case):
        config = None if isinstance(case.pattern, Selected) else self.tilings.get(case.tiling)
        forward = jax.jit(traced_forward(case, self.implementation, config))

        def function(query, key, value, sinks, rest, dout, dlse):
            # One at a time: the interpreter's threads would wait for those that XLA needs.
            return *jax.block_until_ready(forward(query, key, value, sinks, rest)), None, None, None, None

        return function

    @pytest.mark.usefixtures("quick_compilation")
    @pytest.mark.parametrize("case", less(parameters()))
    def test_case(self, case: Case):
        self.check(case)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["an offset for each"])  # what XLA computes here is little
    def test_optimised(self, name: str):
        super().test_optimised(name)

    @pytest.mark.slow
    def test_random_cases(self):
        super().test_random_cases()

    @pytest.mark.slow
    def test_offsets_beyond_the_keys_and_nan_queries_give_nan(self):
        super().test_offsets_beyond_the_keys_and_nan_queries_give_nan()

    @pytest.mark.usefixtures("quick_compilation")
    @pytest.mark.parametrize("case", less([pytest.param(case, id=case.name) for case in SHAPES]))
    def test_shape(self, case: Case):
        self.check(case)
