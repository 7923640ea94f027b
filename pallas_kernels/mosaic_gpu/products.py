"""Matrix products of a warpgroup, the one thing that the interpreter computes in another way than the chip.

On the chip they read shared memory at any time until they are waited for; the interpreter's are done at once. There an
operand is read twice, before and after what runs meanwhile: so it finds a buffer that is given back too early, and one
that is waited for too late.
"""

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.untyped import plgpu
from pallas_kernels.platforms import interpreted


def product(first, second, shape: tuple[int, int], meanwhile) -> Array:
    """first · second in float32, both in shared memory; `meanwhile` runs while the tensor cores are busy."""

    def compute(accumulator):
        plgpu.wgmma(accumulator, first, second)
        meanwhile()
        if not interpreted():
            return accumulator[...]
        plgpu.wgmma(accumulator, first, second)
        return accumulator[...] / 2

    return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))


def add_product(total: Array, first: Array, second, meanwhile) -> Array:
    """total + first · second, `first` in registers and `second` in shared memory."""

    def compute(accumulator):
        plgpu.wgmma(accumulator, first, second)
        meanwhile()

    if not interpreted():
        return pl.run_state(compute)(plgpu.ACC.init(total))
    # The interpreter has no such product.
    early = jnp.dot(first, second[...], preferred_element_type=jnp.float32)
    meanwhile()
    late = jnp.dot(first, second[...], preferred_element_type=jnp.float32)
    plgpu.commit_smem()
    return total + (early + late) / 2


def two_products(first: tuple, second: tuple, shape: tuple[int, int]) -> tuple[Array, Array]:
    """Two products of pairs in shared memory, in float32, on the tensor cores one right after the other."""

    def compute(*accumulators):
        for accumulator, (left, right) in zip(accumulators, (first, second), strict=True):
            plgpu.wgmma(accumulator, left, right)
        return tuple(accumulator[...] for accumulator in accumulators)

    return pl.run_scoped(compute, *[plgpu.ACC(shape, jnp.float32)] * 2)
