"""The gradients of keys and values on Hopper: packs of keys, which walk the queries that read them.

dV = Pᵀ · dO, and dK = dSᵀ · Q times the scale of the logits. The rows of a tile are a pack: blocks of keys of one head
that are read by like queries, wherever they stand. Every block is in one pack, which sums over the heads of the group
in turn, so that nothing is added by two.
"""

import dataclasses
import functools
import typing

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.gradient import REGISTERS, times, weights_and_slope
from pallas_kernels.mosaic_gpu.kv_tables import KVInputs
from pallas_kernels.mosaic_gpu.launch import barriers, launch, row_buffer, step_buffer
from pallas_kernels.mosaic_gpu.plan import ROWS, WARPGROUP_ROWS, WARPGROUPS, KVPlan
from pallas_kernels.mosaic_gpu.products import add_product, product
from pallas_kernels.mosaic_gpu.steps import COLUMN, WGMMA, Condition, Registers, Step, Steps, Stream, spread
from pallas_kernels.mosaic_gpu.untyped import plgpu
from pallas_kernels.mosaic_gpu.walk import Entry, Walk

SUMMED_AT_ONCE = 256
"""Features of keys and values together whose gradients registers can hold."""


def key_gradients(plan: KVPlan, inputs: KVInputs) -> tuple[Array, Array]:
    """dk [b, s, k, d] and dv [b, s, k, e] in the keys' dtype; where registers cannot hold both, one after the other."""
    if plan.head_dim + plan.value_dim <= SUMMED_AT_ONCE:
        dkey, dvalue = _sums(plan, inputs)
    else:
        ((dkey,), (dvalue,)) = (_sums(dataclasses.replace(plan, gradients=(name,)), inputs) for name in plan.gradients)
    return dkey, dvalue


def _sums(plan: KVPlan, inputs: KVInputs) -> tuple[Array, ...]:
    results = tuple(jax.ShapeDtypeStruct(getattr(inputs, name).shape, plan.dtype) for name in plan.gradients)
    grid = {"pack": plan.kv_tiles, "batch": plan.batch, "heads": plan.num_kv_heads}
    name, kv_tile = "_".join([*plan.gradients, "gradients"]), functools.partial(Pack, plan)
    # With a soft cap there is more to compute with, and where a step takes one copy there is little to load with.
    registers = Registers(240, 24) if plan.soft_cap is not None and plan.slots == 1 else REGISTERS
    return launch(name, kv_tile, inputs, results, _scratch(plan, inputs), grid, registers)


def _scratch(plan: KVPlan, inputs: KVInputs) -> dict:
    stages = plan.num_stages
    has_segments, has_positions = inputs.query_segments is not None, inputs.query_positions is not None
    of_columns, ids = plgpu.SMEM((stages, plan.step_size), jnp.float32), plgpu.SMEM((stages, plan.step_size), jnp.int32)
    return {
        "key": row_buffer(plan, plan.head_dim, summed=True),
        "value": row_buffer(plan, plan.value_dim, summed=True),
        "query": step_buffer(plan, plan.head_dim, summed=True),
        "dout": step_buffer(plan, plan.value_dim, summed=True),
        "lse": of_columns,
        "delta": of_columns,
        "mask_bits": plgpu.SMEM((stages, plan.slots * plan.mask_words, ROWS), jnp.int32),
        "segments": ids if has_segments else None,
        "positions": ids if has_positions else None,
        "rows_ready": barriers(WARPGROUPS, 2 * plan.pieces),
        "rows_done": barriers(WARPGROUPS, 1),
        "query_ready": barriers(stages, plan.slots),
        "dout_ready": barriers(stages, 3 * plan.slots),
        "mask_ready": barriers(stages, (1 + has_segments + has_positions) * plan.slots),
        "query_free": barriers(stages, WARPGROUPS),
        "dout_free": barriers(stages, WARPGROUPS),
        "mask_free": barriers(stages, WARPGROUPS),
    }


