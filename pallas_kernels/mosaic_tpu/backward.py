"""The backward pass on TPUs: a dq kernel that tiles queries, and a dk/dv kernel that tiles keys.

With P = exp(logits - lse), dP = dO · Vᵀ and dS = P ∘ (dP - delta), the gradients are dV = Pᵀ · dO, and, times the scale
of the logits, dQ = dS · K and dK = dSᵀ · Q.

The rows of a KV tile are blocks of keys of one KV head that similar queries read, wherever they are in the sequence.
Every block is in one KV tile, which sums over the query heads of the group, so no gradient is added up by two tiles.
"""

import functools
import typing

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.mosaic_tpu import pipeline
from pallas_kernels.mosaic_tpu.config import LANES, KernelSpec
from pallas_kernels.mosaic_tpu.launch import KernelInputs, launch, tokens_spec
from pallas_kernels.mosaic_tpu.masks import concat_chunks, load_chunk
from pallas_kernels.mosaic_tpu.primitives import broadcast_lanes, dot_nn, dot_nt, lanes_to_rows
from pallas_kernels.mosaic_tpu.ring import Chunk
from pallas_kernels.softmax import LOG2E


class QueryScratch(typing.NamedTuple):
    """Refs of a query tile.

    Attributes:
      dq: float32 [tile_rows, head_dim], the sum.
      lse: float32 [tile_rows, LANES], in base 2, the same in all lanes.
      delta: float32 [tile_rows, LANES], the same in all lanes.
    """

    dq: typing.Any
    lse: typing.Any
    delta: typing.Any


class KVAccumulators(typing.NamedTuple):
    """Refs of a KV tile's sums: float32 dk [tile_rows, head_dim] and dv [tile_rows, value_dim]."""

    dk: typing.Any
    dv: typing.Any


def dq_kernel(spec: KernelSpec, inputs: KernelInputs) -> Array:
    """dq [b, h, t, d] in the query's dtype, padded to whole tiles."""
    shape = spec.batch, spec.num_head_tiles * spec.tile_heads, spec.num_tiles * spec.tile_tokens, spec.head_dim
    dq, per_row = jax.ShapeDtypeStruct(shape, spec.dtype), pltpu.VMEM((spec.tile_rows, LANES), jnp.float32)
    query_scratch = QueryScratch(pltpu.VMEM((spec.tile_rows, spec.head_dim), jnp.float32), per_row, per_row)
    scratch = pipeline.scratch_shapes(spec, inputs), query_scratch
    (dq,) = launch("query_gradient", spec, inputs, _compute_dq_tile, ((dq, tokens_spec(spec, dq)),), scratch)
    return dq


def _compute_dq_tile(
    spec: KernelSpec, inputs: KernelInputs, outputs: tuple, scratch: tuple[pipeline.Scratch, QueryScratch]
) -> None:
    tile, rows = pipeline.current_tile(spec, inputs, scratch[0]), scratch[1]
    pipeline.start(tile)
    rows.lse[...], rows.delta[...] = lanes_to_rows(inputs.lse[...]), lanes_to_rows(inputs.delta[...])
    rows.dq[...] = jnp.zeros(rows.dq.shape, jnp.float32)
    pipeline.for_each_step_group(tile, functools.partial(_add_to_dq, tile, rows))
    dq = (rows.dq[...] * spec.scale).astype(spec.dtype)
    outputs[0][...] = dq.reshape(spec.tile_heads, spec.tile_tokens, spec.head_dim)


def _add_to_dq(tile: pipeline.Tile, rows: QueryScratch, group: pipeline.StepGroup) -> None:
    spec = tile.spec
    q = tile.inputs.q_or_k[...].reshape(spec.tile_rows, spec.head_dim)
    dout = tile.inputs.dout_or_v[...].reshape(spec.tile_rows, spec.value_dim)
    keys_and_values = [tile.ring.read(spec, slot) for slot in group.slots]
    qk = [dot_nt(q, k) for k, _ in keys_and_values]
    dp = [dot_nt(dout, v) for _, v in keys_and_values]
    masks = pipeline.step_masks(tile, group)
    group.prefetch()
    lse, delta = (broadcast_lanes(ref[...], spec.step_size) for ref in (rows.lse, rows.delta))
    for step, (k, _) in enumerate(keys_and_values):
        _, ds = _p_and_ds(spec, qk[step], dp[step], lse, delta, masks[step])
        rows.dq[...] += dot_nn(ds.astype(spec.dtype), k)


