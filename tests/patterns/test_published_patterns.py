"""The block patterns that others published, written down here from their formulas.

DKernel: github.com/linxihui/dkernel, `get_sparse_attn_mask` (MIT). Phi-3-small: its modelling code on Hugging Face
(MIT), `_get_sparse_attn_mask_homo_head` and its per-head sibling.
"""

import itertools

import numpy as np
import pytest

from s2jax.patterns import Local, LocalStride, RelativeStride, Strided

BLOCK = 16


def dkernel(num_heads, num_kv_heads, rows, columns, left, right, stride, step, offset, num_dense, causal, relative):
    """bool [h, rows, columns], rows and columns being absolute block indices."""
    i, j = rows[:, None], columns[None, :]
    masks = []
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        if relative:
            outside = np.maximum(i - j - left + 1, 0) + np.maximum(j - i - right + 1, 0)
            mask = outside % stride == 0
        else:
            mask = ((j + kv_head * step + offset) % stride == 0) | ((i - j < left) & (j - i < right))
        mask = mask | (kv_head >= num_kv_heads - num_dense)
        masks.append(mask & (j <= i) if causal else mask)
    return np.stack(masks)


def dkernel_step(num_heads, stride):
    """DKernel's default head_sliding_step."""
    return max(1, stride // num_heads)


def assert_blocks(pattern, num_heads, num_kv_heads, expected, causal=True, offset_blocks=0):
    """Compares token by token: within a read block everything is read, but for what causality hides."""
    _, rows, columns = expected.shape
    tokens = np.kron(expected, np.ones((BLOCK, BLOCK), bool))
    if causal:
        query = offset_blocks * BLOCK + np.arange(rows * BLOCK)
        tokens = tokens & (np.arange(columns * BLOCK) <= query[:, None])
    mask = pattern.token_mask(num_heads, num_kv_heads, rows * BLOCK, columns * BLOCK, offset_blocks * BLOCK)
    np.testing.assert_array_equal(mask, tokens)
    if rows == columns and not offset_blocks:
        np.testing.assert_array_equal(pattern.block_mask(num_heads, num_kv_heads, rows * BLOCK), expected)


GROUPED_HEADS = [(1, 1), (4, 4), (8, 2), (6, 3)]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), GROUPED_HEADS)
@pytest.mark.parametrize(("local", "stride"), [(1, 4), (2, 8), (3, 3), (4, 1)])
@pytest.mark.parametrize("num_dense", [0, 1])
def test_dkernel_causal(num_heads, num_kv_heads, local, stride, num_dense):
    for offset, step in itertools.product((0, 3), (None, 1, 2)):
        step = dkernel_step(num_heads, stride) if step is None else step
        pattern = LocalStride(BLOCK, local, stride, head_step=step, head_offset=offset, num_dense_heads=num_dense)
        block = np.arange(20)
        expected = dkernel(
            num_heads, num_kv_heads, block, block, local, 1, stride, step, offset, num_dense, True, False
        )
        assert_blocks(pattern, num_heads, num_kv_heads, expected)


@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_dkernel_homogeneous_heads(stride):
    block = np.arange(20)
    expected = dkernel(1, 1, block, block, 2, 1, stride, stride, 5, 0, True, False)
    pattern = LocalStride(BLOCK, 2, stride, head_offset=5, homo_head=True)
    assert_blocks(pattern, 8, 4, np.repeat(expected, 8, 0))


@pytest.mark.parametrize("stride", [2, 5])
def test_dkernel_more_keys_than_queries(stride):
    """DKernel's q_start_position: the chunk begins at a later block."""
    rows, columns = 7 + np.arange(9), np.arange(16)
    expected = dkernel(4, 2, rows, columns, 2, 1, stride, 1, 0, 0, True, False)
    pattern = LocalStride(BLOCK, 2, stride, head_step=1)
    assert_blocks(pattern, 4, 2, expected, offset_blocks=7)


@pytest.mark.parametrize("sides", [1, 3, (2, 4)])
@pytest.mark.parametrize("stride", [3, 4])
@pytest.mark.parametrize("num_dense", [0, 1])
def test_dkernel_bidirectional_absolute(sides, stride, num_dense):
    left, right = sides if isinstance(sides, tuple) else (sides, sides)
    block = np.arange(15)
    expected = dkernel(4, 2, block, block, left, right, stride, 2, 1, num_dense, False, False)
    shared = {"head_step": 2, "head_offset": 1, "num_dense_heads": num_dense, "causal": False}
    assert_blocks(LocalStride(BLOCK, sides, stride, **shared), 4, 2, expected, causal=False)
    composed = Strided(BLOCK, stride, **shared) | Local(sides, BLOCK, causal=False)
    assert_blocks(composed, 4, 2, expected, causal=False)


@pytest.mark.parametrize(("causal", "sides"), [(True, 1), (True, 3), (False, 1), (False, 3), (False, (2, 4))])
@pytest.mark.parametrize("stride", [1, 3, 8, 200])
@pytest.mark.parametrize("num_dense", [0, 1])
def test_dkernel_relative(causal, sides, stride, num_dense):
    left, right = sides if isinstance(sides, tuple) else (sides, sides)
    block = np.arange(24)
    expected = dkernel(4, 2, block, block, left, right, stride, None, None, num_dense, causal, True)
    pattern = RelativeStride(BLOCK, sides, stride, homo_head=True, num_dense_heads=num_dense, causal=causal)
    assert_blocks(pattern, 4, 2, expected, causal=causal)


def phi3_small(num_heads, blocks, local, stride, homogeneous):
    """bool [h, blocks, blocks]: (j + h · s + 1) mod V = 0, s = max(1, V // heads); homogeneous (j + 1) mod V = 0."""
    i, j = np.arange(blocks)[:, None], np.arange(blocks)[None, :]
    step = 0 if homogeneous else max(1, stride // num_heads)
    return np.stack([(j <= i) & ((i - j < local) | ((j + head * step + 1) % stride == 0)) for head in range(num_heads)])


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [*GROUPED_HEADS, (32, 8)])
@pytest.mark.parametrize(("local", "stride"), [(1, 4), (2, 8), (4, 16), (16, 8)])
@pytest.mark.parametrize("homogeneous", [False, True])
def test_phi3_small(num_heads, num_kv_heads, local, stride, homogeneous):
    step = max(1, stride // num_heads)
    pattern = LocalStride(
        BLOCK, local, stride, head_step=step, head_offset=1, homo_head=homogeneous, residues="query_head"
    )
    assert_blocks(pattern, num_heads, num_kv_heads, phi3_small(num_heads, 21, local, stride, homogeneous))
