"""Statistics against counting, and the published figures."""

import time
import warnings

import numpy as np
import pytest
from hypothesis import given

from s2jax import patterns as p
from tests.patterns.families import cases, examples


def counted_blocks(mask, size):
    """Blocks of which a token is read: bool [h, n, n]."""
    h, length, _ = mask.shape
    n = -(-length // size)
    padded = np.zeros((h, n * size, n * size), bool)
    padded[:, :length, :length] = mask
    return padded.reshape(h, n, size, n, size).any((2, 4))


def never_again(columns, causal):
    """bool [rows, n] of one KV head: whether no block is read after a row that does not read it."""
    for j, readers in enumerate(columns.T):
        rows = np.flatnonzero(readers)
        if len(rows) and (rows[-1] - rows[0] + 1 != len(rows) or (causal and rows[0] != j)):
            return False
    return True


def most_kept(columns, causal):
    """Simulates the cache of one KV head block by block."""
    n = len(columns)
    last = [max(np.flatnonzero(readers), default=-1) for readers in columns.T]
    return max(sum(last[j] >= max(i, 0) for j in range(i + 1 if causal else n)) for i in range(n))


def far_share(blocks):
    """Coverage straight from its definition."""
    h, n, _ = blocks.shape
    diagonals = [all(np.diagonal(blocks[head], -d).all() for head in range(h)) for d in range(n)]
    window = diagonals.index(False) if False in diagonals else n
    far = blocks[:, -1, : n - window].any(0)
    return far.mean() if far.size else 1.0


def check_statistics(pattern, heads, length):
    counts = (heads.num_heads, heads.num_kv_heads, length)
    blocks = counted_blocks(pattern.token_mask(*counts, length), pattern.schedule_block_size())
    n = blocks.shape[1]
    np.testing.assert_array_equal(pattern.block_mask(*counts), blocks)
    everything = n * (n + 1) / 2 if pattern.causal else n * n
    assert pattern.density(*counts) == pytest.approx(blocks.sum() / (heads.num_heads * everything))
    assert pattern.coverage(*counts) == pytest.approx(far_share(blocks))
    by_kv_head = blocks.reshape(heads.num_kv_heads, heads.group, n, n).any(1)
    assert pattern.is_kv_efficient(*counts) == all(never_again(each, pattern.causal) for each in by_kv_head)
    kept = pattern.kv_blocks_kept(*counts)
    np.testing.assert_array_equal(kept, [most_kept(each, pattern.causal) for each in by_kv_head])


@examples(5)
@given(cases())
def test_statistics_equal_counting(case):
    pattern, heads, length, *_ = case
    check_statistics(pattern, heads, length)


@pytest.mark.parametrize("length", [1, 64, 65, 190, 257])
@pytest.mark.parametrize(
    "pattern",
    [
        p.Local(tokens=100) & p.FirstTokens(30),
        p.Local(tokens=65) & p.FirstTokens(130),
        p.Local(tokens=(0, 9), causal=False),
        p.Local(tokens=(70, 3), causal=False),
        p.LocalStride(64, 1, 2) | p.Local(tokens=65),
        p.LocalStride(16, 2, 3) | p.LocalStride(64, 1, 2),
        p.Strided(32, 3),
        p.RelativeStride(16, 2, 3),
        p.RelativeStride(16, 2, 200, causal=True),
        p.PerHead([p.Dense(), p.Local(1), p.Strided(16, 2), p.Local(2, 16)]),
    ],
    ids=repr,
)
def test_statistics_at_the_edges(pattern, length):
    check_statistics(pattern, p.HeadGroups(4, 2), length)


POINTS = {  # h, k, local blocks, stride, length, density: benchmark points, blocks over causal blocks
    "dkernel-32k": (16, 16, 8, 16, 1 << 15, 0.0915),
    "dkernel-32k-v4": (16, 16, 8, 4, 1 << 15, 0.273),
    "phi3-8k": (32, 8, 16, 8, 1 << 13, 0.329),
    "phi3-128k": (32, 8, 16, 8, 1 << 17, 0.139),
    "s2-1.3b-128k": (16, 16, 1, 16, 1 << 17, 0.063),
    "s2-7b-128k": (32, 32, 1, 32, 1 << 17, 0.032),
    "s2-70b-128k": (64, 64, 1, 64, 1 << 17, 0.0166),
}


@pytest.mark.parametrize("name", POINTS)
def test_published_densities(name):
    h, k, local, stride, length, expected = POINTS[name]
    pattern = p.LocalStride(64, local, stride)
    digits = len(f"{expected}") - 2
    assert round(pattern.density(h, k, length), digits) == expected
    assert pattern.coverage(h, k, length) == 1.0
    assert pattern.is_kv_efficient(h, k, length)


def test_half_the_context_with_eight_kv_heads_and_stride_sixteen():
    assert p.LocalStride(64, 16, 16, head_step=1).coverage(8, 8, 1 << 17) == 0.5
    assert p.LocalStride(64, 16, 16).coverage(8, 8, 1 << 17) == 0.5
    assert p.LocalStride(64, 16, 16, num_dense_heads=1).coverage(8, 8, 1 << 17) == 1.0
    assert p.LocalStride(64, 16, 16, residues="query_head").coverage(16, 8, 1 << 17) == 1.0


def test_group_residues_keep_an_eighth_where_phi3_keeps_half():
    grouped = p.LocalStride(64, 16, 8)
    np.testing.assert_array_equal(grouped.kv_blocks_kept(32, 8, 1 << 17), [270] * 8)  # of 2,048: 13.2 %
    phi3 = p.LocalStride(64, 16, 8, head_step=1, head_offset=1, residues="query_head")
    np.testing.assert_array_equal(phi3.kv_blocks_kept(32, 8, 1 << 17), [1032] * 8)


def test_a_kv_head_keeps_what_any_head_of_its_group_reads():
    pattern = p.PerHead([p.Local(1), p.Local(1), p.Local(1), p.Local(5)])
    np.testing.assert_array_equal(pattern.kv_blocks_kept(4, 2, 64 * 20), [1, 5])


@pytest.mark.parametrize(
    ("ranges", "efficient"),
    [
        (((2, 1), (None, 3)), True),
        (((2, 1), (8, 2), (None, 8)), True),
        (((1, 2), (5, 4), (None, 12)), True),
        (((2, 1), (8, 2), (20, 4)), True),
        (((2, 1), (8, 2), (None, 3)), False),
        (((2, 1), (8, 4), (None, 2)), False),
    ],
)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (8, 4), (16, 16)])
@pytest.mark.parametrize("step", [None, 1, 3])
def test_ranges_never_read_again_if_each_stride_divides_the_next(ranges, efficient, heads, step):
    assert p.Ranges(ranges, 16, head_step=step).is_kv_efficient(*heads, 16 * 60) == efficient


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("strides", [(2, 4), (2, 6, 12), (4, 16), (1, 8)])
def test_nested_residues_spread_over_every_stride(num_kv_heads, strides):
    ranges = tuple((bound, stride) for bound, stride in zip((2, 4, 6), strides, strict=False))
    pattern, heads = p.Ranges(ranges, 16), p.HeadGroups(num_kv_heads, num_kv_heads)
    for place, stride in enumerate(strides):
        used = [pattern.residues_of(heads, head)[place] for head in range(num_kv_heads)]
        assert len(set(used)) == min(stride, num_kv_heads)


