"""Which tokens may come, and how often they do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.sampling import Sampling

LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.25, 0.2], [0.2, 0.2, 0.2, 0.2, 0.2]]))


def allowed(**settings) -> list:
    return [np.flatnonzero(row > -np.inf).tolist() for row in Sampling(1.0, **settings).allowed(LOGITS)]


def test_greedy_takes_the_likeliest():
    assert Sampling()(LOGITS, jax.random.key(0)).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 0.7}, [1, 3, 4]),
        ({"top_k": 2, "top_p": 0.9}, [1, 3]),
    ],
)
def test_which_tokens_may_come(settings, first):
    assert allowed(**settings)[0] == first


def test_frequencies_are_those_of_the_tempered_logits():
    keys = jax.random.split(jax.random.key(1), 4000)
    found = jax.vmap(lambda key: Sampling(0.5)(LOGITS, key))(keys)
    counts = np.bincount(found[:, 0], minlength=5) / len(keys)
    np.testing.assert_allclose(counts, jax.nn.softmax(LOGITS[0] / 0.5), atol=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be at least 0, got -1"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
