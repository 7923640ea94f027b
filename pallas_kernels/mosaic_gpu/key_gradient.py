"""The gradients of keys and values on Hopper: packs of keys, which walk the queries that read them.

dV = Pᵀ · dO, and dK = dSᵀ · Q times the scale of the logits. The rows of a tile are a pack: blocks of keys of one head
that are read by like queries, wherever they stand. Every block is in one pack, which sums over the heads of the group
in turn, so that nothing is added by two.
"""

import functools
import typing

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.gradient import logits_gradient, weights_and_slope
from pallas_kernels.mosaic_gpu.key_tables import KeyInputs
from pallas_kernels.mosaic_gpu.launch import barriers, launch, row_buffer, step_buffer
from pallas_kernels.mosaic_gpu.plan import ROWS, WARPGROUP_ROWS, WARPGROUPS, KeyPlan
from pallas_kernels.mosaic_gpu.products import add_product, product
from pallas_kernels.mosaic_gpu.steps import COLUMN, WGMMA, Condition, Steps, Stream, spread
from pallas_kernels.mosaic_gpu.untyped import plgpu
from pallas_kernels.mosaic_gpu.walk import Entry, Walk


def key_gradients(plan: KeyPlan, inputs: KeyInputs) -> tuple[Array, Array]:
    """dk [b, s, k, d] and dv [b, s, k, e] in the keys' dtype."""
    results = tuple(jax.ShapeDtypeStruct(array.shape, plan.dtype) for array in (inputs.key, inputs.value))
    grid = {"pack": plan.packs, "batch": plan.batch, "heads": plan.num_kv_heads}
    dkey, dvalue = launch(functools.partial(Pack, plan), inputs, results, _scratch(plan, inputs), **grid)
    return dkey, dvalue


def _scratch(plan: KeyPlan, inputs: KeyInputs) -> dict:
    stages, has_segments = plan.stages, inputs.query_segments is not None
    of_columns = plgpu.SMEM((stages, plan.step), jnp.float32)
    return {
        "key": row_buffer(plan, plan.head_dim),
        "value": row_buffer(plan, plan.value_dim),
        "query": step_buffer(plan, plan.head_dim, summed=True),
        "dout": step_buffer(plan, plan.value_dim, summed=True),
        "lse": of_columns,
        "delta": of_columns,
        "words": plgpu.SMEM((stages, plan.slots * plan.words, ROWS), jnp.int32),
        "segments": plgpu.SMEM((stages, plan.step), jnp.int32) if has_segments else None,
        "rows_ready": barriers(WARPGROUPS, 2 * plan.pieces),
        "rows_done": barriers(WARPGROUPS, 1),
        "query_ready": barriers(stages, plan.slots),
        "dout_ready": barriers(stages, 3 * plan.slots),
        "mask_ready": barriers(stages, (1 + has_segments) * plan.slots),
        "query_free": barriers(stages, WARPGROUPS),
        "dout_free": barriers(stages, WARPGROUPS),
        "mask_free": barriers(stages, WARPGROUPS),
    }


