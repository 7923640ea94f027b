"""The Hopper kernels compiled for sm_90a: no spills, buffers that fit, the expected products."""

import pytest

import s2jax
from benchmarks.compiled.deviceless import missing
from benchmarks.compiled.ptxas_report import CASES, compiled
from pallas_kernels.mosaic_gpu.sm90.config import (
    SHARED_BYTES,
    choose_config,
    choose_kv_grad_config,
    choose_query_grad_config,
)

QUICK = ("d 256",)


@pytest.mark.skipif(missing("h100") is not None, reason=str(missing("h100")))
@pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")
@pytest.mark.parametrize(
    "case",
    [pytest.param(each, id=each.name, marks=[] if each.name in QUICK else [pytest.mark.slow]) for each in CASES],
)
def test_code(case):
    for row in compiled(case):
        assert not any(row["spills a step"]), row
        assert row["shared KB"] * 1024 <= SHARED_BYTES
        # One loop for full blocks and one for partial blocks.
        assert row["HGMMA"] == [products(case, row)] * (1 if case.selection else 2), row
        # Bulk copies bring one number a token; they may begin at any 16 bytes of shared memory.
        tma, bulk = row["TMA loads, bulk loads"]
        assert tma > 0
        assert (bulk > 0) == ("key" in row["kernel"] or "value" in row["kernel"] or case.segments or case.selection)
        if row["kernel"] == "attend":
            assert row["spilled bytes"] == 0 or case.name.startswith("all together, block 16")
            assert row["shared KB"] * 1024 <= tiles_of(case).shared_bytes(*sizes(case), 3)


def sizes(case) -> tuple[int, int, int]:
    size = case.pattern.block_size if isinstance(case.pattern, s2jax.LocalStride) else 64
    return case.head_dim, case.value_dim, size


def tiles_of(case):
    return case.config or choose_config(case.head_dim, case.value_dim, 64, case.tokens, 1)


def products(case, row) -> int:
    """The number of HGMMA in a step; each sums over 16 features or tokens."""
    d, e, size = sizes(case)
    over_d, over_e = d // 16, e // 16
    if row["kernel"] == "attend":
        return over_d + tiles_of(case).block_kv // 16
    if row["kernel"] == "query_gradient":
        return over_d + over_e + choose_query_grad_config(d, e, size, case.tokens, 1).block_kv // 16
    step = choose_kv_grad_config(d, e, size, case.tokens).block_kv // 16
    return {
        "key_value_gradients": over_d + step + over_e + step,
        "key_gradients": over_d + over_e + step,
        "value_gradients": over_d + step,
    }[row["kernel"]]
