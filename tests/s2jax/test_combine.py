"""Merging attention over disjoint sets of keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2jax import Dense, FirstTokens, Local, attention, combine
from tests.kernels.cases import EPS

pytestmark = [
    pytest.mark.filterwarnings("ignore::s2jax.PatternWarning"),
    pytest.mark.usefixtures("strict_dtypes"),
]


def inputs(length=48, heads=4, dtype="float32"):
    random = np.random.default_rng(0)
    shapes = [(2, length, heads, 8), (2, length, 2, 8), (2, length, 2, 5)]
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


def whole(query, key, value, sinks=None):
    return attention(query, key, value, Dense(causal=False), sinks=sinks, return_lse=True, implementation="reference")


def in_parts(query, key, value, sinks=None, ends=(5, 20, 48)):
    """The keys in three parts, sinks to the second only."""
    starts = (0, *ends[:-1])
    parts = [
        whole(query, key[:, start:end], value[:, start:end], sinks if index == 1 else None)
        for index, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    return combine(*zip(*parts, strict=True))


def assert_close(found, expected, terms=48):
    """Sums over so many keys, in another order."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        size = max(1, float(jnp.abs(other).max()))
        np.testing.assert_allclose(one, other, rtol=0, atol=terms * EPS["float32"] * size)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_parts_make_the_whole_and_so_do_their_gradients(with_sinks):
    arrays = (*inputs(), np.linspace(-2, 2, 4, dtype=np.float32)) if with_sinks else tuple(inputs())

    def total(function, *arrays):
        out, lse = function(*arrays)
        return (out**2).sum() + jnp.sin(lse).sum(), (out, lse)

    def both(function):
        places = tuple(range(len(arrays)))
        return jax.jit(jax.grad(lambda *each: total(function, *each), places, has_aux=True))(*arrays)

    assert_close(both(in_parts), both(whole))


def test_patterns_that_share_no_key_make_their_union():
    """Neighbours whose queries and keys are far apart, and rows of either part that read nothing."""
    query, key, value = inputs()
    first, window = FirstTokens(10, causal=False), Local(tokens=3)

    def read(pattern, rows=slice(None), **options):
        return attention(query[:, rows], key, value, pattern, return_lse=True, **options)

    # From query 13 on, the window and the first tokens share no key.
    rows = slice(13, None)
    parts = [read(pattern, rows, query_offset=13) for pattern in (first, window)]
    assert_close(combine(*zip(*parts, strict=True)), read(first | window, rows, query_offset=13))


class TestEmptyRows:
    out = jnp.ones((1, 3, 2, 4))
    lse = jnp.zeros((1, 2, 3))
    nothing = jnp.zeros((1, 3, 2, 4)), jnp.full((1, 2, 3), -jnp.inf)

    def test_a_part_that_reads_nothing_changes_nothing(self):
        out, lse = combine([self.nothing[0], self.out], [self.nothing[1], self.lse])
        np.testing.assert_array_equal(out, self.out)
        np.testing.assert_array_equal(lse, self.lse)

    def test_all_read_nothing(self):
        out, lse = combine([self.nothing[0]] * 2, [self.nothing[1]] * 2)
        assert not out.any()
        assert jnp.isneginf(lse).all()

    @pytest.mark.parametrize("others", [0, 1])
    def test_gradients_are_finite(self, others):
        """Whatever the cotangents, those of a part that reads nothing are zero."""

        def total(out, lse, *rest):
            out, lse = combine([out, *rest[:1]], [lse, *rest[1:]])
            return out.sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()

        arrays = *self.nothing, *((self.out, self.lse) if others else ())
        gradients = jax.grad(total, tuple(range(len(arrays))))(*arrays)
        assert all(jnp.isfinite(each).all() for each in gradients)
        assert not gradients[0].any()
        assert not gradients[1].any()

    def test_one_part_is_itself(self):
        out, lse = combine([self.out], [self.lse])
        np.testing.assert_array_equal(out, self.out)
        np.testing.assert_array_equal(lse, self.lse)


def test_far_apart_logits():
    """exp(lse) of neither part is a float32."""
    out = jnp.stack([jnp.full((1, 1, 1, 2), float(index)) for index in range(2)])
    for large in (200.0, -200.0):
        found, lse = combine(list(out), [jnp.full((1, 1, 1), large), jnp.full((1, 1, 1), large)])
        np.testing.assert_array_equal(found, np.full((1, 1, 1, 2), 0.5))
        np.testing.assert_allclose(lse, large + np.log(2), rtol=EPS["float32"])


def test_low_precision_outs_keep_their_dtype():
    query, key, value = inputs(dtype="float32")
    query, key, value = (array.astype("bfloat16") for array in (query, key, value))
    out, lse = in_parts(query, key, value)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    expected = np.asarray(whole(query, key, value)[0], np.float32)
    # Each part is rounded once, and so is the sum.
    np.testing.assert_allclose(
        np.asarray(out, np.float32), expected, rtol=0, atol=2 * EPS["bfloat16"] * abs(expected).max()
    )


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "as many outs as lses, at least one, got 0 and 0"),
        ([(1, 3, 2, 4)], [], "got 1 and 0"),
        (
            [(1, 3, 2, 4), (1, 3, 2, 5)],
            [(1, 2, 3)] * 2,
            r"outs of one shape .* got float32 \(1, 3, 2, 4\), ",
        ),
        ([(3, 2, 4)], [(2, 3)], r"outs of one shape \[b, t, h, e\] and one dtype, got float32 \(3, 2, 4\)"),
        ([(1, 3, 2, 4)], [(1, 3, 2)], r"needs lses \(1, 2, 3\) for outs \(1, 3, 2, 4\), got \(1, 3, 2\)"),
    ],
)
def test_bad_input(outs, lses, message):
    with pytest.raises(ValueError, match=message):
        combine([jnp.zeros(shape) for shape in outs], [jnp.zeros(shape) for shape in lses])


def test_mixed_dtypes():
    shape, lse = (1, 3, 2, 4), jnp.zeros((1, 2, 3))
    with pytest.raises(ValueError, match=r"one dtype, got float32 .* bfloat16"):
        combine([jnp.zeros(shape), jnp.zeros(shape, jnp.bfloat16)], [lse, lse])
