"""The correctness check of the GPU benchmark, at small sizes: right results pass, wrong ones fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s2jax
from benchmarks.cases import Case
from benchmarks.gpu.correctness import bands, compute_truth, mask_rows, sample_rows
from benchmarks.gpu.implementations import RESULTS, make_arrays

CASE = Case("tiny", 2, 4, 2, 16, 2, 4, 512)
PAIRS = 256 * 512
"""Half of the rows."""

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore::s2jax.PatternWarning"),
]


@pytest.fixture(scope="module")
def arrays():
    return make_arrays(CASE)


def results(pattern, arrays, dout, implementation="reference"):
    def function(query, key, value):
        return s2jax.attention(query, key, value, pattern, implementation=implementation)

    out, pull = jax.vjp(function, arrays.query, arrays.key, arrays.value)
    return out, *pull(dout)


def test_rows_are_blocks_and_single_ones():
    rows = sample_rows(128 << 10, 128 << 10)
    assert len(rows) == 512
    assert np.isin(np.arange(64), rows).all()
    assert np.isin((128 << 10) - 1 - np.arange(64), rows).all()
    assert np.diff(rows).max() < 1024
    assert len(np.unique(rows % 128)) > 100
    assert (sample_rows(300, 300) == np.arange(300)).all()
    assert len(sample_rows(1000, 1000, 5000)) == 5


def test_truth_is_that_of_the_token_mask(arrays):
    found = compute_truth(CASE.pattern(), arrays, PAIRS)
    assert 200 < len(found.rows) <= 256  # a row that is sampled twice counts once
    mask = jnp.asarray(CASE.pattern().token_mask(4, 2, 512, 512))
    query, key, value = (each.astype(jnp.float32) for each in (arrays.query, arrays.key, arrays.value))

    def function(query, key, value):
        key, value = jnp.repeat(key, 2, 2), jnp.repeat(value, 2, 2)
        logits = jnp.where(mask, jnp.einsum("bthd,bshd->bhts", query, key) / 4, -jnp.inf)
        return jnp.einsum("bhts,bshe->bthe", jax.nn.softmax(logits), value)

    out, pull = jax.vjp(function, query, key, value)
    exact = out, *pull(mask_rows(found.rows, arrays.dout).astype(jnp.float32))
    assert all(check.error < 1e-5 for check in found.check(exact))


@pytest.mark.parametrize("pattern", [CASE.pattern(), s2jax.Dense()], ids=["strided", "dense"])
def test_right_results_pass(pattern, arrays):
    found = compute_truth(pattern, arrays, PAIRS)
    checks = found.check(results(pattern, arrays, mask_rows(found.rows, arrays.dout)))
    assert [check.name for check in checks if check.name in RESULTS] == list(RESULTS)
    assert all(check.passed for check in checks), checks
    assert found.check((results(pattern, arrays, arrays.dout)[0],))[0].passed


def test_other_patterns_fail(arrays):
    found = compute_truth(CASE.pattern(), arrays, PAIRS)
    dout = mask_rows(found.rows, arrays.dout)
    for other in (s2jax.LocalStride(64, 2, 4, head_offset=1), s2jax.LocalStride(64, 3, 4), s2jax.Dense()):
        checks = found.check(results(other, arrays, dout))
        assert not any(check.passed for check in checks if check.name in RESULTS), other


def test_single_faults_fail(arrays):
    found = compute_truth(CASE.pattern(), arrays, PAIRS)
    right = results(CASE.pattern(), arrays, mask_rows(found.rows, arrays.dout))

    def failing(*results):
        return [check.name for check in found.check(results) if not check.passed]

    row = int(found.rows[-1])
    assert failing(right[0].at[1, row, 3, 5].set(jnp.nan)) == ["out"]
    unsampled = int(np.setdiff1d(np.arange(512), found.rows)[0])
    assert failing(right[0], right[1].at[0, unsampled, 0, 0].set(1e-3)) == ["dquery outside"]
    assert failing(*right[:2], right[2].at[0, 500, 1].add(0.1)) == ["dkey"]
    assert failing(*right[:3], right[3][:, :, ::-1]) == ["dvalue"]


def test_one_forgotten_block_far_down_fails():
    """Among thousands of keys, one block moves the output by less than the rounding of the first rows."""
    arrays = make_arrays(Case("dense", 1, 1, 1, 64, 0, 0, 4096))
    inputs = arrays.query, arrays.key, arrays.value
    right = s2jax.attention(*inputs, s2jax.Dense(), implementation="xla")
    wrong = right.at[0, 4031].set(_without_a_block(arrays, 4031))
    assert jnp.abs(right - wrong).astype(jnp.float32).max() < 2**-6
    found = compute_truth(s2jax.Dense(), arrays, pairs=512 * 4096)
    assert 4031 not in found.rows
    assert all(check.passed for check in found.check((right,), right))
    assert all(check.passed for check in found.check((wrong,)))
    sampled, everywhere = found.check((wrong,), right)
    assert sampled.passed
    assert not everywhere.passed
    assert everywhere.position == 4031


def _without_a_block(arrays, row):
    """The output of a row of the only head, if its last 64 keys are forgotten."""
    query, key, value = (each[0, :, 0].astype(jnp.float32) for each in (arrays.query, arrays.key, arrays.value))
    read = slice(row - 63)
    weights = jax.nn.softmax(key[read] @ query[row] / 8)
    return (weights @ value[read]).astype(arrays.query.dtype)


def test_rows_of_bands_without_samples_are_not_compared(arrays):
    found = compute_truth(CASE.pattern(), arrays, pairs=512)
    (row,) = found.rows
    out = results(CASE.pattern(), arrays, arrays.dout)[0]
    (far, near) = (out.at[0, place].set(9) for place in (0, row - 1))
    assert bands(np.array([0])) < bands(found.rows) == bands(found.rows - 1)
    assert found.check((far,), out)[1].passed
    assert not found.check((out.at[0, 0].set(jnp.nan),), out)[1].passed
    assert not found.check((near,), out)[1].passed


def test_bands_are_powers_of_four():
    assert bands(np.array([0, 2, 3, 14, 15, 62, 63])).tolist() == [0, 0, 1, 1, 2, 2, 3]
