"""The forward pass on TPUs: tiles of queries, which walk the blocks that they read.

A tile keeps the running maximum m of its rows' logits, the sum l of exp(logit - m), and the sum of values so weighted
(Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135). Sums do not care in which order their
terms come, so a step of keys is filled with any blocks, each brought by a copy of its own.
"""

import functools
import typing

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.arrange import Inputs
from pallas_kernels.mosaic_tpu.launch import Specs, launch
from pallas_kernels.mosaic_tpu.masks import widen
from pallas_kernels.mosaic_tpu.plan import LOG2E, Plan
from pallas_kernels.mosaic_tpu.products import across, along, to_lanes
from pallas_kernels.mosaic_tpu.query_tile import QueryTile
from pallas_kernels.mosaic_tpu.tile import Scratch, StepGroup, scratch_of
from pallas_kernels.mosaic_tpu.tiles import LANES

LEAST = float(jnp.finfo(jnp.float32).min)
"""Below every logit, and finite: a difference of two of them is a number."""


class Sums(typing.NamedTuple):
    """What a tile sums up, in references.

    Attributes:
      most: float32 [rows, LANES], the maximum of the row's logits, in units, in every lane.
      total: float32 [rows, LANES], to be summed over lanes.
      out: float32 [rows, e].
    """

    most: typing.Any
    total: typing.Any
    out: typing.Any

    def clear(self) -> None:
        self.most[...] = jnp.full(self.most.shape, LEAST, jnp.float32)
        self.total[...] = jnp.zeros(self.total.shape, jnp.float32)
        self.out[...] = jnp.zeros(self.out.shape, jnp.float32)


def attend(plan: Plan, inputs: Inputs) -> tuple[Array, Array]:
    """out [b, h, t, e] in the query's dtype and lse [b, heads of tiles, tiles, 1, rows], in whole tiles."""
    out_shape = plan.batch, plan.head_tiles * plan.row_heads, plan.num_tiles * plan.row_tokens, plan.value_dim
    lse_shape = plan.batch, plan.head_tiles, plan.num_tiles, 1, plan.rows
    specs = Specs(plan, inputs.lists)
    out, lse = jax.ShapeDtypeStruct(out_shape, plan.dtype), jax.ShapeDtypeStruct(lse_shape, jnp.float32)
    results = (out, specs.tokens(out)), (lse, specs.rows(lse))
    per_row = pltpu.VMEM((plan.rows, LANES), jnp.float32)
    sums = Sums(per_row, per_row, pltpu.VMEM((plan.rows, plan.value_dim), jnp.float32))

    def run(inputs, lists, results, scratch: Scratch) -> None:
        tile, sums = QueryTile(plan, inputs, lists, scratch), scratch.own
        tile.begin()
        pl.when(tile.is_first)(sums.clear)
        tile.fold(functools.partial(_step_group, plan, tile, sums))
        _finish(plan, tile, sums, *results)

    out, lse = launch("forward", plan, inputs, inputs.specs(plan), results, scratch_of(plan, inputs, sums), run)
    return out, lse


def _step_group(plan: Plan, tile: QueryTile, sums: Sums, group: StepGroup) -> None:
    query = tile.inputs.first[...].reshape(plan.rows, plan.key_dim)
    keys_and_values = [tile.ring.read(plan, place) for place in group.places]
    # All products with keys first, so that the second one runs under the first softmax.
    products = [along(query, key) for key, _ in keys_and_values]
    masks = [tile.allowed(place) for place in group.places] if group.masked else []
    group.begin_next()
    most, total = sums.most[...], sums.total[...]
    for step, (_, value) in enumerate(keys_and_values):
        logits = capped(plan, products[step])
        if group.masked:
            logits = jnp.where(masks[step], logits, -jnp.inf)
        before, most = most, jnp.maximum(most, logits.max(1, keepdims=True))
        shrink = jnp.exp2((before - most) * unit(plan))
        weights = jnp.exp2((logits - widen(most, plan.step_size)) * unit(plan))
        lanes = [weights[:, first : first + LANES] for first in range(0, plan.step_size, LANES)]
        total = total * shrink + sum(lanes[1:], lanes[0])
        out = across(weights.astype(plan.dtype), value)
        sums.out[...] = sums.out[...] * widen(shrink, plan.value_dim) + out
    sums.most[...], sums.total[...] = most, total


def capped(plan: Plan, products: Array) -> Array:
    """Of products of queries and keys the logits, in units.

    Their maximum is found before they are scaled: so the compiler has less to keep while products wait for it.
    """
    if plan.soft_cap is not None:
        return jnp.tanh(products * (plan.scale / plan.soft_cap))
    return products if plan.scale > 0 else products * plan.scale


def unit(plan: Plan) -> float:
    """What logits are multiples of, times log2(e); positive."""
    if plan.soft_cap is not None:
        return plan.soft_cap * LOG2E
    return plan.scale * LOG2E if plan.scale > 0 else LOG2E


def _finish(plan: Plan, tile: QueryTile, sums: Sums, out, lse) -> None:
    most, result = sums.most[...], sums.out[...]
    total = jnp.broadcast_to(sums.total[...].sum(1, keepdims=True), most.shape)
    if tile.inputs.sinks is not None:
        # One more logit for every row, which has no value.
        sinks = _sinks(plan, tile)
        new = jnp.maximum(most, sinks)
        shrink = jnp.exp2((most - new) * unit(plan))
        total = total * shrink + jnp.where(sinks == new, 1.0, jnp.exp2((sinks - new) * unit(plan)))
        most, result = new, result * widen(shrink, plan.value_dim)
    reads = total != 0
    safe = jnp.where(reads, total, 1.0)
    result = result * widen(1 / safe, plan.value_dim)
    out[...] = result.reshape(plan.row_heads, plan.row_tokens, plan.value_dim).astype(out.dtype)
    # For the next tile: here stores have time.
    sums.clear()
    lse[...] = to_lanes(jnp.where(reads, most * (unit(plan) / LOG2E) + jnp.log2(safe) * (1 / LOG2E), -jnp.inf))


def _sinks(plan: Plan, tile: QueryTile) -> Array:
    """Of every row, in units: float32 [rows, LANES]."""
    first = tile.head_tile * plan.row_heads
    of_heads = [tile.inputs.sinks[first + head] * (LOG2E / unit(plan)) for head in range(plan.row_heads)]
    return jnp.concatenate([jnp.full((plan.row_tokens, LANES), each, jnp.float32) for each in of_heads], 0)
