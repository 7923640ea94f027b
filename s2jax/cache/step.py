"""One step of a KV cache, on one device or on a shard of a mesh: appends tokens and attends from them."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.softmax import PartialAttention, merge
from s2jax.cache.attention import BufferSchedule, Keys, Options, attend, per_sequence
from s2jax.cache.buffers import Buffer, BufferLayout, expand_like, in_blocks
from s2jax.cache.layout import CacheLayout

INVALID_LENGTH = 2**30
"""A length beyond every context, of sequences that were asked for what cannot be."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tables:
    """The arrays that say what each KV head keeps and reads, split over a mesh as the heads are.

    Attributes:
      layouts, schedules: those of every buffer.
      order: int32 [k], the place of every KV head among those of all buffers, one buffer after the other; on a mesh,
        among those of its shard.
    """

    layouts: tuple[BufferLayout, ...]
    schedules: tuple[BufferSchedule, ...]
    order: Int32[np.ndarray | Array, " k"]

    @classmethod
    def of(cls, layout: CacheLayout, fork_blocks: int | None, shards: int) -> "Tables":
        """Builds the tables of a cache, split over `shards` of the layout's shards."""
        layouts = tuple(BufferLayout.of(layout, heads, fork_blocks, shards) for heads in layout.buffers)
        heads = np.concatenate([each.heads.reshape(shards, -1) for each in layouts], 1)
        order = np.argsort(heads, 1).astype(np.int32).reshape(-1)
        return cls(layouts, tuple(BufferSchedule.of(layout, heads) for heads in layout.buffers), order)

    def limit(self, lowest: Int32[Array, " b"]) -> Int32[Array, " b"]:
        """The first position of every sequence that has no slot.

        Args:
          lowest: the first position after the prefix that the sequences of a fork share, else 0.
        """
        layout = self.layouts[0].layout
        most = INVALID_LENGTH if layout.max_length is None else layout.max_length
        fork_blocks = next((each.fork_blocks for each in self.layouts if each.fork_blocks is not None), None)
        if fork_blocks is None:
            return jnp.full(len(lowest), most, jnp.int32)
        return jnp.minimum(most, lowest + fork_blocks * layout.block_size)

    def join(self, parts: list[PartialAttention]) -> PartialAttention:
        """Joins the results of the buffers into those of all KV heads, in their order."""
        if len(parts) == 1:
            return parts[0]
        return jax.tree.map(lambda *each: jnp.concatenate(each, 2)[:, :, self.order], *parts)


@dataclasses.dataclass(frozen=True)
class Step:
    """Tokens that come to every sequence.

    Attributes:
      positions: int32 [b, t], positions of the tokens.
      before, after: int32 [b], lengths of the sequences.
      limit: int32 [b], the first position that the cache has no slot for.
      first: int32 [b], the first own block after a fork.
      all_finite: True if no value that may be met is NaN or Inf.
    """

    layout: CacheLayout
    positions: Int32[Array, "b t"]
    before: Int32[Array, " b"]
    after: Int32[Array, " b"]
    limit: Int32[Array, " b"]
    first: Int32[Array, " b"] | None
    all_finite: Bool[Array, ""]
    options: Options

    def extend(
        self,
        layout: BufferLayout,
        schedule: BufferSchedule,
        before: Buffer,
        prefix: Buffer | None,
        query: Float[Array, "b t k g d"],
        key: Float[Array, "b t k d"],
        value: Float[Array, "b t k e"],
    ) -> tuple[PartialAttention, Buffer]:
        """Appends tokens to one buffer and attends over it, for the tokens of its own KV heads."""
        batch, length = self.positions.shape
        size, masks = self.layout.block_size, self.layout.schedule.token_masks
        count = (length + size - 2) // size + 1
        rows = self.positions[:, :1] // size + jnp.arange(count, dtype=jnp.int32)[None]
        start, end = jnp.zeros_like(self.before), jnp.minimum(self.after, self.limit)

        def over(buffer: Buffer, slot_of: typing.Callable[[Array], Array], start, stop) -> PartialAttention:
            mask_ids = schedule.mask_ids(rows, per_sequence(buffer.block_ids, batch), slot_of)
            keys = Keys(
                buffer.key, buffer.value, buffer.key_scale, buffer.value_scale, buffer.block_ids, mask_ids, start, stop
            )
            return attend(query, self.positions, keys, masks, self.options, self.all_finite)

        slot_of = functools.partial(layout.slot_of, first=self.first)
        after = layout.append(before, key, value, self.positions, end, self.first)
        if length - 1 <= self.layout.max_rollback:
            # No block that one of these tokens reads was overwritten.
            parts = [over(after, slot_of, start, self.after)]
        else:
            new = in_blocks(key, value, self.positions[:, 0], size, count)
            parts = [
                over(before, slot_of, start, self.before),
                over(new, lambda block: block - expand_like(rows[:, 0], block), self.before, self.after),
            ]
        if prefix is not None:
            parts.append(over(prefix, functools.partial(layout.without_fork().slot_of, first=None), start, self.after))
        return functools.reduce(lambda one, other: merge([one, other]), parts), after


def longer(lengths: Array, tokens: int, counts: Array | None) -> Int32[Array, " b"]:
    """Lengths after `tokens` more, or after the counts among them; `INVALID_LENGTH` where a count is impossible."""
    if counts is None:
        return lengths + tokens
    return jnp.where((counts >= 0) & (counts <= tokens), lengths + counts, INVALID_LENGTH)


@functools.partial(jax.jit, static_argnums=(0, 1))
def same_counts(batch: int, tokens: int) -> Int32[Array, " b"]:
    """The same number of tokens for every sequence. Compiled: over a mesh it is made where it is needed."""
    return jnp.full(batch, tokens, jnp.int32)


@jax.jit
def emptied(which: Bool[Array, " b"], block_ids: tuple[Array, ...], lengths: Array, max_lengths: Array) -> tuple:
    """The blocks in every slot, lengths and `max_lengths`, of none where `which` is True."""
    kept = tuple(jnp.where(which[:, None, None], -1, blocks) for blocks in block_ids)
    return kept, jnp.where(which, 0, lengths), jnp.where(which, 0, max_lengths)
