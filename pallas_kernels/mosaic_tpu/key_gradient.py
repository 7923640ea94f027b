"""The gradients of keys and values on TPUs: packs of keys, which walk the queries that read them.

dV = Pᵀ · dO, and dK = dSᵀ · Q times the scale of the logits. The rows of a tile are a pack: blocks of keys of one head
that are read by like queries, wherever they stand. Every block is in one pack, which sums over the heads of the group,
so that nothing is added by two.
"""

import functools
import typing

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.arrange import Inputs
from pallas_kernels.mosaic_tpu.copies import Slot
from pallas_kernels.mosaic_tpu.gradient import weights_and_gradient
from pallas_kernels.mosaic_tpu.launch import Specs, launch
from pallas_kernels.mosaic_tpu.masks import lane_row, over_lanes
from pallas_kernels.mosaic_tpu.plan import Plan
from pallas_kernels.mosaic_tpu.products import across, along
from pallas_kernels.mosaic_tpu.tile import Scratch, StepGroup, Tile, scratch_of


class Sums(typing.NamedTuple):
    """What a pack sums up, in references: float32 [rows, d] and [rows, e]."""

    dkey: typing.Any
    dvalue: typing.Any


class Pack(Tile):
    def _source_head(self, batch):
        return (batch * self.plan.head_tiles + self.head_tile) * self.plan.group

    def of_columns(self, table, head_pass: int, place) -> Array:
        """Of a table [heads of the group, tokens / LANES, LANES], a step's columns: [1, step]."""
        plan = self.plan

        def read(slot: Slot, head: int, lane: int) -> Array:
            return lane_row(plan, table.at[head_pass * plan.step_heads + head], slot, lane)

        return over_lanes(plan, self.ring.slots(plan, place), read)[:1]


def key_gradients(plan: Plan, inputs: Inputs) -> tuple[Array, Array]:
    """dk [b, k, rows of packs, d] and dv [b, k, rows of packs, e] in the keys' dtype."""
    shape = plan.batch, plan.head_tiles, plan.num_tiles * plan.rows
    results = [jax.ShapeDtypeStruct((*shape, features), plan.dtype) for features in (plan.key_dim, plan.value_dim)]
    sums = Sums(*(pltpu.VMEM((plan.rows, features), jnp.float32) for features in (plan.key_dim, plan.value_dim)))

    def run(inputs, lists, results, scratch: Scratch) -> None:
        kv_tile, sums = Pack(plan, inputs, lists, scratch), scratch.own
        kv_tile.begin()
        for each in sums:
            each[...] = jnp.zeros(each.shape, jnp.float32)
        kv_tile.fold(functools.partial(_step_group, plan, kv_tile, sums))
        dkey, dvalue = results
        dkey[0] = (sums.dkey[...] * plan.scale).astype(plan.dtype)
        dvalue[0] = sums.dvalue[...].astype(plan.dtype)

    specs = Specs(plan, inputs.lists)
    blocks = tuple((result, specs.tokens(result)) for result in results)
    dkey, dvalue = launch(
        "key_gradients", plan, inputs, inputs.specs(plan), blocks, scratch_of(plan, inputs, sums), run
    )
    return dkey, dvalue


def _step_group(plan: Plan, kv_tile: Pack, sums: Sums, group: StepGroup) -> None:
    key, value = kv_tile.inputs.first[0], kv_tile.inputs.second[0]
    queries_and_douts = [kv_tile.ring.read(plan, place) for place in group.places]
    products = [along(key, query) for query, _ in queries_and_douts]
    dweights = [along(value, dout) for _, dout in queries_and_douts]
    masks = [kv_tile.allowed(place) if group.masked else None for place in group.places]
    lse, delta = (
        [kv_tile.of_columns(table, group.head_pass, place) for place in group.places]
        for table in (kv_tile.inputs.lse, kv_tile.inputs.delta)
    )
    group.begin_next()
    for step, (query, dout) in enumerate(queries_and_douts):
        weights, gradient = weights_and_gradient(
            plan, products[step], dweights[step], lse[step], delta[step], masks[step]
        )
        sums.dvalue[...] += across(weights.astype(plan.dtype), dout)
        sums.dkey[...] += across(gradient.astype(plan.dtype), query)