class Pack(Steps):
    """One block of threads: dk and dv of 128 keys of a KV head."""

    plan: KeyPlan

    def __init__(self, plan: KeyPlan, inputs: typing.Any, results: tuple, scratch: dict):
        self.inputs, self.results, self.scratch = inputs, results, scratch
        self.batch, self.head = jax.lax.axis_index("batch"), jax.lax.axis_index("heads")
        self.pack = jax.lax.axis_index("pack")
        table = inputs.slices
        mine = table.at[self.batch if table.shape[0] > 1 else 0, self.head, self.pack]
        super().__init__(plan, Walk(plan, inputs.blocks, inputs.masks, mine, plan.group))
        # Which rows of blocks there are is known to the lists; where the first one stands, sometimes not.
        self.first = 0 if inputs.first_row is None else inputs.first_row[self.batch] * plan.pieces_of_block

        def of_columns(array):
            return lambda entry: array.at[self.batch, self._head(entry), self._tokens(entry)]

        def tokens_of(array):
            return lambda entry: array.at[self.batch, self._tokens(entry), self._head(entry)]

        self.streams = [
            Stream([(tokens_of(inputs.query), scratch["query"])], scratch["query_ready"], scratch["query_free"]),
            Stream(
                [
                    (tokens_of(inputs.dout), scratch["dout"]),
                    (of_columns(inputs.lse), scratch["lse"]),
                    (of_columns(inputs.delta), scratch["delta"]),
                ],
                scratch["dout_ready"], scratch["dout_free"],
            ),
        ]  # fmt: skip
        self.words, self.conditions = scratch["words"], []
        masks = [(self._words, self.words)]
        if inputs.query_segments is not None:
            masks.append((lambda entry: inputs.query_segments.at[self.batch, self._tokens(entry)], scratch["segments"]))
            of_rows = inputs.kv_segments.at[self.batch, self.head, self.pack]
            self.conditions.append(Condition(scratch["segments"], of_rows, jnp.equal))
        self.masks = Stream(masks, scratch["mask_ready"], scratch["mask_free"])

    def _head(self, entry: Entry):
        return self.head * self.plan.group + entry.turn

    def _tokens(self, entry: Entry):
        return pl.ds((entry.piece - self.first) * self.plan.slot, self.plan.slot)

    def _words(self, entry: Entry):
        words = jax.lax.rem(entry.piece, self.plan.pieces_of_block) * self.plan.words
        return self.inputs.words.at[entry.kind, pl.ds(words, self.plan.words)]

    # The warpgroup that loads also stores: what it takes to know where would leave the others too few registers.

    def _pieces(self) -> typing.Iterator[tuple]:
        """Where the rows are: the block's number, the tokens, the warpgroup and its rows, for every piece."""
        plan = self.plan
        for first in range(0, ROWS, plan.piece):
            block = self.inputs.members[self.head, self.pack, first // plan.block_size]
            token = jnp.maximum(block, 0) * plan.block_size + first % plan.block_size
            warpgroup, row = divmod(first, WARPGROUP_ROWS)
            yield block, pl.ds(token, plan.piece), warpgroup, pl.ds(row, plan.piece)

    def load_rows(self) -> None:
        ready = self.scratch["rows_ready"]
        for _, tokens, warpgroup, rows in self._pieces():
            for source, name in ((self.inputs.key, "key"), (self.inputs.value, "value")):
                there = self.scratch[name].at[warpgroup, rows]
                plgpu.copy_gmem_to_smem(source.at[self.batch, tokens, self.head], there, ready.at[warpgroup])

    def store_rows(self) -> None:
        for warpgroup in range(WARPGROUPS):
            plgpu.barrier_wait(self.scratch["rows_done"].at[warpgroup])
        for block, tokens, warpgroup, rows in self._pieces():

            @pl.when(block >= 0)
            def _(tokens=tokens, warpgroup=warpgroup, rows=rows):
                for name, result in zip(("key", "value"), self.results, strict=True):
                    here = self.scratch[name].at[warpgroup, rows]
                    plgpu.copy_smem_to_gmem(here, result.at[self.batch, tokens, self.head])

        plgpu.wait_smem_to_gmem(0)

    # The warpgroups that compute.

    def compute(self) -> None:
        plan, scratch = self.plan, self.scratch
        plgpu.barrier_wait(scratch["rows_ready"].at[self.warpgroup])

        def zeros(features: int):
            return plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, features), jnp.float32), WGMMA)

        dkey, dvalue = self.fold(self._step, (zeros(plan.head_dim), zeros(plan.value_dim)))
        for name, gradient in (("key", dkey * plan.scale), ("value", dvalue)):
            buffer = scratch[name].at[self.warpgroup]
            buffer[...] = gradient.astype(plan.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch["rows_done"].at[self.warpgroup])

    def _step(self, step, masked_step, carry):
        plan, scratch = self.plan, self.scratch
        dkey, dvalue = carry
        stage = jax.lax.rem(step, plan.stages)
        query, dout = scratch["query"].at[stage], scratch["dout"].at[stage]
        shape = (WARPGROUP_ROWS, plan.step)

        def of_columns(name: str) -> Array:
            return spread(plgpu.load(scratch[name].at[stage], layout=COLUMN, optimized=False), shape, 1)

        def dout_arrives():
            plgpu.barrier_wait(scratch["dout_ready"].at[stage])

        plgpu.barrier_wait(scratch["query_ready"].at[stage])
        products = product(scratch["key"].at[self.warpgroup], query.transpose((1, 0)), shape, dout_arrives)
        weights, slope = weights_and_slope(plan, products, of_columns("lse"))
        if masked_step is not None:
            weights = jnp.where(self.allowed(masked_step), weights, 0)
        dvalue = add_product(dvalue, weights.astype(plan.dtype), dout, lambda: None)
        dweights = product(scratch["value"].at[self.warpgroup], dout.transpose((1, 0)), shape, lambda: None)
        gradient = logits_gradient(weights, slope, dweights, of_columns("delta"))
        # What was read here is overwritten by copies: they go another way to shared memory.
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch["dout_free"].at[stage])
        if masked_step is not None:
            # What is hidden may be NaN. That it is hidden is seen in the weights, which takes no registers.
            gradient = jnp.where(weights != 0, gradient, 0)
        dkey = add_product(dkey, gradient.astype(plan.dtype), query, lambda: None)
        plgpu.barrier_arrive(scratch["query_free"].at[stage])
        return dkey, dvalue
