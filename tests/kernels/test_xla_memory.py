"""What the XLA backend keeps for its backward pass, and what it needs meanwhile: O(n · d) where logits are O(n²)."""

import jax
import jax.numpy as jnp

from pallas_kernels.xla import layout
from s2jax import LocalStride, attention

HEADS, FEATURES = 8, 64


def attend(query, key, value):
    return attention(query, key, value, LocalStride(64, 8, 8), return_lse=True, implementation="xla")


def shapes(length: int):
    tensor = jax.ShapeDtypeStruct((1, length, HEADS, FEATURES), jnp.float32)
    return [tensor] * 3, (tensor, jax.ShapeDtypeStruct((1, HEADS, length), jnp.float32))


def temporaries(length: int) -> int:
    """Bytes that the forward and the backward pass together need besides their arguments and results."""

    def both(inputs, cotangents):
        results, pull = jax.vjp(attend, *inputs)
        return results, pull(cotangents)

    return jax.jit(both).lower(*shapes(length)).compile().memory_analysis().temp_size_in_bytes


def test_residuals_are_the_inputs_out_and_lse():
    inputs, (out, lse) = shapes(1 << 13)
    kept = jax.tree.leaves(jax.eval_shape(lambda *arrays: jax.vjp(attend, *arrays)[1], *inputs))
    assert sorted(array.size for array in kept) == sorted(array.size for array in (*inputs, out, lse))


def test_temporaries_are_a_few_tensors_and_a_few_chunks():
    """Inputs, dout and gradients once more, in the order of blocks; and what is computed at a time."""
    length = 1 << 13
    tensor = length * HEADS * FEATURES * 4
    needed = temporaries(length)
    assert needed <= 8 * tensor + 8 * layout.CACHE_BYTES
    assert temporaries(2 * length) <= 2 * needed
