"""The gradients of attention by gathered blocks, in plain XLA: dq over queries' lists, dk and dv over keys' packs.

Two passes, each of which writes every result once: nothing is scattered, and the bits are the same every time, wherever
it runs. One pass, for CPUs, is in `one_pass`.
With P the weights and dP = dO · Vᵀ, the gradient of the logits is dS = P ∘ (dP - delta), delta = Σ out · dout - dlse.
"""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.xla.forward import RowPass
from pallas_kernels.xla.layout import Layout
from pallas_kernels.xla.walking import Step, in_chunks, lengths, walk


def query_gradient(queries: RowPass, dout: Array, lse: Array, delta: Array, *, bounded: bool = False) -> Array:
    """dq [b, t, h, d] in the accumulation dtype, from dout [b, t, h, e], lse and delta [b, t, h]."""
    layout, grid = queries.layout, queries.grid
    rows = tuple(layout.rows(grid, array) for array in (layout.operands.query, dout))
    rows += layout.rows(grid, lse[..., None], jnp.inf), layout.rows(grid, delta[..., None])

    def tile(units, fold):
        query, dout, lse, delta = (layout.tiles_of(array, units) for array in rows)

        def body(dquery, step):
            key, value, allowed = queries.gather(units, step)
            products = layout.product("umd,und->umn", query, key)
            dweights = layout.product("ume,une->umn", dout, value)
            _, dlogits = weights_and_gradient(layout, products, allowed, lse, dweights, delta)
            return dquery + layout.product("umn,und->umd", dlogits.astype(key.dtype), key)

        return fold(body, layout.full(query.shape))

    return layout.from_rows(grid, queries.run(tile, bounded=bounded))


def weights_and_gradient(layout: Layout, products, allowed, lse, dweights, delta) -> tuple[Array, Array]:
    """P, and the gradient of the products of queries and keys: dS times the slope of the cap and the scale.

    Args:
      products, dweights: query by key or key by query.
      allowed: bool, broadcasts; None where nothing is hidden.
      lse, delta: broadcast along the queries.
    """
    logits, slope = layout.logits(products)
    weights = jnp.exp(logits - lse)
    gradient = weights * (dweights - delta) * jnp.asarray(layout.problem.scale, logits.dtype)
    if slope is not None:
        gradient = gradient * slope
    if allowed is None:
        return weights, gradient
    # The mask goes on last: a hidden logit may be NaN.
    return jnp.where(allowed, weights, 0), jnp.where(allowed, gradient, 0)


