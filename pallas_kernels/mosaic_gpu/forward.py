"""Forward attention on Hopper.

A tile is 128 rows: 128 consecutive queries of a head, or fewer queries of several heads that read the same keys. The
two warpgroups take turns, as in FlashAttention-3: while one multiplies matrices, the other exponentiates.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.launch import barriers, launch, row_buffer
from pallas_kernels.mosaic_gpu.plan import LOG2E, WARPGROUP_ROWS, WARPGROUPS, Plan
from pallas_kernels.mosaic_gpu.products import add_product, product
from pallas_kernels.mosaic_gpu.query_tile import QueryTile, shared_memory, tile_grid
from pallas_kernels.mosaic_gpu.steps import ROW, WGMMA, Step, spread
from pallas_kernels.mosaic_gpu.tables import Inputs
from pallas_kernels.mosaic_gpu.untyped import plgpu

LOWEST = -0.5 * float(np.finfo(np.float32).max)
"""The greatest of no logits: finite, so that a row that reads nothing makes no NaN of -inf - -inf."""


def attend(plan: Plan, inputs: Inputs) -> tuple[Array, Array]:
    """out [b, t, h, e] in the query's dtype, and lse [b, h, tiles · queries] in float32."""
    out = jax.ShapeDtypeStruct((*inputs.query.shape[:3], plan.value_dim), plan.dtype)
    lse = jax.ShapeDtypeStruct((plan.batch, plan.num_heads, plan.num_tiles * plan.block_q), jnp.float32)
    tile = functools.partial(ForwardTile, plan)
    out, lse = launch("attend", tile, inputs, (out, lse), _scratch(plan, inputs), tile_grid(plan))
    return out, lse


def _scratch(plan: Plan, inputs: Inputs) -> dict:
    return shared_memory(plan, inputs, summed="value") | {
        # The query's buffer takes the output where it has its shape.
        "out": row_buffer(plan, plan.value_dim) if plan.value_dim != plan.head_dim else None,
        "lse": plgpu.SMEM((WARPGROUPS, WARPGROUP_ROWS), jnp.float32),
        "query_ready": barriers(WARPGROUPS, plan.pieces),
        "ping_pong": barriers(1, WARPGROUPS),
    }


class ForwardTile(QueryTile):
    """One block of threads: out and lse of 128 rows."""

    def compute(self) -> None:
        plan, scratch = self.plan, self.scratch
        self.bring_rows((self.inputs.query, scratch["query"]))

        def of_rows(value: float):
            return plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), value, jnp.float32), ROW)

        out = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, plan.value_dim), jnp.float32), WGMMA)

        @pl.when(self.full_steps + self.masked_steps > 0)
        def _():
            plgpu.barrier_wait(scratch["key_ready"].at[0])

        pl.when(self.warpgroup == 1)(self._ping_pong)
        carry = self.fold(self._step, (out, of_rows(LOWEST), of_rows(0)))
        pl.when(self.warpgroup == 0)(self._ping_pong)
        self._store(*carry)

    def _ping_pong(self) -> None:
        plgpu.barrier_arrive(self.scratch["ping_pong"])
        plgpu.barrier_wait(self.scratch["ping_pong"])

    def _step(self, step: Step, carry):
        """Online softmax over the keys of a step; maxima are of the logits times log2(e)."""
        plan, scratch = self.plan, self.scratch
        out, most, total = carry
        key, value = scratch["key"].at[step.stage], scratch["value"].at[step.stage]
        query = scratch["query"].at[self.warpgroup]
        logits = product(query, key.transpose((1, 0)), (WARPGROUP_ROWS, plan.step_size), self._ping_pong)
        plgpu.barrier_arrive(scratch["key_free"].at[step.stage])
        scale = plan.scale * LOG2E
        if plan.soft_cap is not None:
            logits, scale = jnp.tanh(logits * (plan.scale / plan.soft_cap)), plan.soft_cap * LOG2E
        if step.mask_stage is not None:
            logits = jnp.where(self.allowed(step.mask_stage), logits, -jnp.inf)
        new = jnp.maximum(most, logits.max(axis=1) * scale)
        shrink = jnp.exp2(most - new)
        weights = jnp.exp2(logits * scale - spread(new, logits.shape, 0))
        out = out * spread(shrink, out.shape, 0)
        total = total * shrink + weights.sum(axis=1)
        weights = weights.astype(plan.dtype)
        out, total, new, weights = jax.lax.optimization_barrier((out, total, new, weights))
        plgpu.barrier_arrive(scratch["ping_pong"])
        plgpu.barrier_wait(scratch["value_ready"].at[step.stage])
        plgpu.barrier_wait(scratch["ping_pong"])

        def wait_for_next_key():
            @pl.when(step.number + 1 < self.full_steps + self.masked_steps)
            def _():
                plgpu.barrier_wait(scratch["key_ready"].at[self.next(step.stage)])

        out = add_product(out, weights, value, wait_for_next_key)
        plgpu.barrier_arrive(scratch["value_free"].at[step.stage])
        return out, new, total

    def _store(self, out, most, total) -> None:
        plan, scratch, inputs = self.plan, self.scratch, self.inputs
        # A NaN is no zero: a row that reads one says so in its lse too.
        reads, nothing = total != 0, -jnp.inf
        if inputs.sinks is not None:
            # Where nothing is read, lse is the sink itself: there and back to base 2 would round it.
            nothing = plgpu.load(inputs.sinks.at[self.heads, self.rows], layout=ROW, optimized=False)
            out, most, total = _with_sinks(out, most, total, nothing * LOG2E)
        safe = jnp.where(total != 0, total, 1.0)
        out = out * spread(1 / safe, out.shape, 0)
        lse = jnp.where(reads, (most + jnp.log2(safe)) * (1 / LOG2E), nothing)
        buffer = scratch["query" if scratch["out"] is None else "out"].at[self.warpgroup]
        buffer[...] = out.astype(plan.dtype)
        lses = scratch["lse"].at[self.warpgroup]
        lses[...] = lse
        plgpu.commit_smem()
        out_ref, lse_ref = self.results
        for head, tokens, rows in self.pieces():
            plgpu.copy_smem_to_gmem(buffer.at[rows], out_ref.at[self.batch, tokens, head])
            plgpu.copy_smem_to_gmem(lses.at[rows], lse_ref.at[self.batch, head, tokens])
        plgpu.wait_smem_to_gmem(0)


def _with_sinks(out: Array, most: Array, total: Array, sinks: Array) -> tuple[Array, Array, Array]:
    """One more logit for every row, which has no value."""
    new = jnp.maximum(most, sinks)
    shrink = jnp.exp2(most - new)
    out = out * spread(shrink, out.shape, 0)
    return out, new, total * shrink + jnp.where(sinks == new, 1, jnp.exp2(sinks - new))
