"""Ranges of documents packed into a sequence: tiles skip blocks of other documents, and need no mask in their own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.sharding import varying_like


def narrow(
    blocks: Array, ranges: Array, num_full_ranges: int, query_ids: Array, kv_ids: Array, block_size: int
) -> Array:
    """The ranges without the blocks that share no segment with the tile.

    Every full range becomes three: the blocks within the one segment of all the tile's queries, which still need no
    mask, and the blocks before and after, which do. If documents follow one another with ascending ids, exactly the
    unshared blocks are skipped; otherwise fewer.

    Args:
      blocks: int32 [entries], ascending within a range.
      ranges: int32 [b|1, heads, tiles, ranges, 2].
      num_full_ranges: the first `num_full_ranges` need no mask.
      query_ids: int32 [b, tiles, queries].
      kv_ids: int32 [b, s], s a multiple of block_size.

    Returns:
      int32 [b, heads, tiles, ranges + 2 · num_full_ranges, 2], of which the first `num_full_ranges` need no mask.
    """
    least, most = query_ids.min(-1)[..., None], query_ids.max(-1)[..., None]
    by_block = kv_ids.reshape(kv_ids.shape[0], -1, block_size)
    least_key, most_key = by_block.min(-1)[:, None], by_block.max(-1)[:, None]
    shared = _first_run((least <= most_key) & (least_key <= most), whole=True)
    own = _first_run((least == most) & (least_key == least) & (most_key == least), whole=False)
    low, high = (edge[:, None, :, None] for edge in shared)
    own_low, own_high = (edge[:, None, :, None] for edge in own)
    own_low, own_high = jnp.where(own_low < own_high, own_low, high), jnp.where(own_low < own_high, own_high, high)
    return _cut(blocks, ranges, num_full_ranges, low, own_low, own_high, high)


def narrow_kv_tiles(
    blocks: Array, ranges: Array, num_full_ranges: int, query_ids: Array, kv_ids: Array, first_row
) -> Array:
    """The ranges without the query rows that share no segment with a KV tile.

    If ids ascend, exactly the unshared rows are skipped and exactly the rows within one segment need no mask. Otherwise
    all rows are masked, and rows between shared ones are read too.

    Args:
      blocks: int32 [entries], rows, ascending within a range.
      ranges: int32 [b|1, k, kv_tiles, head_passes, ranges, 2].
      query_ids: int32 [b, rows, queries].
      kv_ids: int32 [b, k, kv_tiles, keys].
      first_row: int, or int32 [b, 1, 1], which row of the lists the first one is.
    """
    least, most, first, last = query_ids.min(-1), query_ids.max(-1), kv_ids.min(-1), kv_ids.max(-1)
    low = _place(jax.lax.cummax(most, 1), first, "left")
    high = jnp.maximum(low, _place(jax.lax.cummin(least, 1, reverse=True), last, "right"))
    ascending = (jnp.diff(query_ids.reshape(len(query_ids), -1)) >= 0).all(1)[:, None, None]
    own_low, own_high = _place(least, first, "left"), _place(most, first, "right")
    own = ascending & (first == last) & (own_low < own_high)
    edges = low, jnp.where(own, own_low, high), jnp.where(own, own_high, high), high
    return _cut(blocks, ranges, num_full_ranges, *((edge + first_row)[..., None, None] for edge in edges))


def _place(rows: Array, ids: Array, side: str) -> Array:
    """Insertion points of `ids` [b, ...] in the ascending ids of rows [b, rows]: int32 [b, ...]."""
    return jax.vmap(lambda rows, ids: jnp.searchsorted(rows, ids, side=side))(rows, ids).astype(jnp.int32)


def _cut(
    blocks: Array, ranges: Array, num_full_ranges: int, low: Array, own_low: Array, own_high: Array, high: Array
) -> Array:
    """The ranges without the blocks before `low` and from `high` on; those from `own_low` to `own_high` stay full.

    Returns:
      int32 [b, ..., ranges + 2 · num_full_ranges, 2], of which the first `num_full_ranges` need no mask.
    """
    cuts = [find(blocks, ranges, edge) for edge in (low, own_low, own_high, high)]

    def part(which: slice, start: int, stop: int) -> Array:
        return jnp.stack([cuts[start][..., which], cuts[stop][..., which]], -1)

    full, partial = slice(0, num_full_ranges), slice(num_full_ranges, None)
    return jnp.concatenate([part(full, 1, 2), part(full, 0, 1), part(full, 2, 3), part(partial, 0, 3)], -2)


def _first_run(condition: Array, *, whole: bool) -> tuple[Array, Array]:
    """First index where the condition holds, and one past the last: int32 [...], 0 and 0 if there is none.

    Args:
      condition: bool [..., n].
      whole: takes the last index of all, instead of the last of the first run.
    """
    count = condition.shape[-1]
    first = jnp.argmax(condition, -1).astype(jnp.int32)
    if whole:
        end = count - jnp.argmax(condition[..., ::-1], -1).astype(jnp.int32)
    else:
        after = ~condition & (jnp.arange(count, dtype=jnp.int32) > first[..., None])
        end = jnp.where(after.any(-1), jnp.argmax(after, -1).astype(jnp.int32), count)
    some = condition.any(-1)
    return jnp.where(some, first, 0), jnp.where(some, end, 0)


def find(blocks: Int32[Array, " entries"], ranges: Array, block: Array) -> Array:
    """The position in every range [..., 2] of the first entry that is at least `block`: int32 [...]."""
    low, high = ranges[..., 0], jnp.maximum(ranges[..., 1], ranges[..., 0])
    low, high = (jnp.broadcast_to(edge, jnp.broadcast_shapes(edge.shape, block.shape)) for edge in (low, high))
    # Over a mesh, ranges vary over heads and `block` over sequences.
    low, high = (varying_like(varying_like(edge, block), ranges) for edge in (low, high))

    def halve(_, edges):
        low, high = edges
        middle = (low + high) // 2
        below = (low < high) & (blocks[jnp.minimum(middle, blocks.shape[0] - 1)] < block)
        return jnp.where(below, middle + 1, low), jnp.where(below, high, jnp.minimum(high, middle))

    return jax.lax.fori_loop(0, blocks.shape[0].bit_length(), halve, (low, high))[0]
