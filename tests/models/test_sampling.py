"""Sampling against its definition in float64, at the ends of every range, and where there is nothing to choose from."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.sampling import UNDEFINED, Sampling

LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.25, 0.2], [0.2, 0.2, 0.2, 0.2, 0.2]]))
SIZE, ROWS = 7, 12
INF, NAN = math.inf, math.nan
# Steps that are the same in all dtypes, and the ends of float32's range.
TIES = [[0.25] * SIZE, [1.0, 0.0, 1.0, -0.0, 0.0, -0.0, 0.0], [0.0, 2.0, 2.0, 2.0, -1.0, 2.0, -INF]] * 2
ENDS = [[INF, 1.0, INF, -INF, 0.0, 3e38, INF], [3e38, -3e38, 3e38, 0.0, 1.0, -INF, 1e30]] * 3
VALUES = st.one_of(
    st.integers(-24, 24).map(lambda n: n / 4), st.sampled_from([-INF, INF, 3e38, -3e38, 1e30, 0.0, -0.0])
)
TEMPERATURES = st.sampled_from([0.0, 5e-324, 1e-45, 1e-38, 1e-30, 1e-3, 0.5, 1.0, 2.0, 1e3, 1e30, 3e38, 1e300, INF])
SHARES = st.one_of(st.sampled_from([5e-324, 1e-30, 1e-9, 1.0, 1 - 1e-16]), st.floats(0.01, 0.99))


def reference(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float) -> np.ndarray | None:
    """The distribution of one row, token by token, in float64; None where float32's rounding decides what is kept."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if temperature == 0:
        return np.eye(len(logits))[order[0]]
    order = order[:top_k]
    best = logits[order[0]]
    with np.errstate(over="ignore"):
        distances = [0.0 if logits[token] == best else logits[token] - best for token in order]
        scores = [d if d == -INF or best == INF else d / temperature for d in distances]
    weights = np.exp(scores) / np.exp(scores).sum()
    before = np.cumsum(weights) - weights
    if top_p < 1 and np.abs(before[1:] - top_p).min(initial=1) < 1e-5:
        return None
    kept = before < top_p
    kept[0] = True
    shares = np.zeros(len(logits))
    shares[order] = np.where(kept, weights, 0) / weights[kept].sum()
    return shares


@functools.partial(jax.jit, static_argnums=(0, 3))
def sampled(sampling, logits, key, count):
    """The distribution, and tokens from it."""
    tokens = jax.vmap(lambda key: sampling(logits, key))(jax.random.split(key, count))
    return sampling.probabilities(logits), tokens


@settings(max_examples=settings.default.max_examples // 6)
@given(
    rows=st.lists(st.lists(VALUES, min_size=SIZE, max_size=SIZE), min_size=ROWS, max_size=ROWS),
    temperature=TEMPERATURES,
    top_k=st.one_of(st.none(), st.integers(1, SIZE + 2)),
    top_p=SHARES,
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
@example([*TIES, *ENDS], 1.0, 3, 0.9, "float32")
@example([*TIES, *ENDS], 1e-45, None, 0.6, "bfloat16")
@example([*TIES, *ENDS], INF, 4, 1.0, "float32")
def test_the_distribution_is_its_definition(rows, temperature, top_k, top_p, dtype):
    logits = jnp.asarray([row if max(row) > -INF else [0.0] * SIZE for row in rows], dtype)
    found, tokens = sampled(Sampling(temperature, top_k, top_p), logits, jax.random.key(0), 64)
    for row, shares, drawn in zip(np.asarray(logits, np.float64), np.asarray(found), np.asarray(tokens).T, strict=True):
        expected = reference(row, temperature, top_k, top_p)
        if expected is not None:
            np.testing.assert_allclose(shares, expected, rtol=1e-5, atol=1e-6, err_msg=str(row))
            assert set(drawn.tolist()) <= set(np.flatnonzero(expected).tolist())


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0, INF])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (1, 1.0), (None, 0.5), (3, 1e-30)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_there_is_nothing_to_choose_from_no_token_is_made_up(temperature, top_k, top_p, dtype):
    rows = jnp.array(
        [[NAN] * 4, [-INF] * 4, [1.0, NAN, 3.0, 2.0], [0.0, -INF, NAN, INF], [-INF, -INF, 1.0, -INF]], dtype
    )
    tokens = Sampling(temperature, top_k, top_p)(rows, jax.random.key(0))
    assert tokens.tolist() == [UNDEFINED] * 4 + [2]


def test_a_double_precision_session():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        for dtype in ("float32", "float64"):
            logits = jnp.array([[0.0, 2.0, 2.0, 1.0, -INF]], dtype)
            for temperature in (0.0, 1e-310, 1e300):
                shares, tokens = sampled(Sampling(temperature, 3, 0.99), logits, jax.random.key(0), 8)
                assert tokens.dtype == jnp.int32
                expected = reference(np.asarray(logits[0], np.float64), temperature, 3, 0.99)
                np.testing.assert_allclose(np.asarray(shares)[0], expected, atol=1e-6)
                assert (expected[np.asarray(tokens)] > 0).all()


def test_frequencies_are_those_of_the_tempered_logits():
    _, found = sampled(Sampling(0.5), LOGITS, jax.random.key(1), 2000)
    counts = np.bincount(found[:, 0], minlength=5) / len(found)
    np.testing.assert_allclose(counts, jax.nn.softmax(LOGITS[0] / 0.5), atol=0.04)


def test_frequencies_of_what_is_kept():
    _, found = sampled(Sampling(1.0, top_k=4, top_p=0.7), LOGITS, jax.random.key(1), 2000)
    counts = np.bincount(found[:, 0], minlength=5) / len(found)
    np.testing.assert_allclose(counts, np.array([0, 0.4, 0, 0.25, 0.2]) / 0.85, atol=0.04)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be at least 0, got -1"),
        ({"temperature": -INF}, "temperature must be at least 0, got -inf"),
        ({"temperature": NAN}, "temperature must be at least 0, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, or left out to keep all tokens, got 0"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_p": NAN}, "top_p must be above 0 and at most 1, got nan"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
