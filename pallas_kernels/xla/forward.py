"""Forward attention by gathered blocks, and its forward-mode derivatives, in plain XLA.

With P the weights and dl the tangent of the logits, the tangents are dlse = Σ P ∘ dl and dout = Σ (P ∘ dl) v + Σ P dv
- dlse · out: sums over the blocks that a query reads, as in the forward pass, but with lse known beforehand.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.xla.block_lists import Step, along, fold_chunks, fold_lists, lengths
from pallas_kernels.xla.layout import Layout


class QueryPass:
    """A pass over tiles of queries: its units, the keys that they gather, and the pairs that they may see."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.rows_per_tile = layout.lists.rows_per_tile
        self.grid = layout.grid(self.rows_per_tile)
        self.keys, self.values = (layout.columns(array) for array in (layout.operands.key, layout.operands.value))

    def run(self, tile, *, bounded: bool = False):
        """`tile(units, fold)` for all units in chunks, where `fold(body, carry)` loops over the units' lists."""
        return self.run_carrying(lambda _, units, fold: ((), tile(units, fold)), (), bounded=bounded)[1]

    def run_carrying(self, tile, carry, *, bounded: bool = False):
        """`carry, results = tile(carry, units, fold)` for all units, chunk after chunk; as in `run`."""
        layout, grid = self.layout, self.grid

        def chunk(carry, units, counts):
            ranges = jnp.where(counts[:, None, None], layout.query_ranges(grid, units), 0)

            def fold(body, carry):
                return fold_lists(layout.lists, ranges, body, carry, bounded=bounded)

            return tile(carry, units, fold)

        keys = max(layout.lists.per_step) * layout.block_size
        unit_bytes = grid.block_q * layout.group * keys * layout.accumulate.itemsize
        return fold_chunks(
            chunk,
            carry,
            lengths(layout.query_ranges(grid, layout.units(grid.num_tiles))),
            unit_bytes,
            layout.chunk_bytes,
        )

    def places(self, units: Array, step: Step) -> tuple[Array, Array, Array]:
        """Batch element and KV head, [units, 1], and block, [units, entries], of a step's entries.

        What is no entry is the block after the last.
        """
        layout = self.layout
        batch, unique_head, _ = layout.split(units, self.grid.num_tiles)
        valid = step.valid & (step.blocks >= 0) & (step.blocks < layout.num_blocks)
        return batch[:, None], layout.kv_head(unique_head)[:, None], jnp.where(valid, step.blocks, layout.num_blocks)

    def gather(self, units: Array, step: Step) -> tuple[Array, Array, Array]:
        """Keys [units, n, d], values [units, n, e] and what may be seen, bool [units, m|1, n], of a step.

        What no query of the tile may see is zero: else the zero weight of a NaN would be a NaN.
        """
        layout = self.layout
        batch, head, blocks = self.places(units, step)
        # Small arrays, which XLA would else work out anew for every logit.
        blocks = jax.lax.optimization_barrier(blocks)
        seen, inside = layout.key_tokens(batch, blocks), jnp.minimum(blocks, layout.num_blocks - 1)
        key, value = (
            array.at[batch, inside, :, head].get(mode="promise_in_bounds").reshape(len(units), -1, array.shape[-1])
            for array in (self.keys, self.values)
        )
        if step.mask_ids is None and not layout.masks_all:
            read = allowed = seen.exists.reshape(len(units), 1, -1)
        else:
            tile = layout.split(units, self.grid.num_tiles)[2]
            allowed = self._allowed(batch[:, 0], tile, seen, step).reshape(len(units), -1, key.shape[1])
            read = allowed.any(1, keepdims=True)
        allowed, read = jax.lax.optimization_barrier((allowed, read.swapaxes(1, 2)))
        return jnp.where(read, key, 0), jnp.where(read, value, 0), allowed

    def add(self, total: Array, units: Array, step: Step, part: Array) -> Array:
        """Adds [units, n, f] to the columns that the keys of a step were gathered from."""
        layout = self.layout
        batch, head, blocks = self.places(units, step)
        part = part.reshape(*blocks.shape, layout.block_size, -1)
        return total.at[batch, blocks, :, head].add(part, mode="drop")

    def _allowed(self, batch: Array, tile: Array, seen, step: Step) -> Array:
        """bool [units, rows, group, row_size, entries, block_size]."""
        layout = self.layout
        units, entries, block_size = seen.exists.shape
        rows, row_size = self.rows_per_tile, layout.row_size
        query = layout.query_tokens(self.grid, batch, tile).reshape(units, rows, 1, row_size, 1, 1)
        allowed = layout.pairs(query, seen.reshape(units, 1, 1, 1, entries, block_size))
        if step.mask_ids is not None:
            # Row by row, in the order in which they are used: a CPU takes thrice as long to transpose what it gathered.
            tile_masks = jax.lax.optimization_barrier(layout.lists.tile_masks[step.mask_ids].swapaxes(1, 2))
            masks = layout.lists.token_masks[tile_masks[:, :, None], along(row_size, 3)[..., None]]
            allowed &= jax.lax.optimization_barrier(masks)[:, :, None]
        return jnp.broadcast_to(allowed, (units, rows, layout.group, row_size, entries, block_size))


