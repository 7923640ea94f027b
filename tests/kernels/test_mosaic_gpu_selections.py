"""Selections in the Hopper kernel, with rows of queries that fill tiles: more than one row, and of them one that reads.

Cut to the kernel's tiles, the selections of the case table have one row or two, of which the last reads nothing.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
import pytest

from tests.kernels import test_mosaic_gpu
from tests.kernels.cases import Case, Selected

CASES = [
    Case(
        "from an offset", Selected(heads=2, query_block=64, most=5), "bfloat16", 2, 100, 140,
        offsets=(30, 3), traced=True,
    ),
    Case("both ways", Selected(causal=False, heads=2, query_block=64, most=6), "bfloat16", 2, 100, 90),
    # Three tiles of 128 queries, the first two of one row.
    Case(
        "two tiles a row", Selected(block_size=32, query_block=256, heads=2, most=5), "bfloat16", 1, 300, 200,
    ),
]  # fmt: skip


@pytest.mark.usefixtures("strict_dtypes", "quick_compilation")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(
    "case",
    [pytest.param(each, marks=[] if each.name == "both ways" else [pytest.mark.slow]) for each in CASES],
    ids=[each.name for each in CASES],
)
def test_selection(case: Case):
    with plgpu.force_gpu_interpret_mode(test_mosaic_gpu.INTERPRETER):
        test_mosaic_gpu.TestInterpreted().check(case)
    assert not test_mosaic_gpu.gpu_callbacks.get_races().races_found