def key_value_gradients(
    layout: Layout, dout: Array, lse: Array, delta: Array, *, bounded: bool = False
) -> tuple[Array, Array]:
    """dk [b, s, k, d] and dv [b, s, k, e] in the accumulation dtype; the arguments are those of `query_gradient`."""
    walks, grid = layout.walks, layout.grid(1)
    tiles = walks.members.shape[1]
    keys, values = (layout.key_blocks(array) for array in (layout.operands.key, layout.operands.value))
    queries, douts = (layout.query_blocks(grid, array) for array in (layout.operands.query, dout))
    lses, deltas = layout.query_blocks(grid, lse[..., None], jnp.inf), layout.query_blocks(grid, delta[..., None])

    def tile(units):
        batch, unique_head, kv_tile = layout.split(units, tiles)
        members = walks.members[unique_head, kv_tile]
        blocks = jnp.where(members < 0, layout.num_blocks, members)
        head = batch * layout.num_kv_heads + layout.kv_head(unique_head)
        where = head[:, None] * (layout.num_blocks + 1) + blocks
        keys_here, values_here = (array[where].reshape(len(units), -1, array.shape[-1]) for array in (keys, values))
        first_row = (batch * layout.unique_heads + unique_head) * (grid.rows + 1)

        def body(carry, step):
            dkey, dvalue = carry
            rows, step = _local_rows(layout, grid, batch, step)
            where = first_row[:, None] + rows
            query, dout, lse, delta = (
                array[where].reshape(len(units), -1, array.shape[-1]) for array in (queries, douts, lses, deltas)
            )
            allowed = _allowed(layout, grid, batch, blocks, rows, step)
            read = step.valid.any(-1)[:, None, None] if allowed is None else allowed.any(-1)[..., None]
            # As in the forward pass: the zero weight of a NaN would be a NaN.
            key, value = jnp.where(read, keys_here, 0), jnp.where(read, values_here, 0)
            products = layout.product("umd,und->umn", key, query)
            dweights = layout.product("ume,une->umn", value, dout)
            lse, delta = lse.swapaxes(1, 2), delta.swapaxes(1, 2)
            weights, dlogits = weights_and_gradient(layout, products, allowed, lse, dweights, delta)
            dvalue = dvalue + layout.product("umn,une->ume", weights.astype(dout.dtype), dout)
            return dkey + layout.product("umn,und->umd", dlogits.astype(query.dtype), query), dvalue

        start = layout.full(keys_here.shape), layout.full(values_here.shape)
        return walk(layout.walks, layout.ranges(units, tiles), body, start, bounded=bounded)

    pairs = walks.rows_per_tile * layout.block_size * max(walks.per_step) * layout.group * layout.row_size
    unit_bytes = pairs * layout.accumulate.itemsize
    gradients = in_chunks(tile, lengths(layout.ranges(layout.units(tiles), tiles)), unit_bytes, layout.chunk_bytes)
    return _in_place(layout, gradients[0]), _in_place(layout, gradients[1])


def _local_rows(layout: Layout, grid, batch: Array, step: Step) -> tuple[Array, Step]:
    """The rows of a step within this call; those of other calls, or without a query, become the empty last row."""
    rows, used = step.blocks, grid.rows
    if not isinstance(grid.first, int):
        rows = rows - grid.first[batch][:, None]
        used = -(-(grid.shift[batch][:, None] + layout.query_length) // grid.size)
    valid = step.valid & (rows >= 0) & (rows < used)
    return jnp.where(valid, rows, grid.rows), step._replace(valid=valid)


def _allowed(layout: Layout, grid, batch: Array, blocks: Array, rows: Array, step: Step) -> Array | None:
    """Which keys the queries of a step see: bool [units, keys, queries]; None where it is all that exist."""
    if step.mask_ids is None and not layout.masks_all:
        return None
    units, packed = blocks.shape
    entries, size, row_size = rows.shape[1], layout.block_size, layout.row_size
    key = layout.key_tokens(batch[:, None], blocks).reshape(units, packed, size, 1, 1, 1)
    query = layout.query_tokens(grid, batch[:, None], rows).reshape(units, 1, 1, entries, 1, row_size)
    allowed = layout.pairs(query, key)
    if step.mask_ids is not None:
        masks = layout.walks.token_masks[layout.walks.tile_masks[step.mask_ids]]
        allowed &= masks.transpose(0, 2, 4, 1, 3)[:, :, :, :, None]
    allowed = jnp.broadcast_to(allowed, (units, packed, size, entries, layout.group, row_size))
    return allowed.reshape(units, packed * size, -1)


def _in_place(layout: Layout, gradient: Array) -> Array:
    """[units, keys, f] -> [b, s, k, f]: every block from its pack; zero where nobody reads it; summed over a group."""
    places = layout.walks.places
    packed = gradient.reshape(layout.batch, layout.unique_heads, -1, layout.block_size, gradient.shape[-1])
    blocks = jnp.take_along_axis(packed, jnp.maximum(places, 0)[None, :, :, None, None], 2)
    blocks = jnp.where((places >= 0)[None, :, :, None, None], blocks, 0)
    groups = layout.unique_heads // layout.num_kv_heads
    blocks = blocks.reshape(layout.batch, layout.num_kv_heads, groups, -1, gradient.shape[-1]).sum(2)
    return blocks[:, :, : layout.kv_length].swapaxes(1, 2)
