"""`attention` itself: what it gives back, which implementation it takes, and selections by score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.reference import REFERENCE
from pallas_kernels.xla import XLA
from s2jax import BlockSelection, Dense, LocalStride, XlaConfig, attention, block_sparse_attention, compile_schedule
from tests.kernels.cases import EPS

pytestmark = [
    pytest.mark.filterwarnings("ignore::s2jax.PatternWarning"),
    pytest.mark.usefixtures("strict_dtypes"),
]

PATTERN = LocalStride(16, 1, 2)


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(1, 40, 4, 8), (1, 40, 2, 8), (1, 40, 2, 5)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def test_lse_comes_only_when_asked_for(inputs):
    out, lse = attention(*inputs, PATTERN, return_lse=True)
    assert (out.shape, lse.shape, lse.dtype) == ((1, 40, 4, 5), (1, 4, 40), jnp.float32)
    np.testing.assert_array_equal(attention(*inputs, PATTERN), out)


def test_one_level_down_is_the_same(inputs):
    schedule = compile_schedule(PATTERN, num_heads=4, num_kv_heads=2, query_length=40, kv_length=40)
    np.testing.assert_array_equal(block_sparse_attention(*inputs, schedule), attention(*inputs, PATTERN))


def test_numpy_integers_are_static_offsets(inputs):
    query, key, value = inputs
    found = attention(query[:, 7:], key, value, PATTERN, query_offset=np.int64(7))
    np.testing.assert_array_equal(found, attention(query[:, 7:], key, value, PATTERN, query_offset=7))


class TestImplementations:
    def test_xla_by_default(self, inputs):
        expected = attention(*inputs, PATTERN, implementation="xla", config=XlaConfig())
        np.testing.assert_array_equal(attention(*inputs, PATTERN), expected)

    @pytest.mark.parametrize("names", [["xla", "reference"], ("reference", "xla"), "reference"])
    def test_the_first_that_can(self, inputs, names, monkeypatch):
        """The other is not asked."""
        taken = names if isinstance(names, str) else names[0]
        for backend in {XLA, REFERENCE}:
            if backend.name != taken:
                monkeypatch.setattr(type(backend), "unsupported_reason", None)
        attention(*inputs, PATTERN, implementation=names)

    def test_one_that_refuses_leaves_it_to_the_next(self, inputs, monkeypatch):
        monkeypatch.setattr(type(XLA), "unsupported_reason", lambda *_: "not today")
        found = attention(*inputs, PATTERN, implementation=["xla", "reference"])
        np.testing.assert_array_equal(found, attention(*inputs, PATTERN, implementation="reference"))

    def test_one_for_another_platform_leaves_it_to_the_next(self, inputs):
        query, key, value = (array.astype("bfloat16") for array in inputs)
        found = attention(query, key, value, PATTERN, implementation=["mosaic_gpu", "xla"])
        np.testing.assert_array_equal(found, attention(query, key, value, PATTERN, implementation="xla"))
        with pytest.raises(NotImplementedError, match="mosaic_gpu: needs the platform 'cuda', and this is lowered for"):
            attention(query, key, value, PATTERN, implementation="mosaic_gpu")

    def test_all_that_refuse_give_their_reasons(self, inputs, monkeypatch):
        monkeypatch.setattr(type(XLA), "unsupported_reason", lambda *_: "not today")
        with pytest.raises(NotImplementedError, match="xla: not today"):
            attention(*inputs, PATTERN, implementation="xla")


class TestTopK:
    scores = np.array([[3.0, 1, 2, 9], [0, 5, 4, 9], [7, -np.inf, 8, 9]], np.float32)[None, None]

    @staticmethod
    def chosen(selection: BlockSelection) -> list[list[int]]:
        """The blocks of every row, in the order in which they are read."""
        assert selection.kv_blocks.dtype == selection.counts.dtype == jnp.int32
        rows = zip(np.asarray(selection.kv_blocks)[0, 0], np.asarray(selection.counts)[0, 0], strict=True)
        return [blocks[:count].tolist() for blocks, count in rows]

    def test_the_highest_scores(self):
        found = BlockSelection.top_k(self.scores, 2, block_size=16, query_block=16, causal=False)
        assert self.chosen(found) == [[3, 0], [3, 1], [3, 2]]

    def test_no_block_that_lies_ahead(self):
        found = BlockSelection.top_k(self.scores, 2, block_size=16, query_block=16)
        assert self.chosen(found) == [[0], [1, 0], [2, 0]]

    def test_rows_longer_than_blocks(self):
        found = BlockSelection.top_k(self.scores, 3, block_size=16, query_block=32)
        assert self.chosen(found) == [[0, 1], [3, 1, 2], [3, 2, 0]]

    def test_positions_from_an_offset(self):
        found = BlockSelection.top_k(self.scores, 2, block_size=16, query_block=16, query_offset=jnp.int32(17))
        assert self.chosen(found) == [[0, 2], [3, 1], [3, 2]]

    def test_minus_infinity_is_never_read(self):
        found = BlockSelection.top_k(self.scores, 4, block_size=16, query_block=16, causal=False)
        assert self.chosen(found)[2] == [3, 2, 0]

    def test_all_blocks_are_dense_attention(self, inputs):
        """Under `jit`, where scores come from the inputs; no gradient passes through the choice."""

        def by_scores(query, key, value):
            scores = jnp.broadcast_to(query[:, ::16].mean((0, 2, 3))[None, None, :, None], (1, 1, 3, 3))
            selection = BlockSelection.top_k(scores, 3, block_size=16, query_block=16)
            return attention(query, key, value, selection, implementation="reference").sum()

        def dense(query, key, value):
            return attention(query, key, value, Dense(), implementation="reference").sum()

        found, expected = (jax.jit(jax.grad(each, (0, 1, 2)))(*inputs) for each in (by_scores, dense))
        for one, other in zip(found, expected, strict=True):
            # The same sums over at most 40 keys, compiled otherwise.
            np.testing.assert_allclose(one, other, rtol=0, atol=40 * EPS["float32"] * max(1, float(abs(other).max())))
