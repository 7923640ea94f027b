"""Forward attention by gathered blocks, in plain XLA."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.xla.layout import Layout, QueryGrid
from pallas_kernels.xla.walking import Step, fold_chunks, lengths, walk
from pallas_kernels.xla.walks import along


class RowPass:
    """A pass over tiles of queries: which units there are, what they gather, and what they may see."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.rows_per_tile = layout.walks.rows_per_tile
        self.grid: QueryGrid = layout.grid(self.rows_per_tile)
        self.keys, self.values = (layout.columns(array) for array in (layout.operands.key, layout.operands.value))

    def run(self, tile, *, bounded: bool):
        """`tile(units, fold)` for all units in chunks, where `fold(body, carry)` walks the units' lists."""
        return self.run_carrying(lambda _, units, fold: ((), tile(units, fold)), (), bounded=bounded)[1]

    def run_carrying(self, tile, carry, *, bounded: bool = False):
        """`carry, results = tile(carry, units, fold)` for all units, chunk after chunk; as in `run`."""
        layout, grid = self.layout, self.grid

        def chunk(carry, units, counts):
            ranges = jnp.where(counts[:, None, None], layout.query_slices(grid, units), 0)
            return tile(
                carry,
                units,
                lambda body, carry: walk(layout.walks, ranges, body, carry, bounded=bounded),
            )

        keys = max(layout.walks.per_step) * layout.block_size
        unit_bytes = grid.size * layout.group * keys * layout.accumulate.itemsize
        return fold_chunks(
            chunk, carry, lengths(layout.query_slices(grid, layout.units(grid.rows))), unit_bytes, layout.chunk_bytes
        )

    def places(self, units: Array, step: Step) -> tuple[Array, Array, Array]:
        """Batch element and KV head, [units, 1], and block, [units, entries], of a step's entries.

        What is no entry is the block after the last.
        """
        layout = self.layout
        batch, unique_head, _ = layout.split(units, self.grid.rows)
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
            tile = layout.split(units, self.grid.rows)[2]
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
            tile_masks = jax.lax.optimization_barrier(layout.walks.tile_masks[step.mask_ids].swapaxes(1, 2))
            masks = layout.walks.token_masks[tile_masks[:, :, None], along(row_size, 3)[..., None]]
            allowed &= jax.lax.optimization_barrier(masks)[:, :, None]
        return jnp.broadcast_to(allowed, (units, rows, layout.group, row_size, entries, block_size))


def attend(queries: RowPass, *, bounded: bool = False) -> tuple[Array, Array]:
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
            most, total, out = carry
            key, value, allowed = queries.gather(units, step)
            logits, _ = layout.logits(layout.product("umd,und->umn", query, key))
            logits = jnp.where(allowed, logits, -jnp.inf)
            new = jnp.maximum(most, logits.max(-1))
            safe = jnp.where(jnp.isneginf(new), 0, new)
            weights = jnp.exp(logits - safe[..., None])
            shrink = jnp.exp(most - safe)
            update = layout.product("umn,une->ume", weights.astype(value.dtype), value)
            return new, total * shrink + weights.sum(-1), out * shrink[..., None] + update

        most, total, out = fold(body, start)
        reads = total != 0  # a NaN is no zero: lse says so too
        safe = jnp.where(reads, total, 1)[..., None]
        lse = jnp.where(reads[..., None], jnp.log(safe) + most[..., None], -jnp.inf)
        return out / safe, lse

    out, lse = queries.run(tile, bounded=bounded)
    return layout.from_rows(queries.grid, out), layout.from_rows(queries.grid, lse)[..., 0]
