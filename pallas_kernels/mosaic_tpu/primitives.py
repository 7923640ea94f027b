"""Matrix products and lane layouts of the TPU kernels.

A value per row is kept as [rows, LANES], the same in every lane, because vector registers have no narrower shape.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.config import LANES


def dot_nt(a: Array, b: Array) -> Array:
    """a · bᵀ, accumulated in float32."""
    return _dot(a, b, 1)


def dot_nn(a: Array, b: Array) -> Array:
    """a · b, accumulated in float32."""
    return _dot(a, b, 0)


def _dot(a: Array, b: Array, contracted_axis: int) -> Array:
    # The MXU's default precision would round float32 to bfloat16.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((1,), (contracted_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def lanes_to_rows(array: Array) -> Array:
    """Transposes [1, rows] to [rows, LANES], each value in all lanes of its row."""
    return jnp.broadcast_to(array, (LANES, array.shape[1])).T


def rows_to_lanes(array: Array) -> Array:
    """Transposes [rows, LANES], the same in all lanes of a row, to [1, rows]."""
    return array.T[:1]


def broadcast_lanes(array: Array, columns: int) -> Array:
    """Repeats [rows, LANES], the same in all lanes of a row, to [rows, columns]."""
    return jnp.tile(array, (1, columns // LANES))