def attend(queries: QueryPass) -> tuple[Array, Array]:
    """Online softmax (FlashAttention) over the blocks that every tile of queries reads, sinks left out.

    Returns:
      out [b, t, h, e] and lse [b, t, h], in the accumulation dtype.
    """
    layout = queries.layout
    rows = layout.rows(queries.grid, layout.operands.query)
    features = layout.operands.value.shape[-1]

    def tile(units, fold):
        query = layout.tiles_of(rows, units)
        shape = query.shape[:2]
        start = layout.full(shape, -jnp.inf), layout.full(shape), layout.full((*shape, features))

        def body(carry, step):
            m, l, acc = carry
            key, value, allowed = queries.gather(units, step)
            logits, _ = layout.logits(layout.product("umd,und->umn", query, key))
            logits = jnp.where(allowed, logits, -jnp.inf)
            m_next = jnp.maximum(m, logits.max(-1))
            safe = jnp.where(jnp.isneginf(m_next), 0, m_next)
            weights = jnp.exp(logits - safe[..., None])
            alpha = jnp.exp(m - safe)
            update = layout.product("umn,une->ume", weights.astype(value.dtype), value)
            return m_next, l * alpha + weights.sum(-1), acc * alpha[..., None] + update

        m, l, acc = fold(body, start)
        reads = l != 0  # a NaN is no zero: lse says so too
        safe = jnp.where(reads, l, 1)[..., None]
        lse = jnp.where(reads[..., None], jnp.log(safe) + m[..., None], -jnp.inf)
        return acc / safe, lse

    out, lse = queries.run(tile)
    return layout.from_rows(queries.grid, out), layout.from_rows(queries.grid, lse)[..., 0]


def attend_tangents(queries: QueryPass, moved: QueryPass, lse: Array, *, bounded: bool = False) -> tuple[Array, Array]:
    """Σ (P ∘ dl) v + Σ P dv, [b, t, h, e], and Σ P ∘ dl, [b, t, h], in the accumulation dtype.

    Args:
      moved: the same pass over the tangents of queries, keys and values.
      lse: [b, t, h], sinks included; inf where a row reads nothing.
    """
    layout, grid = queries.layout, queries.grid
    rows = [layout.rows(grid, each.layout.operands.query) for each in (queries, moved)]
    lse_rows = layout.rows(grid, lse[..., None], jnp.inf)
    features = layout.operands.value.shape[-1]

    def tile(units, fold):
        query, dquery = (layout.tiles_of(each, units) for each in rows)
        lse = layout.tiles_of(lse_rows, units)

        def body(carry, step):
            out, total = carry
            key, value, allowed = queries.gather(units, step)
            dkey, dvalue, _ = moved.gather(units, step)
            logits, slope = layout.logits(layout.product("umd,und->umn", query, key))
            change = layout.product("umd,und->umn", dquery, key) + layout.product("umd,und->umn", query, dkey)
            change = change * jnp.asarray(layout.problem.scale, change.dtype)
            change = change if slope is None else change * slope
            weights = jnp.exp(logits - lse)
            # The mask goes on last: a hidden logit may be NaN.
            change, weights = jnp.where(allowed, weights * change, 0), jnp.where(allowed, weights, 0)
            out = out + layout.product("umn,une->ume", change.astype(value.dtype), value)
            out = out + layout.product("umn,une->ume", weights.astype(value.dtype), dvalue)
            return out, total + change.sum(-1)

        out, total = fold(body, (layout.full((*query.shape[:2], features)), layout.full(query.shape[:2])))
        return out, total[..., None]

    out, total = queries.run(tile, bounded=bounded)
    return layout.from_rows(grid, out), layout.from_rows(grid, total)[..., 0]
