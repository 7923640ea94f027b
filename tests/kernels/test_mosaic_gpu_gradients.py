"""The Hopper backend's backward pass in the interpreter: the shared table's gradients."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from s2jax import LocalStride, attention
from tests.kernels.cases import CASES, Case, Selected, parameters
from tests.kernels.contract import traced
from tests.kernels.test_mosaic_gpu import INTERPRETER, SHAPES
from tests.kernels.test_mosaic_gpu import TestInterpreted as Interpreted
from tests.kernels.test_mosaic_gpu_selections import CASES as SELECTIONS

QUICK = (
    "local stride", "soft cap, low precision", "strangers", "an offset for each",
    "stripes by query head", "selection by KV head",
)  # fmt: skip

WIDE = [
    # More features than registers can sum at once.
    Case("wide heads", LocalStride(16, 1, 2), "bfloat16", 1, 70, 70, 2, 1, 192, 128),
]

OTHERS = [each.name for each in CASES if each.name not in QUICK]


def named(*cases: Case) -> list:
    return [pytest.param(case, id=case.name) for case in cases]


LONG = ("soft cap, low precision", "strangers", "an offset for each", "stripes by query head", "wide heads")
"""Of the quick ones, those that take too long: left to the slow tests under the same name."""


def later(names: tuple[str, ...], cases: list) -> list:
    return [
        pytest.param(*each.values, id=each.id, marks=(*each.marks, *([pytest.mark.slow] if each.id in names else [])))
        for each in cases
    ]


class TestGradients(Interpreted):
    test_random_cases = test_optimised = test_shape = test_offsets_beyond_the_keys_and_nan_queries_give_nan = None

    def compiled(self, case: Case):
        config = None if isinstance(case.pattern, Selected) else self.tilings.get(case.tiling)
        return jax.jit(traced(case, self.implementation, config))

    @pytest.mark.usefixtures("quick_compilation")
    @pytest.mark.parametrize("case", later((*LONG, "selection by KV head"), [*parameters(*QUICK), *named(*WIDE)]))
    def test_case(self, case: Case):
        self.check(case)

    @pytest.mark.slow
    @pytest.mark.usefixtures("quick_compilation")
    @pytest.mark.parametrize("case", [*parameters(*OTHERS), *named(*SHAPES, *SELECTIONS)])
    def test_other_case(self, case: Case):
        self.check(case)


@pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NaN on purpose
@pytest.mark.usefixtures("quick_compilation")
def test_a_nan_goes_no_further_than_it_is_read():
    """Of one query's dout, to its own gradient and to those of the keys that it sees: the same bits everywhere else.

    The values' gradients are sums of douts, in which a weight of zero does not help.
    """
    random, pattern, length, bad = np.random.default_rng(0), LocalStride(16, 1, 2), 64, 37
    query, dout = (jnp.asarray(random.standard_normal((1, length, 2, 16)), "bfloat16") for _ in range(2))
    key, value = (jnp.asarray(random.standard_normal((1, length, 1, 16)), "bfloat16") for _ in range(2))

    @jax.jit
    def gradients(query, dout):
        def function(*arrays):
            return attention(*arrays, pattern, implementation="mosaic_gpu")

        return jax.vjp(function, query, key, value)[1](dout)

    with plgpu.force_gpu_interpret_mode(INTERPRETER):
        clean = [np.asarray(each, np.float32) for each in gradients(query, dout)]
        spoilt = [np.asarray(each, np.float32) for each in gradients(query, dout.at[0, bad].set(jnp.nan))]
    seen = pattern.token_mask(2, 1, length, length)[:, bad].any(0)
    assert np.isnan(spoilt[0][0, bad]).all()
    for reached, before, after in zip((np.arange(length) == bad, seen), clean[:2], spoilt[:2], strict=True):
        assert np.isnan(after[0, reached]).all()
        np.testing.assert_array_equal(after[0, ~reached], before[0, ~reached])
