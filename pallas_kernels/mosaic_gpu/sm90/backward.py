"""Gradients of attention on Hopper: dq by tiles of queries, and dk and dv by tiles of keys.

With P = exp(logits - lse) and dP = dO · Vᵀ, the gradient of the logits is dS = P ∘ (dP - delta). Then dQ = dS · K and
dK = dSᵀ · Q, times the scale of the logits, and dV = Pᵀ · dO. One thread block alone writes each tile, so results are
bitwise reproducible.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.sm90 import pipeline
from pallas_kernels.mosaic_gpu.sm90.config import (
    WARPGROUP_ROWS,
    WARPGROUPS,
    KernelSpec,
    KVKernelSpec,
    QKernelSpec,
)
from pallas_kernels.mosaic_gpu.sm90.forward import QueryTile, query_tile_smem
from pallas_kernels.mosaic_gpu.sm90.inputs import KernelInputs
from pallas_kernels.mosaic_gpu.sm90.pipeline import Chunk, Step, add_dot_nn, broadcast_rows, dot_nt, plgpu
from pallas_kernels.softmax import LOG2E

REGISTERS = pipeline.Registers(compute=232, load=40)
"""Kernels with a soft cap would spill in their steps with 224 and 56."""

MORE_TO_COMPUTE = pipeline.Registers(compute=240, load=24)
"""For kernels whose steps would spill otherwise; with 24 registers the load warpgroup may spill."""

MAX_FEATURES = 256
"""Features of keys and values together whose gradients fit the registers at once."""


def probabilities(spec: KernelSpec, qk: Array, lse: Array) -> tuple[Array, Array | None]:
    """The softmax P, and the derivative of the soft cap, None if there is none.

    Args:
      spec: configuration of the kernel.
      qk: products of queries and keys, neither scaled nor capped.
      lse: log-sum-exp times log2(e), of the shape of `qk`; -inf in rows that read nothing, which are masked, and inf
        in padding rows.
    """
    if spec.soft_cap is None:
        return jnp.exp2(qk * (spec.scale * LOG2E) - lse), None
    capped = jnp.tanh(qk * (spec.scale / spec.soft_cap))
    return jnp.exp2(capped * (spec.soft_cap * LOG2E) - lse), 1 - capped * capped


def scale_by(p: Array, slope: Array | None) -> Array:
    """P times the derivative of the soft cap."""
    return p if slope is None else p * slope


# dq: the tiles, block lists and masks of the forward pass.


def dq_kernel(spec: QKernelSpec, inputs: KernelInputs, factor: float) -> Array:
    """Returns dq [b, t, h, d] in the query's dtype.

    Args:
      spec: configuration of the kernel.
      inputs: arrays of the call, with `dout`, `lse` and `delta`.
      factor: multiplier of dS · K.
    """
    dq = jax.ShapeDtypeStruct(inputs.query.shape, spec.dtype)
    smem = query_tile_smem(spec, inputs, contracted="key") | {
        "dout": pipeline.tile_buffer(spec, spec.value_dim),
        "rows_full": pipeline.barriers(WARPGROUPS, 2 * spec.copies_per_warpgroup),
    }
    compute = functools.partial(_compute_dq, factor)
    # Accumulators of wide heads leave few registers for their operands.
    registers = MORE_TO_COMPUTE if spec.head_dim > 192 else REGISTERS
    return pipeline.launch("query_gradient", spec, QueryTile, compute, inputs, (dq,), smem, registers)[0]


def _compute_dq(factor: float, tile: QueryTile) -> None:
    """Computes dq of a warpgroup's 64 rows."""
    inputs, smem = tile.inputs, tile.smem
    tile.load_rows((inputs.query, smem["query"]), (inputs.dout, smem["dout"]))
    lse, delta = (
        pipeline.load_row_values(array.at[tile.batch, tile.head_tile, tile.tile, tile.loop.rows])
        for array in (inputs.lse, inputs.delta)
    )
    dq = tile.loop.fold(functools.partial(_step_dq, tile, lse, delta), pipeline.zeros(tile.spec.head_dim))
    buffer = smem["query"].at[tile.warpgroup]
    buffer[...] = (dq * factor).astype(tile.spec.dtype)
    plgpu.commit_smem()
    for head, tokens, rows in tile.row_copies():
        plgpu.copy_smem_to_gmem(buffer.at[rows], tile.results[0].at[tile.batch, tokens, head])
    plgpu.wait_smem_to_gmem(0)


