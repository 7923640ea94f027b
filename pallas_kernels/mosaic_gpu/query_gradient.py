"""The gradient of the queries on Hopper: the tiles, lists and masks of the forward pass, walked once more.

dQ = dS · K times the scale of the logits. A tile is one block of threads' own, so that the bits are always the same.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.gradient import REGISTERS, times, weights_and_slope
from pallas_kernels.mosaic_gpu.launch import barriers, launch, row_buffer
from pallas_kernels.mosaic_gpu.plan import WARPGROUP_ROWS, WARPGROUPS, Plan
from pallas_kernels.mosaic_gpu.products import add_product, two_products
from pallas_kernels.mosaic_gpu.query_tile import QueryTile, shared_memory, tile_grid
from pallas_kernels.mosaic_gpu.steps import ROW, WGMMA, Registers, Step, spread
from pallas_kernels.mosaic_gpu.tables import Inputs
from pallas_kernels.mosaic_gpu.untyped import plgpu


def query_gradient(plan: Plan, inputs: Inputs, factor: float) -> Array:
    """dq [b, t, h, d] in the query's dtype.

    Args:
      inputs: with dout, and with lse and delta of every row.
      factor: what dS · K is multiplied with.
    """
    dquery = jax.ShapeDtypeStruct(inputs.query.shape, plan.dtype)
    # The sums of wide heads leave few for what they are made of.
    registers = Registers(240, 24) if plan.head_dim > 192 else REGISTERS
    tile = functools.partial(QueryGradientTile, plan, factor)
    scratch = shared_memory(plan, inputs, summed="key") | {
        "dout": row_buffer(plan, plan.value_dim),
        "query_ready": barriers(WARPGROUPS, 2 * plan.pieces),
    }
    return launch("query_gradient", tile, inputs, (dquery,), scratch, tile_grid(plan), registers)[0]


class QueryGradientTile(QueryTile):
    """One block of threads: dq of 128 rows."""

    def __init__(self, plan: Plan, factor: float, at: dict, inputs, results: tuple, scratch: dict):
        super().__init__(plan, at, inputs, results, scratch)
        self.factor = factor

    def compute(self) -> None:
        plan, scratch, inputs = self.plan, self.scratch, self.inputs
        self.bring_rows((inputs.query, scratch["query"]), (inputs.dout, scratch["dout"]))
        self.lse, self.delta = (
            plgpu.load(of_rows.at[self.batch, self.heads, self.tile, self.rows], layout=ROW, optimized=False)
            for of_rows in (inputs.lse, inputs.delta)
        )
        start = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, plan.head_dim), jnp.float32), WGMMA)
        self._store(self.fold(self._step, start))

    def _step(self, step: Step, dquery):
        plan, scratch = self.plan, self.scratch
        key, value = scratch["key"].at[step.stage], scratch["value"].at[step.stage]
        plgpu.barrier_wait(scratch["key_ready"].at[step.stage])
        plgpu.barrier_wait(scratch["value_ready"].at[step.stage])
        products, dweights = two_products(
            (scratch["query"].at[self.warpgroup], key.transpose((1, 0))),
            (scratch["dout"].at[self.warpgroup], value.transpose((1, 0))),
            (WARPGROUP_ROWS, plan.step_size),
        )
        plgpu.barrier_arrive(scratch["value_free"].at[step.stage])
        lse, delta = (spread(of_rows, products.shape, 0) for of_rows in (self.lse, self.delta))
        gradient = times(*weights_and_slope(plan, products, lse)) * (dweights - delta)
        if step.mask_stage is not None:
            # The mask goes on last: what is hidden may be NaN.
            gradient = jnp.where(self.allowed(step.mask_stage), gradient, 0)
        dquery = add_product(dquery, gradient.astype(plan.dtype), key, lambda: None)
        plgpu.barrier_arrive(scratch["key_free"].at[step.stage])
        return dquery

    def _store(self, dquery) -> None:
        buffer = self.scratch["query"].at[self.warpgroup]
        buffer[...] = (dquery * self.factor).astype(self.plan.dtype)
        plgpu.commit_smem()
        for head, tokens, rows in self.pieces():
            plgpu.copy_smem_to_gmem(buffer.at[rows], self.results[0].at[self.batch, tokens, head])
        plgpu.wait_smem_to_gmem(0)
