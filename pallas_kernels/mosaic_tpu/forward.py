"""The forward pass on TPUs: tiles of queries, which walk the blocks that they read.

A tile keeps the running maximum m of its rows' logits, the sum l of exp(logit - m), and the sum of values so weighted
(Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135). Sums do not care in which order their
terms come, so a step of keys is filled with any blocks, each brought by a copy of its own.
"""

import functools
import typing

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.arrange import Inputs
from pallas_kernels.mosaic_tpu.masks import allowed
from pallas_kernels.mosaic_tpu.plan import LOG2E, Plan
from pallas_kernels.mosaic_tpu.products import across, along, to_lanes, widen
from pallas_kernels.mosaic_tpu.query_tile import QueryTile, Turn, launch_query_tiles
from pallas_kernels.mosaic_tpu.tiles import LANES

LEAST = float(jnp.finfo(jnp.float32).min)
"""Below every logit, and finite: a difference of two of them is a number."""

STRIP = 128
"""Rows whose softmax is computed at a time."""


class Sums(typing.NamedTuple):
    """What a tile sums up, in references.

    Attributes:
      most: float32 [rows, LANES], the maximum of the row's logits, in every lane.
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
    tokens = plan.tiles * plan.queries
    of_out = pl.BlockSpec((None, plan.heads, plan.queries, plan.value_dim), lambda b, h, t, _: (b, h, t, 0))
    of_rows = pl.BlockSpec((None, None, None, 1, plan.rows), lambda b, h, t, _: (b, h, t, 0, 0))
    out_shape = plan.batch, plan.head_tiles * plan.heads, tokens, plan.value_dim
    lse_shape = plan.batch, plan.head_tiles, plan.tiles, 1, plan.rows
    results = {"out": (out_shape, plan.dtype, of_out), "lse": (lse_shape, jnp.float32, of_rows)}
    per_row = pltpu.VMEM((plan.rows, LANES), jnp.float32)
    scratch = (per_row, per_row, pltpu.VMEM((plan.rows, plan.value_dim), jnp.float32))
    return launch_query_tiles("s2jax_forward", plan, inputs, results, scratch, functools.partial(_tile, plan))


def _tile(plan: Plan, tile: QueryTile, results: list, scratch: list) -> None:
    sums = Sums(*scratch)
    pl.when(tile.is_first)(sums.clear)
    tile.fold(functools.partial(_turn, plan, tile, sums))
    _finish(plan, tile, sums, *results)


def _turn(plan: Plan, tile: QueryTile, sums: Sums, turn: Turn) -> None:
    query = tile.inputs.query[...].reshape(plan.rows, plan.key_dim)
    parts = [tile.ring.part(plan, place) for place in turn.places]
    # All products with keys first, so that the second one runs under the first softmax.
    logits = [along(query, part[:, : plan.key_dim]) for part in parts]
    values = [part[:, plan.key_dim :] for part in parts]
    slots = [tile.ring.slots(plan, place) for place in turn.places] if turn.masked else []
    turn.begin_next()
    strips = [slice(first, first + STRIP) for first in range(0, plan.rows, STRIP)]
    most, total = ([ref[strip] for strip in strips] for ref in (sums.most, sums.total))
    for step in range(len(parts)):
        scores = capped(plan, logits[step])
        if turn.masked:
            scores = jnp.where(allowed(plan, tile.conditions, slots[step]), scores, -jnp.inf)
        weights, shrinks = [], []
        # The compiler finds more to do at the same time, with fewer registers, where it is given a few rows at a time.
        for number, strip in enumerate(strips):
            mine, before = scores[strip], most[number]
            most[number] = jnp.maximum(before, mine.max(1, keepdims=True))
            shrinks.append(jnp.exp2(before - most[number]))
            powers = jnp.exp2(mine - widen(most[number], plan.step))
            lanes = [powers[:, first : first + LANES] for first in range(0, plan.step, LANES)]
            total[number] = total[number] * shrinks[-1] + sum(lanes[1:], lanes[0])
            weights.append(powers.astype(plan.dtype))
        out = across(jnp.concatenate(weights, 0), values[step])
        for strip, shrink in zip(strips, shrinks, strict=True):
            sums.out[strip] = sums.out[strip] * widen(shrink, plan.value_dim) + out[strip]
    for number, strip in enumerate(strips):
        sums.most[strip], sums.total[strip] = most[number], total[number]


def capped(plan: Plan, logits: Array) -> Array:
    """What products of scaled queries and keys are logits of, times log2(e)."""
    return logits if plan.soft_cap is None else jnp.tanh(logits) * (plan.soft_cap * LOG2E)


def _finish(plan: Plan, tile: QueryTile, sums: Sums, out, lse) -> None:
    most, result = sums.most[...], sums.out[...]
    total = jnp.broadcast_to(sums.total[...].sum(1, keepdims=True), most.shape)
    if tile.inputs.sinks is not None:
        # One more logit for every row, which has no value.
        sinks = _by_row(plan, tile, [tile.inputs.sinks[tile.head * plan.heads + head] for head in range(plan.heads)])
        new = jnp.maximum(most, sinks)
        shrink = jnp.exp2(most - new)
        total = total * shrink + jnp.where(sinks == new, 1.0, jnp.exp2(sinks - new))
        most, result = new, result * widen(shrink, plan.value_dim)
    reads = total != 0
    safe = jnp.where(reads, total, 1.0)
    result = result * widen(1 / safe, plan.value_dim)
    out[...] = result.reshape(plan.heads, plan.queries, plan.value_dim).astype(out.dtype)
    # For the next tile: here stores have time.
    sums.clear()
    lse[...] = to_lanes(jnp.where(reads, (most + jnp.log2(safe)) * (1 / LOG2E), -jnp.inf))


def _by_row(plan: Plan, tile: QueryTile, of_heads: list) -> Array:
    """A number for each head of a tile, times log2(e), for all rows: float32 [rows, LANES]."""
    each = [jnp.full((plan.queries, LANES), number * LOG2E, jnp.float32) for number in of_heads]
    return jnp.concatenate(each, 0)