def _step_dq(tile: QueryTile, lse: Array, delta: Array, step: Step, dq: Array) -> Array:
    """Adds dS · K of a step's keys."""
    spec, smem = tile.spec, tile.smem
    q, dout = smem["query"].at[tile.warpgroup], smem["dout"].at[tile.warpgroup]
    k, v = smem["key"].at[step.stage], smem["value"].at[step.stage]
    plgpu.barrier_wait(smem["key_full"].at[step.stage])
    plgpu.barrier_wait(smem["value_full"].at[step.stage])
    qk, dp = pipeline.dot_nt_pair((q, k), (dout, v))
    plgpu.barrier_arrive(smem["value_empty"].at[step.stage])
    lse, delta = broadcast_rows(lse, qk.shape), broadcast_rows(delta, qk.shape)
    ds = scale_by(*probabilities(spec, qk, lse)) * (dp - delta)
    if step.mask is not None:
        # The mask is applied last, as masked elements may be NaN.
        ds = jnp.where(step.mask(), ds, 0)
    dq = add_dot_nn(dq, ds.astype(spec.dtype), k)
    plgpu.barrier_arrive(smem["key_empty"].at[step.stage])
    return dq


# dk and dv: tiles of key blocks with similar readers, which loop over the queries that read them.


def dkv_kernel(spec: KVKernelSpec, inputs: KernelInputs) -> tuple[Array, Array]:
    """Returns dk [b, s, k, d] and dv [b, s, k, e] in the keys' dtype.

    One kernel computes both if they fit the registers, else there is one kernel for each.
    """
    if spec.head_dim + spec.value_dim <= MAX_FEATURES:
        dk, dv = _gradients(spec, inputs)
    else:
        ((dk,), (dv,)) = (_gradients(dataclasses.replace(spec, gradients=(name,)), inputs) for name in spec.gradients)
    return dk, dv


def _gradients(spec: KVKernelSpec, inputs: KernelInputs) -> tuple[Array, ...]:
    """The gradients of `spec.gradients`, by one kernel."""
    results = tuple(jax.ShapeDtypeStruct(getattr(inputs, name).shape, spec.dtype) for name in spec.gradients)
    has_segments, has_positions = inputs.query_segments is not None, inputs.query_positions is not None
    smem = {
        "key": pipeline.tile_buffer(spec, spec.head_dim, contracted=True),
        "value": pipeline.tile_buffer(spec, spec.value_dim, contracted=True),
        "query": pipeline.step_buffer(spec, spec.head_dim, contracted=True),
        "dout": pipeline.step_buffer(spec, spec.value_dim, contracted=True),
        "lse": pipeline.token_buffer(spec, jnp.float32),
        "delta": pipeline.token_buffer(spec, jnp.float32),
        **pipeline.mask_buffers(spec, True, has_segments, has_positions),
        **pipeline.stage_barriers(spec, query=1, dout=3, mask=1 + has_segments + has_positions),
        "rows_full": pipeline.barriers(WARPGROUPS, 2 * spec.copies_per_warpgroup),
        "rows_done": pipeline.barriers(WARPGROUPS, 1),
    }
    # A soft cap takes more registers to compute with; steps of one chunk take few to load with.
    registers = MORE_TO_COMPUTE if spec.soft_cap is not None and spec.chunks_per_step == 1 else REGISTERS
    name = "_".join([*spec.gradients, "gradients"])
    return pipeline.launch(name, spec, KVTile, _compute_dkv, inputs, results, smem, registers, _load_dkv)


