"""The gradients of attention by gathered blocks, in plain XLA.

With P the weights and dP = dO · Vᵀ, the gradient of the logits is dS = P ∘ (dP - delta), delta = Σ out · dout - dlse.

On GPUs and TPUs, dq is one pass over the queries' lists, and dk and dv are another over the lists of KV tiles. Each
writes every result once: nothing is scattered, and the bits are the same every time. On CPUs a single pass over the
queries' lists computes each weight once for all three, in five matrix products instead of seven. It adds dk and dv up
in place, which gives the same bits only where a scatter applies its updates in order.
"""

import typing

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.xla.block_lists import Step, fold_lists, in_chunks, lengths
from pallas_kernels.xla.forward import QueryPass
from pallas_kernels.xla.layout import Layout


def query_gradient(queries: QueryPass, dout: Array, lse: Array, delta: Array, *, bounded: bool = False) -> Array:
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


class KeyPass:
    """A pass over KV tiles: its units, the queries that they gather, and the pairs that they may see."""

    def __init__(self, layout: Layout):
        self.layout, self.grid = layout, layout.grid(1)
        self.tiles = layout.lists.members.shape[1]

    def run(self, tile):
        """`tile(units, fold)` for all units in chunks, [units, keys, f]; the results are [b, s, k, f].

        Every block of keys takes its result from its tile, zero if no query reads it; a group's heads are added up.
        """
        layout, lists = self.layout, self.layout.lists

        def chunk(units):
            ranges = layout.ranges(units, self.tiles)
            return tile(units, lambda body, carry, bounded: fold_lists(lists, ranges, body, carry, bounded=bounded))

        pairs = lists.rows_per_tile * layout.block_size * max(lists.per_step) * layout.group * layout.row_size
        entries = lengths(layout.ranges(layout.units(self.tiles), self.tiles))
        found = in_chunks(chunk, entries, pairs * layout.accumulate.itemsize, layout.chunk_bytes)
        return tuple(self._in_place(each) for each in found)

    def blocks(self, units: Array) -> tuple[Array, Array, Array]:
        """Batch element and unique head, [units], and key blocks, [units, rows]; an absent one is after the last."""
        batch, unique_head, kv_tile = self.layout.split(units, self.tiles)
        members = self.layout.lists.members[unique_head, kv_tile]
        return batch, unique_head, jnp.where(members < 0, self.layout.num_blocks, members)

    def local_rows(self, batch: Array, step: Step) -> tuple[Array, Step]:
        """The rows of a step within this call; those of other calls, or without queries, become the empty last row."""
        grid, rows, used = self.grid, step.blocks, self.grid.num_tiles
        if not isinstance(grid.first, int):
            rows = rows - grid.first[batch][:, None]
            shift = typing.cast(Array, grid.shift)
            used = -(-(shift[batch][:, None] + self.layout.query_length) // grid.block_q)
        valid = step.valid & (rows >= 0) & (rows < used)
        return jnp.where(valid, rows, grid.num_tiles), step._replace(valid=valid)

    def allowed(self, batch: Array, blocks: Array, rows: Array, step: Step) -> Array | None:
        """bool [units, keys, queries], True where a query of the step sees a key; None if all that exist do."""
        layout = self.layout
        if step.mask_ids is None and not layout.masks_all:
            return None
        units, tile_blocks = blocks.shape
        entries, size, row_size = rows.shape[1], layout.block_size, layout.row_size
        key = layout.key_tokens(batch[:, None], blocks).reshape(units, tile_blocks, size, 1, 1, 1)
        query = layout.query_tokens(self.grid, batch[:, None], rows).reshape(units, 1, 1, entries, 1, row_size)
        allowed = layout.pairs(query, key)
        if step.mask_ids is not None:
            masks = layout.lists.token_masks[layout.lists.tile_masks[step.mask_ids]]
            allowed &= masks.transpose(0, 2, 4, 1, 3)[:, :, :, :, None]
        allowed = jnp.broadcast_to(allowed, (units, tile_blocks, size, entries, layout.group, row_size))
        return allowed.reshape(units, tile_blocks * size, -1)

    def _in_place(self, results: Array) -> Array:
        layout, places, features = self.layout, self.layout.lists.places, results.shape[-1]
        blocks = results.reshape(layout.batch, layout.unique_heads, -1, layout.block_size, features)
        blocks = jnp.take_along_axis(blocks, jnp.maximum(places, 0)[None, :, :, None, None], 2)
        blocks = jnp.where((places >= 0)[None, :, :, None, None], blocks, 0)
        groups = layout.unique_heads // layout.num_kv_heads
        blocks = blocks.reshape(layout.batch, layout.num_kv_heads, groups, -1, features).sum(2, dtype=blocks.dtype)
        return blocks[:, :, : layout.kv_length].swapaxes(1, 2)


def key_value_gradients(
    keys: KeyPass, dout: Array, lse: Array, delta: Array, *, bounded: bool = False
) -> tuple[Array, Array]:
    """dk [b, s, k, d] and dv [b, s, k, e] in the accumulation dtype; the arguments are those of `query_gradient`."""
    layout, grid = keys.layout, keys.grid
    key_blocks, value_blocks = (layout.key_blocks(array) for array in (layout.operands.key, layout.operands.value))
    queries, douts = (layout.query_blocks(grid, array) for array in (layout.operands.query, dout))
    lses, deltas = layout.query_blocks(grid, lse[..., None], jnp.inf), layout.query_blocks(grid, delta[..., None])

    def gather(array: Array, index: Array) -> Array:
        return array[index].reshape(len(index), -1, array.shape[-1])

    def tile(units, fold):
        batch, unique_head, blocks = keys.blocks(units)
        head = batch * layout.num_kv_heads + layout.kv_head(unique_head)
        block_index = head[:, None] * (layout.num_blocks + 1) + blocks
        tile_key, tile_value = gather(key_blocks, block_index), gather(value_blocks, block_index)
        first_row = (batch * layout.unique_heads + unique_head) * (grid.num_tiles + 1)

        def body(carry, step):
            dkey, dvalue = carry
            rows, step = keys.local_rows(batch, step)
            query, dout, lse, delta = (
                gather(each, first_row[:, None] + rows) for each in (queries, douts, lses, deltas)
            )
            allowed = keys.allowed(batch, blocks, rows, step)
            read = step.valid.any(-1)[:, None, None] if allowed is None else allowed.any(-1)[..., None]
            # As in the forward pass: the zero weight of a NaN would be a NaN.
            key, value = jnp.where(read, tile_key, 0), jnp.where(read, tile_value, 0)
            products = layout.product("umd,und->umn", key, query)
            dweights = layout.product("ume,une->umn", value, dout)
            lse, delta = lse.swapaxes(1, 2), delta.swapaxes(1, 2)
            weights, dlogits = weights_and_gradient(layout, products, allowed, lse, dweights, delta)
            dvalue = dvalue + layout.product("umn,une->ume", weights.astype(dout.dtype), dout)
            return dkey + layout.product("umn,und->umd", dlogits.astype(query.dtype), query), dvalue

        return fold(body, (layout.full(tile_key.shape), layout.full(tile_value.shape)), bounded)

    dkey, dvalue = keys.run(tile)
    return dkey, dvalue


def read_keys(keys: KeyPass) -> Array:
    """bool [b, s, k], True for keys that some query of the KV head's group reads, as known at run time."""
    layout = keys.layout

    def tile(units, fold):
        batch, _, blocks = keys.blocks(units)
        shape = len(units), blocks.shape[1] * layout.block_size, 1

        def body(read, step):
            rows, step = keys.local_rows(batch, step)
            allowed = keys.allowed(batch, blocks, rows, step)
            seen = step.valid.any(-1)[:, None] if allowed is None else allowed.any(-1)
            return jnp.maximum(read, seen[..., None].astype(read.dtype))

        return (fold(body, layout.full(shape), False),)

    return keys.run(tile)[0][..., 0] > 0


def all_gradients(queries: QueryPass, dout: Array, lse: Array, delta: Array) -> tuple[Array, Array, Array]:
    """dq [b, t, h, d], dk [b, s, k, d] and dv [b, s, k, e] in the accumulation dtype.

    Args:
      dout: [b, t, h, e].
      lse, delta: [b, t, h].
    """
    layout, grid = queries.layout, queries.grid
    rows = tuple(layout.rows(grid, array) for array in (layout.operands.query, dout))
    rows += layout.rows(grid, lse[..., None], jnp.inf), layout.rows(grid, delta[..., None])

    def tile(totals, units, fold):
        query, dout, lse, delta = (layout.tiles_of(array, units) for array in rows)
        # Keys by queries: the products for dk and dv then contract what lies together.
        lse, delta = lse.swapaxes(1, 2), delta.swapaxes(1, 2)

        def body(carry, step):
            dquery, *totals = carry
            key, value, allowed = queries.gather(units, step)
            products = layout.product("und,umd->unm", key, query)
            dweights = layout.product("une,ume->unm", value, dout)
            allowed = allowed.swapaxes(1, 2)
            weights, dlogits = weights_and_gradient(layout, products, allowed, lse, dweights, delta)
            dlogits = dlogits.astype(key.dtype)
            dkey = layout.product("unm,umd->und", dlogits, query)
            dvalue = layout.product("unm,ume->une", weights.astype(dout.dtype), dout)
            dquery = dquery + layout.product("unm,und->umd", dlogits, key)
            totals = (queries.add(total, units, step, part) for total, part in zip(totals, (dkey, dvalue), strict=True))
            return dquery, *totals

        dquery, *totals = fold(body, (layout.full(query.shape), *totals))
        return totals, dquery

    totals = [layout.full(columns.shape) for columns in (queries.keys, queries.values)]
    totals, dquery = queries.run_carrying(tile, totals)
    dkey, dvalue = (layout.from_columns(total) for total in totals)
    return layout.from_rows(grid, dquery), dkey, dvalue
