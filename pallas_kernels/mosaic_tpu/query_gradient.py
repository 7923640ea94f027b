"""The gradient of the queries on TPUs: tiles of them, which walk the keys that they read.

dQ = dS · K times the scale of the logits.
"""

import functools
import typing

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.arrange import Inputs
from pallas_kernels.mosaic_tpu.gradient import weights_and_gradient
from pallas_kernels.mosaic_tpu.launch import Specs, launch
from pallas_kernels.mosaic_tpu.masks import widen
from pallas_kernels.mosaic_tpu.plan import Plan
from pallas_kernels.mosaic_tpu.products import across, along, to_rows
from pallas_kernels.mosaic_tpu.query_tile import QueryTile
from pallas_kernels.mosaic_tpu.tile import Scratch, StepGroup, scratch_of
from pallas_kernels.mosaic_tpu.tiles import LANES


class Rows(typing.NamedTuple):
    """What a tile sums up, and what its rows have, in references.

    Attributes:
      gradient: float32 [rows, d].
      lse, delta: float32 [rows, LANES], each row's in all lanes.
    """

    gradient: typing.Any
    lse: typing.Any
    delta: typing.Any


def query_gradient(plan: Plan, inputs: Inputs) -> Array:
    """dq [b, h, t, d] in the query's dtype, in whole tiles."""
    shape = plan.batch, plan.head_tiles * plan.row_heads, plan.num_tiles * plan.row_tokens, plan.key_dim
    result = jax.ShapeDtypeStruct(shape, plan.dtype)
    per_row = pltpu.VMEM((plan.rows, LANES), jnp.float32)
    own = Rows(pltpu.VMEM((plan.rows, plan.key_dim), jnp.float32), per_row, per_row)

    def run(inputs, lists, results, scratch: Scratch) -> None:
        tile, rows = QueryTile(plan, inputs, lists, scratch), scratch.own
        tile.begin()
        rows.lse[...], rows.delta[...] = to_rows(inputs.lse[...]), to_rows(inputs.delta[...])
        rows.gradient[...] = jnp.zeros(rows.gradient.shape, jnp.float32)
        tile.fold(functools.partial(_step_group, plan, tile, rows))
        gradient = (rows.gradient[...] * plan.scale).astype(plan.dtype)
        results[0][...] = gradient.reshape(plan.row_heads, plan.row_tokens, plan.key_dim)

    scratch, block = scratch_of(plan, inputs, own), Specs(plan, inputs.lists).tokens(result)
    (found,) = launch("query_gradient", plan, inputs, inputs.specs(plan), ((result, block),), scratch, run)
    return found


def _step_group(plan: Plan, tile: QueryTile, rows: Rows, group: StepGroup) -> None:
    query = tile.inputs.first[...].reshape(plan.rows, plan.key_dim)
    dout = tile.inputs.second[...].reshape(plan.rows, plan.value_dim)
    keys_and_values = [tile.ring.read(plan, place) for place in group.places]
    products = [along(query, key) for key, _ in keys_and_values]
    dweights = [along(dout, value) for _, value in keys_and_values]
    masks = [tile.allowed(place) if group.masked else None for place in group.places]
    group.begin_next()
    lse, delta = widen(rows.lse[...], plan.step_size), widen(rows.delta[...], plan.step_size)
    for step, (key, _) in enumerate(keys_and_values):
        _, gradient = weights_and_gradient(plan, products[step], dweights[step], lse, delta, masks[step])
        rows.gradient[...] += across(gradient.astype(plan.dtype), key)