class KVTile:
    """A tile of 128 keys of a KV head: blocks with similar readers, anywhere in the sequence.

    Every block is in one tile, which sums over the query heads of the group.

    Attributes:
      kv_tile: number of the tile.
      batch: number of the sequence.
      kv_head: number of the KV head.
      loop: the loop over the queries of the group's heads.
      warpgroup: number of this warpgroup.
    """

    def __init__(self, spec: KVKernelSpec, indices: list, inputs: typing.Any, results: tuple, smem: dict):
        """Describes the loads of queries, output gradients and masks.

        Args:
          spec: configuration of the kernel.
          indices: tile, sequence and KV head of the thread block.
          inputs: references to `KernelInputs`.
          results: references to the gradients.
          smem: references to shared memory.
        """
        self.spec, self.inputs, self.results, self.smem = spec, inputs, results, smem
        self.kv_tile, self.batch, self.kv_head = indices
        tables = inputs.tables
        ranges = tables.ranges.at[self.batch if tables.ranges.shape[0] > 1 else 0, self.kv_head, self.kv_tile]
        # Lists count query blocks from the start of the sequence; `query` begins at row `first_row` of them.
        first_chunk = 0 if inputs.first_row is None else inputs.first_row[self.batch] * spec.chunks_per_block

        def iterate(head_pass) -> pipeline.BlockIterator:
            lists = tables.blocks, tables.mask_ids, ranges.at[head_pass]
            return pipeline.BlockIterator(spec, *lists, spec.group_heads, head_pass)

        def tokens(chunk: Chunk):
            return pl.ds((chunk.index - first_chunk) * spec.chunk_size, spec.chunk_size)

        def head(chunk: Chunk):
            return self.kv_head * spec.group_size + chunk.group_head

        mask_copies: pipeline.Copies = {"mask_bits": pipeline.mask_bits_of(spec, tables.mask_bits)}
        id_masks: list[pipeline.IdMask] = []
        if inputs.query_segments is not None:
            mask_copies["segments"] = lambda chunk: inputs.query_segments.at[self.batch, tokens(chunk)]
            rows = inputs.kv_segments.at[self.batch, self.kv_head, self.kv_tile]
            id_masks.append(pipeline.IdMask("segments", rows, jnp.equal))
        if inputs.query_positions is not None:
            mask_copies["positions"] = lambda chunk: inputs.query_positions.at[self.batch, tokens(chunk)]
            rows = inputs.kv_positions.at[self.kv_tile]
            id_masks.append(pipeline.IdMask("positions", rows, jnp.greater_equal))
        loads: dict[str, pipeline.Copies] = {
            "query": {"query": lambda chunk: inputs.query.at[self.batch, tokens(chunk), head(chunk)]},
            "dout": {
                "dout": lambda chunk: inputs.dout.at[self.batch, tokens(chunk), head(chunk)],
                "lse": lambda chunk: inputs.lse.at[self.batch, head(chunk), tokens(chunk)],
                "delta": lambda chunk: inputs.delta.at[self.batch, head(chunk), tokens(chunk)],
            },
        }
        self.loop = pipeline.StepLoop(spec, smem, iterate, loads, mask_copies, id_masks, spec.head_passes)
        self.warpgroup = self.loop.warpgroup


# The load warpgroup also loads and stores rows: their addresses would leave the compute warpgroups too few registers.


def _load_dkv(tile: KVTile) -> None:
    """Loads keys and values of the tile, then all steps, then stores the gradients."""
    inputs, smem = tile.inputs, tile.smem

    def load(_, tokens, warpgroup, rows):
        for source, name in ((inputs.key, "key"), (inputs.value, "value")):
            destination = smem[name].at[warpgroup, rows]
            full = smem["rows_full"].at[warpgroup]
            plgpu.copy_gmem_to_smem(source.at[tile.batch, tokens, tile.kv_head], destination, full)

    def store(block, tokens, warpgroup, rows):
        @pl.when(block >= 0)
        def _():
            for name, result in zip(tile.spec.gradients, tile.results, strict=True):
                source = smem[name].at[warpgroup, rows]
                plgpu.copy_smem_to_gmem(source, result.at[tile.batch, tokens, tile.kv_head])

    _for_each_row_copy(tile, load)
    tile.loop.load_steps()

    @pl.loop(0, _not_unrolled(tile, WARPGROUPS))
    def _(warpgroup):
        plgpu.barrier_wait(smem["rows_done"].at[warpgroup])

    _for_each_row_copy(tile, store)
    plgpu.wait_smem_to_gmem(0)


