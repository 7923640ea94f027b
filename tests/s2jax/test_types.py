"""What type checkers know of results: an array, or a pair with the log-sum-exp. Checked by pyright, and run."""

import typing

import jax.numpy as jnp
from jax import Array

import s2jax
from s2jax import LocalStride, attention, block_sparse_attention, compile_schedule

PATTERN = LocalStride(16, 2, 1)


def test_array_or_pair():
    query = jnp.ones((1, 20, 2, 8))
    typing.assert_type(attention(query, query, query, PATTERN), Array)
    typing.assert_type(attention(query, query, query, PATTERN, scale=0.5, return_lse=False), Array)
    typing.assert_type(attention(query, query, query, PATTERN, return_lse=True), tuple[Array, Array])
    either = typing.assert_type(
        attention(query, query, query, PATTERN, return_lse=bool(query.ndim)), Array | tuple[Array, Array]
    )
    assert isinstance(either, tuple)
    schedule = compile_schedule(PATTERN, num_heads=2, num_kv_heads=2, query_length=20, kv_length=20)
    out = typing.assert_type(block_sparse_attention(query, query, query, schedule), Array)
    pair = block_sparse_attention(query, query, query, schedule, return_lse=True)
    typing.assert_type(pair, tuple[Array, Array])
    assert out.shape == pair[0].shape == (1, 20, 2, 8)
    assert s2jax.nnx.S2Attention is not s2jax.linen.S2Attention