class Pack(Steps):
    """One block of threads: dk and dv of 128 keys of a KV head."""

    plan: KVPlan

    def __init__(self, plan: KVPlan, at: dict, inputs: typing.Any, results: tuple, scratch: dict):
        self.inputs, self.results, self.scratch = inputs, results, scratch
        self.batch, self.head, self.kv_tile = at["batch"], at["heads"], at["pack"]
        tables = inputs.tables
        mine = tables.ranges.at[self.batch if tables.ranges.shape[0] > 1 else 0, self.head, self.kv_tile]

        def walk_of(number) -> Walk:
            return Walk(plan, tables.blocks, tables.mask_ids, mine.at[number], plan.group_heads, number)

        super().__init__(plan, walk_of, plan.head_passes)
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
        self.mask_bits, self.conditions = scratch["mask_bits"], []
        masks = [(self._mask_bits, self.mask_bits)]
        for name, columns, rows, compare in self._conditions():
            masks.append((lambda entry, of=columns: of.at[self.batch, self._tokens(entry)], scratch[name]))
            self.conditions.append(Condition(scratch[name], rows, compare))
        self.masks = Stream(masks, scratch["mask_ready"], scratch["mask_free"])

    def _conditions(self) -> typing.Iterator[tuple]:
        """What is compared besides masks: name, of columns, of this pack's rows, how."""
        inputs = self.inputs
        if inputs.query_segments is not None:
            of_rows = inputs.kv_segments.at[self.batch, self.head, self.kv_tile]
            yield "segments", inputs.query_segments, of_rows, jnp.equal
        if inputs.query_positions is not None:
            yield "positions", inputs.query_positions, inputs.kv_positions.at[self.kv_tile], jnp.greater_equal

    def _head(self, entry: Entry):
        return self.head * self.plan.group + entry.group_head

    def _tokens(self, entry: Entry):
        return pl.ds((entry.piece - self.first) * self.plan.slot, self.plan.slot)

    def _mask_bits(self, entry: Entry):
        mask_bits = jax.lax.rem(entry.piece, self.plan.pieces_of_block) * self.plan.mask_words
        return self.inputs.tables.mask_bits.at[entry.mask_id, pl.ds(mask_bits, self.plan.mask_words)]

    # The warpgroup that loads also stores: what it takes to know where would leave the others too few registers.

    def _counted(self, number: int):
        """The same number, but not known to the compiler: what it would unroll takes too many registers."""
        return jnp.where(self.masked_steps >= 0, number, 0)

    def _for_pieces(self, each: typing.Callable) -> None:
        """Calls `each` with where rows are: the block's number, the tokens, the warpgroup and its rows."""
        plan = self.plan

        @pl.loop(0, self._counted(WARPGROUPS * plan.pieces))
        def _(piece):
            first = piece * plan.piece
            block = self.inputs.tables.members[self.head, self.kv_tile, first // plan.key_block]
            token = jnp.maximum(block, 0) * plan.key_block + jax.lax.rem(first, plan.key_block)
            row = jax.lax.rem(first, WARPGROUP_ROWS)
            each(block, pl.ds(token, plan.piece), first // WARPGROUP_ROWS, pl.ds(row, plan.piece))

    def load_rows(self) -> None:
        ready = self.scratch["rows_ready"]

        def load(_, tokens, warpgroup, rows):
            for source, name in ((self.inputs.key, "key"), (self.inputs.value, "value")):
                there = self.scratch[name].at[warpgroup, rows]
                plgpu.copy_gmem_to_smem(source.at[self.batch, tokens, self.head], there, ready.at[warpgroup])

        self._for_pieces(load)

    def store_rows(self) -> None:
        @pl.loop(0, self._counted(WARPGROUPS))
        def _(warpgroup):
            plgpu.barrier_wait(self.scratch["rows_done"].at[warpgroup])

        def store(block, tokens, warpgroup, rows):
            @pl.when(block >= 0)
            def _():
                for name, result in zip(self.plan.gradients, self.results, strict=True):
                    here = self.scratch[name].at[warpgroup, rows]
                    plgpu.copy_smem_to_gmem(here, result.at[self.batch, tokens, self.head])

        self._for_pieces(store)
        plgpu.wait_smem_to_gmem(0)

    # The warpgroups that compute.

    def compute(self) -> None:
        plan, scratch = self.plan, self.scratch
        plgpu.barrier_wait(scratch["rows_ready"].at[self.warpgroup])

        def zeros(features: int):
            return plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, features), jnp.float32), WGMMA)

        widths = {"key": plan.head_dim, "value": plan.value_dim}
        sums = self.fold(self._step, {name: zeros(widths[name]) for name in plan.gradients})
        for name, gradient in sums.items():
            buffer = scratch[name].at[self.warpgroup]
            buffer[...] = (gradient * plan.scale if name == "key" else gradient).astype(plan.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch["rows_done"].at[self.warpgroup])

    def _step(self, step: Step, sums: dict[str, Array]) -> dict[str, Array]:
        plan, scratch, sums = self.plan, self.scratch, dict(sums)
        query, dout = scratch["query"].at[step.stage], scratch["dout"].at[step.stage]
        shape = (WARPGROUP_ROWS, plan.step_size)

        def of_columns(name: str) -> Array:
            return spread(plgpu.load(scratch[name].at[step.stage], layout=COLUMN, optimized=False), shape, 1)

        def dout_arrives():
            plgpu.barrier_wait(scratch["dout_ready"].at[step.stage])

        plgpu.barrier_wait(scratch["query_ready"].at[step.stage])
        products = product(scratch["key"].at[self.warpgroup], query.transpose((1, 0)), shape, dout_arrives)
        weights, slope = weights_and_slope(plan, products, of_columns("lse"))
        if step.mask_stage is not None:
            weights = jnp.where(self.allowed(step.mask_stage), weights, 0)
        # Made before the products: the slope itself then takes no registers.
        sloped = times(weights, slope)
        if "value" in sums:
            sums["value"] = add_product(sums["value"], weights.astype(plan.dtype), dout, lambda: None)
        gradient = None
        if "key" in sums:
            dweights = product(scratch["value"].at[self.warpgroup], dout.transpose((1, 0)), shape, lambda: None)
            gradient = sloped * (dweights - of_columns("delta"))
        # What was read here is overwritten by copies: they go another way to shared memory.
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch["dout_free"].at[step.stage])
        if gradient is not None:
            if step.mask_stage is not None:
                # What is hidden may be NaN. That it is hidden is seen in the weights, which takes no registers.
                gradient = jnp.where(sloped != 0, gradient, 0)
            sums["key"] = add_product(sums["key"], gradient.astype(plan.dtype), query, lambda: None)
        plgpu.barrier_arrive(scratch["query_free"].at[step.stage])
        return sums