def _for_each_row_copy(tile: KVTile, function: Callable) -> None:
    """Calls `function(block, tokens, warpgroup, rows)` for each copy of the tile's rows.

    Its arguments are the key block, -1 if there is none; its tokens; the warpgroup; and the rows of its buffer.
    """
    spec = tile.spec

    @pl.loop(0, _not_unrolled(tile, WARPGROUPS * spec.copies_per_warpgroup))
    def _(index):
        first = index * spec.rows_per_copy
        block = tile.inputs.tables.members[tile.kv_head, tile.kv_tile, first // spec.kv_block_size]
        token = jnp.maximum(block, 0) * spec.kv_block_size + jax.lax.rem(first, spec.kv_block_size)
        row = jax.lax.rem(first, WARPGROUP_ROWS)
        function(block, pl.ds(token, spec.rows_per_copy), first // WARPGROUP_ROWS, pl.ds(row, spec.rows_per_copy))


def _not_unrolled(tile: KVTile, count: int):
    """The count of a loop, hidden from the compiler: it would unroll the loop, which takes too many registers."""
    return jnp.where(tile.loop.masked_steps >= 0, count, 0)


def _compute_dkv(tile: KVTile) -> None:
    """Computes dk and dv of a warpgroup's 64 keys."""
    spec, smem = tile.spec, tile.smem
    plgpu.barrier_wait(smem["rows_full"].at[tile.warpgroup])
    features = {"key": spec.head_dim, "value": spec.value_dim}
    sums = {name: pipeline.zeros(features[name]) for name in spec.gradients}
    sums = tile.loop.fold(functools.partial(_step_dkv, tile), sums)
    for name, gradient in sums.items():
        buffer = smem[name].at[tile.warpgroup]
        buffer[...] = (gradient * spec.scale if name == "key" else gradient).astype(spec.dtype)
    plgpu.commit_smem()
    plgpu.barrier_arrive(smem["rows_done"].at[tile.warpgroup])


def _step_dkv(tile: KVTile, step: Step, sums: dict[str, Array]) -> dict[str, Array]:
    """Adds Pᵀ · dO and dSᵀ · Q of a step's queries. Rows are keys here: `p` and `ds` hold the transposes."""
    spec, smem, sums = tile.spec, tile.smem, dict(sums)
    k, v = smem["key"].at[tile.warpgroup], smem["value"].at[tile.warpgroup]
    q, dout = smem["query"].at[step.stage], smem["dout"].at[step.stage]
    shape = (WARPGROUP_ROWS, spec.step_size)

    def of_queries(name: str) -> Array:
        return pipeline.broadcast_columns(pipeline.load_column_values(smem[name].at[step.stage]), shape)

    plgpu.barrier_wait(smem["query_full"].at[step.stage])
    qk = dot_nt(k, q, overlap=lambda: plgpu.barrier_wait(smem["dout_full"].at[step.stage]))
    p, slope = probabilities(spec, qk, of_queries("lse"))
    if step.mask is not None:
        p = jnp.where(step.mask(), p, 0)
    # Computed before the products, so that the slope itself occupies no registers during them.
    p_slope = scale_by(p, slope)
    if "value" in sums:
        sums["value"] = add_dot_nn(sums["value"], p.astype(spec.dtype), dout)
    ds = None
    if "key" in sums:
        dp = dot_nt(v, dout)
        ds = p_slope * (dp - of_queries("delta"))
    # Orders the reads of lse and delta before the copies that overwrite them: those go through the async proxy.
    plgpu.commit_smem()
    plgpu.barrier_arrive(smem["dout_empty"].at[step.stage])
    if ds is not None:
        if step.mask is not None:
            # Masked elements may be NaN. Reading the mask off P takes no registers.
            ds = jnp.where(p_slope != 0, ds, 0)
        sums["key"] = add_dot_nn(sums["key"], ds.astype(spec.dtype), q)
    plgpu.barrier_arrive(smem["query_empty"].at[step.stage])
    return sums