def test_strides_that_do_not_divide_are_spread_each_for_itself():
    pattern = p.Ranges(((2, 2), (None, 3)), head_offset=1)
    assert [pattern.residues_of(p.HeadGroups(6, 6), head) for head in range(6)] == [
        ((head * 2 // 6 + 1) % 2, (head * 3 // 6 + 1) % 3) for head in range(6)
    ]


def test_local_stride_is_a_case_of_ranges():
    for heads in [(1, 1), (6, 3), (8, 8)]:
        stride, ranges = p.LocalStride(16, 3, 5), p.Ranges(((3, 1), (None, 5)), 16)
        np.testing.assert_array_equal(stride.block_mask(*heads, 500), ranges.block_mask(*heads, 500))


@pytest.mark.parametrize("length", [1 << 17, 1 << 20])
@pytest.mark.parametrize(
    "pattern",
    [
        p.LocalStride(64, 16, 8, residues="query_head"),
        p.Ranges(((16, 1), (64, 4), (None, 32))) & p.Local(tokens=500_000) | p.FirstTokens(4),
        p.LocalStride(16, 64, 32) | p.LocalStride(64, 16, 8),
    ],
    ids=["stripes", "composition", "mixed block sizes"],
)
def test_statistics_are_quick_at_long_lengths(pattern, length):
    begin = time.process_time()
    counts = (32, 8, length)
    assert 0 < pattern.density(*counts) < 0.5
    assert pattern.coverage(*counts) > 0.1
    pattern.is_kv_efficient(*counts)
    assert (pattern.kv_blocks_kept(*counts) > 0).all()
    assert time.process_time() - begin < (2 if length <= 1 << 17 else 20)


def warning_of(pattern, *counts):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pattern.warn_if_incomplete(*counts)
    assert all(issubclass(each.category, p.PatternWarning) for each in caught)
    return " ".join(str(each.message) for each in caught)


def test_a_stride_that_misses_context_warns_with_the_share():
    text = warning_of(p.LocalStride(64, 16, 16), 8, 8, 1 << 17)
    assert "50%" in text
    assert "num_dense_heads=1" in text
    assert "12%" in warning_of(p.LocalStride(64, 16, 8, homo_head=True), 8, 8, 1 << 17)


def test_queries_that_miss_their_own_block_warn():
    for pattern in [p.Strided(), p.LocalStride(64, 0, 8), p.FirstTokens(4), p.PerHead([p.Dense()] * 7 + [p.Strided()])]:
        assert "own block" in warning_of(pattern, 8, 8, 1 << 13)
    mask = np.ones((1, 4, 4), bool)
    mask[0, 2, 2] = False
    assert "own block" in warning_of(p.BlockMask(mask), 8, 8, 256)


@pytest.mark.parametrize(
    "pattern",
    [
        p.LocalStride(64, 16, 8),
        p.LocalStride(64, 16, 16, num_dense_heads=1),
        p.Local(4),
        p.Local(tokens=100) | p.FirstTokens(4),
        p.Dense(),
        p.BlockMask(np.eye(128, dtype=bool)[None]),
        p.Ranges(((4, 1), (32, 8))),
        p.Strided() | p.Local(tokens=100),
    ],
    ids=repr,
)
def test_what_is_complete_or_local_on_purpose_does_not_warn(pattern):
    assert warning_of(pattern, 8, 8, 1 << 13) == ""
