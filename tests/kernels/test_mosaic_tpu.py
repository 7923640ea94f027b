"""The TPU backend in the interpreter, which simulates copies and semaphores and finds races."""

import dataclasses
import typing

import jax
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import TpuConfig
from pallas_kernels.mosaic_tpu import entries
from s2jax import LocalStride
from tests.kernels.cases import Case, Selected, parameters
from tests.kernels.contract import AttentionContract, traced

QUICK = ("local stride",)
"""Cases of the table that are not left to the slow tests."""

INTERPRETER = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


SHAPES = [
    # Whole blocks that nobody reads, with not one entry in the list: what stands there is not to be seen.
    Case("nothing read of whole blocks", LocalStride(16, 0, 8, head_offset=1), "bfloat16", 1, 48, 48, 2, 2),
    # Tiles that read nothing between others that do.
    Case("tiles without keys", LocalStride(16, 0, 4, head_offset=1), "bfloat16", 1, 90, 90, 2, 2, tiling="small"),
    # Several tiles, of which some walk steps by twos without a mask, by twos with one, and alone.
    Case("many turns", LocalStride(16, 2, 2), "bfloat16", 1, 620, 620, 2, 2, tiling="turns"),
    # A block comes in pieces, and rows have several words of masks for it.
    Case("blocks of 256", LocalStride(256, 1, 2), "bfloat16", 1, 300, 300, 2, 1, tiling="pieces"),
    # More heads of a group than fit into a step: rounds, over the same lists.
    Case("six heads in rounds", LocalStride(16, 2, 3), "bfloat16", 1, 40, 40, 6, 1, sinks=True),
]
"""What this backend alone has."""


def named(*cases: Case) -> list:
    return [pytest.param(case, id=case.name) for case in cases]


def slow_but(quick: tuple[str, ...], cases: list) -> list:
    slow = pytest.mark.slow
    return [pytest.param(*each.values, id=each.id, marks=[] if each.id in quick else [slow]) for each in cases]


SHARED = [each for each in (*parameters(), *named(*SHAPES)) if not isinstance(each.values[0].pattern, Selected)]
"""Those with lists that rows can share: a selection has none."""


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NaN on purpose
class TestInterpreted(AttentionContract):
    implementation = "mosaic_tpu"
    random_share = 8
    tilings: typing.ClassVar = {
        "small": TpuConfig(heads_per_tile=1, block_q=16, block_kv=128),
        "turns": TpuConfig(heads_per_tile=1, block_q=64, block_kv=128),
        "pieces": TpuConfig(heads_per_tile=2, block_q=256, block_kv=128),
    }

    test_optimised = None  # of what XLA computes here, there is little

    @pytest.mark.usefixtures("quick_compilation")
    @pytest.mark.parametrize("case", slow_but(QUICK, parameters()))
    def test_case(self, case: Case):
        self.check(case)

    @pytest.mark.usefixtures("quick_compilation")
    @pytest.mark.parametrize("case", slow_but(("tiles without keys",), named(*SHAPES)))
    def test_shape(self, case: Case):
        self.check(case)

    @pytest.fixture
    def no_room(self, monkeypatch):
        """For lists in which every row has its own entries."""
        remembered = entries.q_tables, entries.kv_tables
        monkeypatch.setattr(entries, "MAX_PADDED_BYTES", -1)
        for each in remembered:
            each.cache_clear()
        yield
        for each in remembered:
            each.cache_clear()

    @pytest.mark.usefixtures("quick_compilation", "no_room")
    @pytest.mark.parametrize("case", slow_but((), SHARED))
    def test_rows_that_share_lists(self, case: Case):
        self.check(case)

    @pytest.mark.slow
    def test_offsets_beyond_the_keys_and_nan_queries_give_nan(self):
        super().test_offsets_beyond_the_keys_and_nan_queries_give_nan()

    @pytest.mark.slow
    def test_random_cases(self):
        super().test_random_cases()

    @pytest.mark.slow
    @pytest.mark.parametrize("case", parameters("local stride both ways", "strangers", "an offset for each"))
    def test_gradients_show_the_pattern(self, case: Case):
        super().test_gradients_show_the_pattern(case)

    @pytest.fixture(autouse=True)
    def interpreted(self):
        with pltpu.force_tpu_interpret_mode(INTERPRETER):
            yield
        # Where the backend refused, nothing ran.
        assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found

    def compiled(self, case: Case):
        config = self.tilings.get(case.tiling)
        if (
            config is not None
            and not isinstance(case.pattern, Selected)
            and case.pattern.schedule_block_size() > config.block_q
        ):
            config = None
        return jax.jit(traced(case, self.implementation, config))

    def adapted(self, case: Case) -> Case:
        if case.dtype == "float16":
            case = dataclasses.replace(case, dtype="bfloat16")
        return case

    def refusal(self, case: Case) -> str | None:
        if case.dtype == "float64":
            return "needs dtype bfloat16 or float32, got float64"
        if isinstance(case.pattern, Selected) and case.pattern.block_size < 16:
            return f"needs a block size that is a power of two from 16 to 512, got {case.pattern.block_size}"
        if isinstance(case.pattern, Selected) and case.pattern.query_block not in (16, 32, 64, 128, 256, 512):
            return f"needs query blocks of a power of two from 16, got {case.pattern.query_block}"
        return None
