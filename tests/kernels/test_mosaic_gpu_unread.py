"""When the Hopper backend has to look for values that no query reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nonfinite import reads_own_position
from s2jax import Dense, FirstTokens, Local, LocalStride, Strided, attention
from s2jax.compiler import compile_schedule

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")

PATTERNS = (
    Dense(),
    Dense(causal=False),
    Local(3, block_size=16),
    LocalStride(16, 1, 4),
    LocalStride(16, 0, 4),
    LocalStride(16, 2, 4, causal=False),
    Strided(16, 4),
    FirstTokens(40),
)


@pytest.mark.parametrize("length", [10, 64, 250])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_who_reads_its_own_position(pattern, length: int):
    sizes = {"num_heads": 4, "num_kv_heads": 2, "query_length": length, "kv_length": length}
    schedule = compile_schedule(pattern, **sizes, query_offset=0)
    every = np.diagonal(schedule.token_mask(), axis1=1, axis2=2).all()
    assert reads_own_position(schedule) == every


def test_queries_elsewhere_have_no_own_position():
    sizes = {"num_heads": 1, "num_kv_heads": 1, "query_length": 64, "kv_length": 128}
    assert not reads_own_position(compile_schedule(Dense(), **sizes, query_offset=0))
    assert not reads_own_position(compile_schedule(Dense(), **sizes, query_offset=64))


@pytest.mark.parametrize(("pattern", "looks"), [(LocalStride(64, 2, 2), False), (Strided(64, 2), True)])
def test_packed_documents_are_all_read(pattern, looks: bool):
    """With one array of ids and a pattern in which every query reads itself, no value is looked at."""
    array, ids = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 256), jnp.int32)

    def chooses(function, *arguments) -> bool:
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
        return "stablehlo.case" in lowered.as_text()

    def packed(query, key, value, ids, others):
        options = {"query_segment_ids": ids, "kv_segment_ids": others, "implementation": "mosaic_gpu"}
        return attention(query, key, value, pattern, **options)

    assert chooses(packed, array, array, array, ids, ids)  # they may differ when it runs
    assert chooses(lambda *arrays: packed(*arrays, arrays[-1]), array, array, array, ids) == looks
