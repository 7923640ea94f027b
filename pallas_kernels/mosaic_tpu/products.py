"""Products on the matrix units, and vectors turned from lanes to rows and back."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.tiles import LANES


def along(first: Array, second: Array) -> Array:
    """first · secondᵀ in float32."""
    return _product(first, second, 1)


def across(first: Array, second: Array) -> Array:
    """first · second in float32."""
    return _product(first, second, 0)


def _product(first: Array, second: Array, axis: int) -> Array:
    # Left to themselves, the matrix units would round float32 to bfloat16.
    precision = jax.lax.Precision.HIGHEST if first.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(first, second, axes, precision=precision, preferred_element_type=jnp.float32)


def to_rows(array: Array) -> Array:
    """[1, rows] -> [rows, LANES], each number in all lanes of its row."""
    return jnp.broadcast_to(array, (LANES, array.shape[1])).T


def to_lanes(array: Array) -> Array:
    """[rows, LANES] -> [1, rows], of what is the same in all lanes of a row."""
    return array.T[:1]