def dkv_kernel(spec: KernelSpec, inputs: KernelInputs) -> tuple[Array, Array]:
    """dk [b, k, rows of all KV tiles, d] and dv [b, k, rows of all KV tiles, e] in the keys' dtype."""
    shape = spec.batch, spec.num_head_tiles, spec.num_tiles * spec.tile_rows
    dims = spec.head_dim, spec.value_dim
    outputs = [jax.ShapeDtypeStruct((*shape, dim), spec.dtype) for dim in dims]
    accumulators = KVAccumulators(*(pltpu.VMEM((spec.tile_rows, dim), jnp.float32) for dim in dims))
    scratch = pipeline.scratch_shapes(spec, inputs), accumulators
    with_specs = tuple((output, tokens_spec(spec, output)) for output in outputs)
    dk, dv = launch("key_gradients", spec, inputs, _compute_dkv_tile, with_specs, scratch)
    return dk, dv


def _compute_dkv_tile(
    spec: KernelSpec, inputs: KernelInputs, outputs: tuple, scratch: tuple[pipeline.Scratch, KVAccumulators]
) -> None:
    tile, accumulators = pipeline.current_tile(spec, inputs, scratch[0]), scratch[1]
    pipeline.start(tile)
    for ref in accumulators:
        ref[...] = jnp.zeros(ref.shape, jnp.float32)
    pipeline.for_each_step_group(tile, functools.partial(_add_to_dkv, tile, accumulators))
    dk_ref, dv_ref = outputs
    dk_ref[0] = (accumulators.dk[...] * spec.scale).astype(spec.dtype)
    dv_ref[0] = accumulators.dv[...].astype(spec.dtype)


def _add_to_dkv(tile: pipeline.Tile, accumulators: KVAccumulators, group: pipeline.StepGroup) -> None:
    spec, k, v = tile.spec, tile.inputs.q_or_k[0], tile.inputs.dout_or_v[0]
    queries_and_douts = [tile.ring.read(spec, slot) for slot in group.slots]
    # The logits are transposed here: rows are keys, columns are queries.
    kq = [dot_nt(k, q) for q, _ in queries_and_douts]
    dp = [dot_nt(v, dout) for _, dout in queries_and_douts]
    masks = pipeline.step_masks(tile, group)
    lse, delta = (
        [_column_values(tile, table, group.head_pass, slot) for slot in group.slots]
        for table in (tile.inputs.lse, tile.inputs.delta)
    )
    group.prefetch()
    for step, (q, dout) in enumerate(queries_and_douts):
        p, ds = _p_and_ds(spec, kq[step], dp[step], lse[step], delta[step], masks[step])
        accumulators.dv[...] += dot_nn(p.astype(spec.dtype), dout)
        accumulators.dk[...] += dot_nn(ds.astype(spec.dtype), q)


def _column_values(tile: pipeline.Tile, table, head_pass: int, slot) -> Array:
    """A step's columns of a table [heads of the group, tokens / LANES, LANES]: [1, step_size]."""
    spec = tile.spec

    def load(chunk: Chunk, head: int, lane: int) -> Array:
        return load_chunk(spec, table.at[head_pass * spec.step_heads + head], chunk, lane)

    return concat_chunks(spec, tile.ring.chunks(spec, slot), load)[:1]


def _p_and_ds(
    spec: KernelSpec, qk: Array, dp: Array, lse: Array, delta: Array, mask: Array | None
) -> tuple[Array, Array]:
    """P, and dS before it is multiplied with the scale of the logits; both zero where the mask is False.

    Args:
      qk: products of queries and keys, neither scaled nor capped.
      lse: in base 2; inf for padding queries.
      mask: bool; None if all logits count.
    """
    if spec.soft_cap is None:
        p = jnp.exp2(qk * (spec.scale * LOG2E) - lse)
        ds = p * (dp - delta)
    else:
        capped = jnp.tanh(qk * (spec.scale / spec.soft_cap))
        p = jnp.exp2(capped * (spec.soft_cap * LOG2E) - lse)
        ds = p * (1 - capped * capped) * (dp - delta)
    if mask is None:
        return p, ds
    # `where` rather than a product: the masked values may be NaN.
    return jnp.where(mask, p, 0.0), jnp.where(mask, ds, 0.0)
