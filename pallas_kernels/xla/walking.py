"""How the XLA kernels get through their work: units of equal length in bounded chunks, each a loop over its lists."""

import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from pallas_kernels.xla.walks import Walks, entries


class Step(typing.NamedTuple):
    """Some entries of every unit of a chunk.

    Attributes:
      blocks: int32 [units, entries].
      mask_ids: int32 [units, entries], which row of `Walks.tile_masks` masks the entry; None where nothing is masked.
      valid: bool [units, entries], False beyond a unit's last entry.
    """

    blocks: Int32[Array, "units entries"]
    mask_ids: Int32[Array, "units entries"] | None
    valid: Bool[Array, "units entries"]


def walk(walks: Walks, ranges: Int32[Array, "units parts 2"], body, carry, *, bounded: bool):
    """Folds `body(carry, step)` over the lists of a chunk of units, entries without a mask first.

    Args:
      bounded: makes as many steps as the longest list of all needs, so that reverse-mode differentiation works. Else
        as many as this chunk needs.
    """
    for full, longest, count in zip((True, False), walks.longest, walks.per_step, strict=True):
        parts = ranges[:, : walks.num_full_ranges] if full else ranges[:, walks.num_full_ranges :]
        if not parts.shape[1] or not longest:
            continue
        masked = not full and walks.tile_masks is not None

        def fold(index, carry, parts=parts, masked=masked, count=count):
            position, valid = entries(parts, index.astype(jnp.int32) * count, count)
            mask_ids = walks.mask_ids[position] if masked else None
            return body(carry, Step(walks.blocks[position], mask_ids, valid))

        if bounded:
            carry = jax.lax.fori_loop(0, -(-longest // count), jax.checkpoint(fold), carry)
        else:
            most = lengths(parts).max()
            carry = jax.lax.fori_loop(0, -(-most // count), fold, carry)
    return carry


def lengths(ranges: Int32[Array, "units parts 2"]) -> Int32[Array, " units"]:
    """How many entries units walk."""
    return jnp.maximum(ranges[..., 1] - ranges[..., 0], 0).sum(-1, dtype=jnp.int32)


def in_chunks(function, lengths: Int32[Array, " units"], unit_bytes: int, chunk_bytes: int):
    """`function(unit numbers [chunk])` for all units, results [units, ...] in their order.

    Units of like length are put in one chunk, so that none waits for a longer one.
    """
    return fold_chunks(lambda carry, units, _: (carry, function(units)), (), lengths, unit_bytes, chunk_bytes)[1]


def fold_chunks(function, carry, lengths: Int32[Array, " units"], unit_bytes: int, chunk_bytes: int):
    """`carry, results = function(carry, unit numbers [chunk], counts [chunk])` for all units, as in `in_chunks`.

    `counts` is False where a unit came before: the last chunk is filled up with the shortest one.
    """
    units = lengths.shape[0]
    size = max(1, chunk_bytes // unit_bytes)
    size = min(units, size) if isinstance(units, int) else size
    chunks = -(-units // size)
    order = jnp.argsort(-jax.lax.optimization_barrier(lengths), stable=True).astype(jnp.int32)
    place = jnp.arange(chunks * size, dtype=jnp.int32)
    last = jnp.asarray(units - 1, jnp.int32)
    padded, counts = order[jnp.minimum(place, last)], place <= last
    chunked = padded.reshape(chunks, size), counts.reshape(chunks, size)
    carry, results = jax.lax.scan(lambda carry, chunk: function(carry, *chunk), carry, chunked)
    back = jnp.argsort(order).astype(jnp.int32)
    return carry, jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[back], results)
