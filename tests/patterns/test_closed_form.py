"""Each family's closed form against its rule, and the algebra of bands."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2jax import patterns as p
from s2jax.patterns.bands import UNBOUNDED, Band, intersect, refine
from tests.patterns.families import cases, examples, leaves


def expand(bands, size: int, query: np.ndarray, num_columns: int) -> np.ndarray:
    """What bands read, token by token and straight from the definition of a band: bool [queries, columns · size]."""
    key = np.arange(num_columns * size)
    i, j = query[:, None] // size, key // size
    apart = query[:, None] - key
    found = np.zeros(apart.shape, bool)
    for band in bands:
        limit = band.columns[i % band.period, j]
        found |= (
            (band.block_low <= i - j) & (i - j < band.block_high)
            & (band.token_low <= apart) & (apart < band.token_high) & (key % size < limit)
        )  # fmt: skip
    return found


def sizes_of(pattern):
    """The block sizes in which a pattern may be asked for."""
    own = pattern.schedule_block_size()
    return [size for size in (16, 32, 64, 128) if own % size == 0 or pattern.own_block_size() is None]


def check_closed_form(case):
    pattern, heads, query_length, kv_length, offset = case
    mask = pattern.token_mask(heads.num_heads, heads.num_kv_heads, query_length, kv_length, offset)
    for size in sizes_of(pattern):
        rows = np.arange(offset // size, -(-(offset + query_length) // size))
        num_columns = -(-kv_length // size)
        for head in range(heads.num_heads):
            bands = pattern.bands(heads, head, size, int(rows[-1]) + 1, num_columns)
            query = np.arange(offset, offset + query_length)
            if bands is not None:
                assert all(band.columns.shape[1] == num_columns for band in bands)
                np.testing.assert_array_equal(expand(bands, size, query, num_columns)[:, :kv_length], mask[head])
            check_states(pattern.block_states(heads, head, size, rows, num_columns), mask[head], size, rows, offset)


def check_states(states, mask, size, rows, offset):
    assert states.dtype == np.uint8
    state = states[(np.arange(len(mask)) + offset) // size - rows[0]][:, np.arange(mask.shape[1]) // size]
    assert not mask[state == 0].any()
    assert mask[state == 2].all()


EDGES = [
    *(p.Local(tokens=extent, causal=False) for extent in (0, 1, 7, 64, (0, 9), (9, 0), (3, 70), (70, 3))),
    *(p.Local(tokens=extent) for extent in (0, 1, 63, 64, 65)),
    *(p.Local(extent, 32, causal=False) for extent in (0, 1, 2, (0, 3), (3, 0), (1, 3))),
    *(p.LocalStride(32, extent, 5, causal=False) for extent in (0, 1, (0, 2), (3, 1))),
    *(p.RelativeStride(32, extent, stride) for extent in (1, (3, 1)) for stride in (1, 4, 200)),
    *(p.FirstTokens(count, causal) for count in (0, 1, 32, 33) for causal in (True, False)),
    p.Ranges(((1, 1), (3, 2)), 32, causal=False),
    p.Ranges(((2, 1), (None, 3)), 32, causal=False),
]


@pytest.mark.parametrize("pattern", EDGES, ids=repr)
def test_edges_of_every_family(pattern):
    check_closed_form((pattern, p.HeadGroups(2, 2), 200, 210, 40))


@examples(6)
@given(cases(of=leaves))
def test_every_family_reads_what_its_bands_say(case):
    check_closed_form(case)


@examples(6)
@given(cases())
def test_compositions_read_what_their_bands_say(case):
    check_closed_form(case)


@examples(2)
@given(cases())
def test_heads_of_one_key_read_the_same(case):
    pattern, heads, query_length, kv_length, offset = case
    mask = pattern.token_mask(heads.num_heads, heads.num_kv_heads, query_length, kv_length, offset)
    for head in range(heads.num_heads):
        for other in range(head):
            if pattern.head_key(heads, head) == pattern.head_key(heads, other):
                np.testing.assert_array_equal(mask[head], mask[other])


@st.composite
def bands(draw, size: int, columns: int):
    """Any band, those that no family makes included: limits of any size, whatever the row."""
    random = np.random.default_rng(draw(st.integers(0, 999)))
    limits = random.integers(0, size + 1, (draw(st.integers(1, 3)), columns)).astype(np.int32)
    block_ends = st.one_of(st.just(UNBOUNDED), st.integers(-4, 6))
    token_ends = st.one_of(st.just(UNBOUNDED), st.integers(-150, 150))
    return Band(limits, -draw(block_ends), draw(block_ends), -draw(token_ends), draw(token_ends))


@examples(2)
@given(bands(32, 6), bands(32, 6))
def test_bands_intersect(first, second):
    query, met = np.arange(300), intersect(first, second)
    both = expand([first], 32, query, 6) & expand([second], 32, query, 6)
    np.testing.assert_array_equal(expand([met] if met else [], 32, query, 6), both)


@examples(2)
@given(bands(64, 6), st.sampled_from([2, 4]))
def test_bands_refine(band, ratio):
    query, fine = np.arange(400), 64 // ratio
    found = refine(band, ratio, fine, 6 * ratio)
    pieces = [expand([each], fine, query, 6 * ratio) for each in found]
    times = np.sum(pieces, axis=0) if pieces else np.zeros((400, 6 * 64), int)
    np.testing.assert_array_equal(times, expand([band], 64, query, 6))  # each pair in one piece only


def test_bands_take_linear_memory():
    pattern = p.Ranges(((2, 1), (8, 2), (None, 8))) & p.Local(tokens=5000) | p.FirstTokens(4) | p.LocalStride(128)
    columns = 1 << 14
    found = pattern.bands(p.HeadGroups(8, 8), 3, 64, columns, columns)
    assert found is not None
    assert sum(band.columns.nbytes for band in found) <= 16 * columns * 4


@dataclasses.dataclass(frozen=True)
class PowersOfTwo(p.BlockPattern):
    """A family that knows only its rule, as in docs/patterns.md."""

    block_size: int = 32
    causal: bool = True

    def mask_fn(self, head, query_position, key_position, heads):
        distance = query_position // self.block_size - key_position // self.block_size
        return (distance & (distance - 1) == 0) & (key_position <= query_position)

    def block_bands(self, heads, head, num_rows, num_columns):
        return None


def test_a_family_that_knows_only_its_rule():
    heads = p.HeadGroups(2, 1)
    for pattern in (PowersOfTwo(), PowersOfTwo() | p.FirstTokens(5), PowersOfTwo() & p.Local(tokens=200)):
        check_closed_form((pattern, heads, 390, 400, 11))
    blocks = PowersOfTwo().block_mask(2, 1, 300)[1]
    assert [j for j in range(10) if blocks[9, j]] == [1, 5, 7, 8, 9]
