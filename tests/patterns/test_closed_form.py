"""Each family's closed form against its rule."""

import numpy as np
from hypothesis import given

from s2jax.patterns import Heads
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


def test_bands_take_linear_memory():
    from s2jax import patterns as p

    pattern = p.Ranges(((2, 1), (8, 2), (None, 8))) & p.Local(tokens=5000) | p.FirstTokens(4) | p.LocalStride(128)
    columns = 1 << 14
    bands = pattern.bands(Heads(8, 8), 3, 64, columns, columns)
    assert sum(band.columns.nbytes for band in bands) <= 16 * columns * 4
