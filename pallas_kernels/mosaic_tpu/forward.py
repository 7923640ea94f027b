"""The forward pass on TPUs: tiles of queries loop over the keys that they read.

A tile keeps the running maximum m of its rows' logits, the sum l of exp(logit - m), and the accumulator acc of the
values weighted by exp(logit - m) (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135). The
order of the keys does not matter, so a step holds any blocks, in any order.
"""

import functools
import typing

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.mosaic_tpu import pipeline
from pallas_kernels.mosaic_tpu.config import LANES, KernelSpec
from pallas_kernels.mosaic_tpu.launch import KernelInputs, launch, rows_spec, tokens_spec
from pallas_kernels.mosaic_tpu.primitives import broadcast_lanes, dot_nn, dot_nt, rows_to_lanes
from pallas_kernels.softmax import LOG2E

INITIAL_M = float(jnp.finfo(jnp.float32).min)
"""Below every logit, and finite, so that the difference of two of them is no NaN."""


class Accumulators(typing.NamedTuple):
    """Refs of a tile's running sums.

    Attributes:
      m: float32 [tile_rows, LANES], the maximum of the unscaled logits, the same in all lanes.
      l: float32 [tile_rows, LANES], the sum of exp(logit - m), spread over the lanes.
      acc: float32 [tile_rows, value_dim].
    """

    m: typing.Any
    l: typing.Any
    acc: typing.Any

    def reset(self) -> None:
        self.m[...] = jnp.full(self.m.shape, INITIAL_M, jnp.float32)
        self.l[...] = jnp.zeros(self.l.shape, jnp.float32)
        self.acc[...] = jnp.zeros(self.acc.shape, jnp.float32)


def forward_kernel(spec: KernelSpec, inputs: KernelInputs) -> tuple[Array, Array]:
    """out [b, h, t, e] in the query's dtype and lse [b, head tiles, tiles, 1, rows], padded to whole tiles."""
    out_shape = spec.batch, spec.num_head_tiles * spec.tile_heads, spec.num_tiles * spec.tile_tokens, spec.value_dim
    lse_shape = spec.batch, spec.num_head_tiles, spec.num_tiles, 1, spec.tile_rows
    out, lse = jax.ShapeDtypeStruct(out_shape, spec.dtype), jax.ShapeDtypeStruct(lse_shape, jnp.float32)
    per_row = pltpu.VMEM((spec.tile_rows, LANES), jnp.float32)
    accumulators = Accumulators(per_row, per_row, pltpu.VMEM((spec.tile_rows, spec.value_dim), jnp.float32))
    outputs, scratch = ((out, tokens_spec(spec, out)), (lse, rows_spec(lse))), pipeline.scratch_shapes(spec, inputs)
    out, lse = launch("forward", spec, inputs, _compute_out_tile, outputs, (scratch, accumulators))
    return out, lse


def _compute_out_tile(
    spec: KernelSpec, inputs: KernelInputs, outputs: tuple, scratch: tuple[pipeline.Scratch, Accumulators]
) -> None:
    tile, accumulators = pipeline.current_tile(spec, inputs, scratch[0]), scratch[1]
    pipeline.start(tile)
    pl.when(tile.is_first)(accumulators.reset)
    pipeline.for_each_step_group(tile, functools.partial(_attend, tile, accumulators))
    _finish(tile, accumulators, *outputs)


def _attend(tile: pipeline.Tile, accumulators: Accumulators, group: pipeline.StepGroup) -> None:
    """Adds the keys of a group of steps to the tile's sums."""
    spec = tile.spec
    q = tile.inputs.q_or_k[...].reshape(spec.tile_rows, spec.head_dim)
    keys_and_values = [tile.ring.read(spec, slot) for slot in group.slots]
    # All q · kᵀ come first, so that the second one overlaps the first softmax.
    qk = [dot_nt(q, k) for k, _ in keys_and_values]
    masks = pipeline.step_masks(tile, group)
    group.prefetch()
    m, l = accumulators.m[...], accumulators.l[...]
    for step, (_, v) in enumerate(keys_and_values):
        logits, mask = _unscaled_logits(spec, qk[step]), masks[step]
        if mask is not None:
            logits = jnp.where(mask, logits, -jnp.inf)
        m_prev, m = m, jnp.maximum(m, logits.max(1, keepdims=True))
        alpha = jnp.exp2((m_prev - m) * _exp2_scale(spec))
        p = jnp.exp2((logits - broadcast_lanes(m, spec.step_size)) * _exp2_scale(spec))
        registers = [p[:, lane : lane + LANES] for lane in range(0, spec.step_size, LANES)]
        l = l * alpha + sum(registers[1:], registers[0])
        pv = dot_nn(p.astype(spec.dtype), v)
        accumulators.acc[...] = accumulators.acc[...] * broadcast_lanes(alpha, spec.value_dim) + pv
    accumulators.m[...], accumulators.l[...] = m, l


def _unscaled_logits(spec: KernelSpec, qk: Array) -> Array:
    """The logits divided by `_exp2_scale(spec) / LOG2E`.

    m is subtracted before they are scaled, so that fewer values stay alive while the products are waited for.
    """
    if spec.soft_cap is not None:
        return jnp.tanh(qk * (spec.scale / spec.soft_cap))
    return qk if spec.scale > 0 else qk * spec.scale


def _exp2_scale(spec: KernelSpec) -> float:
    """The positive factor from unscaled logits to exponents of 2."""
    if spec.soft_cap is not None:
        return spec.soft_cap * LOG2E
    return spec.scale * LOG2E if spec.scale > 0 else LOG2E


def _finish(tile: pipeline.Tile, accumulators: Accumulators, out_ref, lse_ref) -> None:
    """Adds the sinks, normalizes and writes out and lse; resets the sums for the next tile."""
    spec, scale = tile.spec, _exp2_scale(tile.spec)
    m, acc = accumulators.m[...], accumulators.acc[...]
    l = jnp.broadcast_to(accumulators.l[...].sum(1, keepdims=True), m.shape)
    if tile.inputs.sinks is not None:
        # A sink is one more logit per row, without a value.
        sinks = _row_sinks(tile)
        m_prev, m = m, jnp.maximum(m, sinks)
        alpha = jnp.exp2((m_prev - m) * scale)
        l = l * alpha + jnp.where(sinks == m, 1.0, jnp.exp2((sinks - m) * scale))
        acc = acc * broadcast_lanes(alpha, spec.value_dim)
    reads = l != 0
    safe_l = jnp.where(reads, l, 1.0)
    out = acc * broadcast_lanes(1 / safe_l, spec.value_dim)
    out_ref[...] = out.reshape(spec.tile_heads, spec.tile_tokens, spec.value_dim).astype(out_ref.dtype)
    # The reset for the next tile is free here, where the store unit is idle.
    accumulators.reset()
    lse_ref[...] = rows_to_lanes(jnp.where(reads, m * (scale / LOG2E) + jnp.log2(safe_l) * (1 / LOG2E), -jnp.inf))


def _row_sinks(tile: pipeline.Tile) -> Array:
    """Each row's sink as an unscaled logit: float32 [tile_rows, LANES]."""
    spec, first_head = tile.spec, tile.head_tile * tile.spec.tile_heads
    factor = LOG2E / _exp2_scale(spec)
    sinks = [tile.inputs.sinks[first_head + head] * factor for head in range(spec.tile_heads)]
    return jnp.concatenate([jnp.full((spec.tile_tokens, LANES), sink, jnp.float32) for sink in sinks], 0)
