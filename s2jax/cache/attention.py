"""Attention over blocks of keys that lie in any slots, each with its number in the context.

The keys that a query reads are looked up in the compiled pattern: its row's entries are carried to the slots of their
blocks. A slot that holds another block than its row asks for is not read.
"""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.checks import check_number
from pallas_kernels.schedule import NOTHING
from pallas_kernels.sharding import equally_varying
from pallas_kernels.softmax import PartialAttention, merge
from s2jax.cache.layout import CacheLayout

PAIRS_AT_ONCE = 1 << 23
"""Logits computed together: the slots that several tokens read are visited in parts, which bounds memory."""

RUN, FEW_ROWS = 512, 16
"""Where so few rows of weights meet many values, XLA for CPUs multiplies runs of these six times as fast as all."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BufferSchedule:
    """The part of a cache's schedule that belongs to one buffer, for lookups under `jit`.

    Attributes:
      unique_heads: int32 [k, w], the distinct heads of each KV head's group; one column if they are all the same.
      max_entries: entries of the longest row of any of them.
    """

    unique_heads: Int32[np.ndarray | Array, "k w"]
    layout: CacheLayout = dataclasses.field(metadata={"static": True})
    max_entries: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, layout: CacheLayout, kv_heads: tuple[int, ...]) -> "BufferSchedule":
        lists = layout.schedule.lists
        unique_heads = layout.schedule.head_index.reshape(layout.schedule.num_kv_heads, -1)[list(kv_heads)]
        same_lists = (unique_heads == unique_heads[:, :1]).all()
        ranges = lists.ranges[np.unique(unique_heads)]
        max_entries = max(1, int(np.maximum(ranges[..., 1] - ranges[..., 0], 0).sum(-1).max()))
        return cls(unique_heads[:, :1] if same_lists else unique_heads, layout, max_entries)

    def mask_ids(
        self, rows: Int32[Array, "b r"], block_ids: Int32[Array, "b k slots"], slot_of: typing.Callable[[Array], Array]
    ) -> Int32[Array, "b k w r slots"]:
        """The schedule's token mask for the block in each slot.

        Args:
          rows: rows of queries, numbered as blocks of the context are.
          block_ids: the block in every slot, -1 for none.
          slot_of: the slots of blocks [b, k, w, r, n], any number outside of the buffer for blocks that have none.
        """
        lists, slots = self.layout.schedule.lists, block_ids.shape[2]
        row, shift = self._listed(rows)
        # One entry more: a pattern that reads nothing has none.
        blocks, mask_ids = (jnp.asarray(np.append(each, np.int32(NOTHING))) for each in (lists.blocks, lists.mask_ids))
        # [b, k, w, r, ranges, 2]
        ranges = jnp.asarray(lists.ranges)[self.unique_heads[None, :, :, None], row[:, None, None]]
        number = jnp.arange(self.max_entries, dtype=jnp.int32).reshape(1, 1, 1, 1, -1)
        position = jnp.zeros((*ranges.shape[:4], self.max_entries), jnp.int32)
        before = jnp.zeros((*ranges.shape[:4], 1), jnp.int32)
        for index in range(ranges.shape[4]):
            start, stop = ranges[..., index, 0, None], ranges[..., index, 1, None]
            position = jnp.where(number >= before, start + number - before, position)
            before = before + jnp.maximum(stop - start, 0)
        block = blocks[position] + shift[:, None, None, :, None]
        slot = slot_of(block)
        held = jnp.take_along_axis(block_ids[:, :, None, None], jnp.clip(slot, 0, slots - 1), -1) == block
        slot = jnp.where(held & (number < before) & (slot >= 0) & (slot < slots), slot, slots)
        found = jnp.full((*ranges.shape[:4], slots), NOTHING, jnp.int32)
        numbers = (jnp.arange(size, dtype=jnp.int32) for size in found.shape[:4])
        at = jnp.meshgrid(*numbers, indexing="ij", sparse=True)
        return found.at[(*(each[..., None] for each in at), slot)].set(mask_ids[position], mode="drop")

    def _listed(self, rows: Array) -> tuple[Array, Array]:
        """The rows of the schedule that read the same, and the blocks by which the given rows are shifted from them."""
        layout, last = self.layout, self.layout.schedule.lists.num_rows - 1
        if layout.max_length is None:
            shift = jnp.maximum(rows - layout.first_repeated, 0) // layout.period * layout.period
            return rows - shift, shift
        return jnp.minimum(rows, last), jnp.zeros_like(rows)


class Keys(typing.NamedTuple):
    """Keys and values in slots; `z` contexts, each of them shared by b / z sequences.

    Attributes:
      key: [z, k, slots, block, d], of the queries' dtype or int8.
      value: [z, k, slots, block, e].
      key_scale, value_scale: float32 [z, k, slots, block] of int8; else None.
      block_ids: int32 [z, k, slots], the block in every slot, -1 for none.
      mask_ids: int32 [b, k, w, r, slots], see `BufferSchedule.mask_ids`.
      start, stop: int32 [b], the positions of the tokens that exist.
    """

    key: Array
    value: Array
    key_scale: Array | None
    value_scale: Array | None
    block_ids: Int32[Array, "z k slots"]
    mask_ids: Int32[Array, "b k w r slots"]
    start: Int32[Array, " b"]
    stop: Int32[Array, " b"]

    def part(self, start, slots: int) -> "Keys":
        """So many of the slots, those before `start` masked if fewer come after it."""
        first = jnp.minimum(start, self.block_ids.shape[2] - slots)

        def cut(array, axis) -> typing.Any:
            return None if array is None else jax.lax.dynamic_slice_in_dim(array, first, slots, axis)

        is_new = first + jnp.arange(slots, dtype=jnp.int32) >= start
        mask_ids = jnp.where(is_new.reshape(1, 1, 1, 1, -1), cut(self.mask_ids, 4), NOTHING)
        key, value, key_scale, value_scale, block_ids = (cut(array, 2) for array in self[:5])
        return Keys(key, value, key_scale, value_scale, block_ids, mask_ids, self.start, self.stop)


@dataclasses.dataclass(frozen=True)
class Options:
    """The static settings of a call of attention.

    Attributes:
      pairs_at_once: logits computed together.
    """

    scale: float
    soft_cap: float | None
    pairs_at_once: int

    @classmethod
    def of(cls, head_dim: int, scale: float | None, soft_cap: float | None) -> "Options":
        """Builds the options; raises ValueError where the op would."""
        return cls(
            head_dim**-0.5 if scale is None else check_number("scale", scale),
            None if soft_cap is None else check_number("logits_soft_cap", soft_cap, above=0),
            PAIRS_AT_ONCE,
        )


def attend(
    query: Float[Array, "b t k g d"],
    positions: Int32[Array, "b t"],
    keys: Keys,
    masks: Bool[np.ndarray, "masks block block"],
    options: Options,
    all_finite: Bool[Array, ""],
) -> PartialAttention:
    """Attention over all slots: rows [b, t, k, g].

    Args:
      query: [b, t, k, g, d], query heads by their KV head.
      keys: keys and values of the slots.
      masks: the schedule's token masks.
      options: static settings.
      positions: positions of the queries, ascending, each sequence's without a gap.
      all_finite: True if no value is NaN or Inf. Otherwise values that none of the queries reads are zeroed, at more
        cost; a NaN comes where it is read, and may come to the other queries of the call.
    """
    batch, length, kv_heads, group, _ = query.shape
    slots, size = keys.block_ids.shape[2], masks.shape[1]
    each = max(1, options.pairs_at_once // max(1, batch * length * kv_heads * group * size))
    # A single token's logits are few beside the keys that they are of.
    if each >= slots or length == 1:
        return _attend(query, positions, keys, masks, options, all_finite)

    def step(state: PartialAttention, start):
        part = _attend(query, positions, keys.part(start, each), masks, options, all_finite)
        return merge([state, part]), None

    rows = batch, length, kv_heads, group
    # Inside a `shard_map` what a loop begins with must vary over the mesh as its results do.
    query, positions, keys, all_finite = equally_varying((query, positions, keys, all_finite))
    nothing = PartialAttention(
        jnp.zeros((*rows, keys.value.shape[-1]), jnp.float32),
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    nothing, _ = equally_varying((nothing, query))
    return jax.lax.scan(step, nothing, jnp.arange(math.ceil(slots / each), dtype=jnp.int32) * each)[0]


def _attend(query, positions, keys: Keys, masks, options: Options, all_finite) -> PartialAttention:
    contexts, kv_heads = keys.block_ids.shape[:2]
    mask = _token_mask(positions, keys, masks)  # [b, k, w, t, n]
    query = query.reshape(contexts, -1, *query.shape[1:])
    dtype, shape = query.dtype, (*query.shape[:2], *mask.shape[1:])

    def tokens(array):
        return array.reshape(contexts, kv_heads, -1, *array.shape[4:])

    logits = jnp.einsum(
        "zutkgd,zknd->zukgtn", query, tokens(keys.key).astype(dtype), preferred_element_type=jnp.float32
    )
    if keys.key_scale is not None:
        logits = logits * tokens(keys.key_scale)[:, None, :, None, None]
    logits = logits * options.scale
    if options.soft_cap is not None:
        logits = jnp.tanh(logits / options.soft_cap) * options.soft_cap
    mask = mask.reshape(shape)
    logits = jnp.where(mask, logits, -jnp.inf)
    m = logits.max(-1)
    weights = jnp.exp(logits - jnp.where(jnp.isneginf(m), 0, m)[..., None])
    l = weights.sum(-1)
    if keys.value_scale is not None:
        # Of a NaN the scale is one.
        weights = jnp.where(mask, weights * tokens(keys.value_scale)[:, None, :, None, None], 0)

    def product(value):
        return _weighted_sums(weights.astype(dtype), value)

    def zero_unread_keys(value):
        # 0 · NaN is NaN: what no query of the call reads is not multiplied.
        return product(jnp.where(mask.any((1, 3, 4))[..., None], value, 0))

    acc = jax.lax.cond(all_finite, product, zero_unread_keys, tokens(keys.value).astype(dtype))
    by_token = (acc, *(jnp.moveaxis(each, 4, 2) for each in (m, l)))
    return PartialAttention(*(array.reshape(-1, *array.shape[2:]) for array in by_token))


def _weighted_sums(weights: Float[Array, "z u k g t n"], value: Float[Array, "z k n e"]) -> Float[Array, "z u t k g e"]:
    """Sums of values, in float32."""
    contexts, samples, kv_heads, group, length, tokens = weights.shape
    rows = jnp.moveaxis(weights, 2, 1).reshape(contexts, kv_heads, -1, tokens)

    def at_once(rows, value):
        return jnp.einsum("zkmn,zkne->zkme", rows, value, preferred_element_type=jnp.float32)

    def in_runs(rows, value):
        run = min(RUN, tokens & -tokens)
        rows, value = rows.reshape(*rows.shape[:3], -1, run), value.reshape(contexts, kv_heads, -1, run, value.shape[3])
        return jnp.einsum("zkmrn,zkrne->zkrme", rows, value, preferred_element_type=jnp.float32).sum(2)

    if rows.shape[2] > FEW_ROWS:
        out = at_once(rows, value)
    else:
        out = jax.lax.platform_dependent(rows, value, cpu=in_runs, default=at_once)
    return jnp.moveaxis(out.reshape(contexts, kv_heads, samples, group, length, -1), (1, 4), (3, 2))


def _token_mask(positions: Array, keys: Keys, masks: np.ndarray) -> Bool[Array, "b k w t n"]:
    """The tokens of all slots that each query reads."""
    size = masks.shape[1]
    row = positions // size - positions[:, :1] // size
    mask_id = jnp.take_along_axis(keys.mask_ids, row[:, None, None, :, None], 3)  # [b, k, w, t, slots]
    mask = jnp.asarray(masks)[mask_id, (positions % size)[:, None, None, :, None]]  # [b, k, w, t, slots, block]
    within = jnp.arange(size, dtype=jnp.int32).reshape(1, 1, 1, -1)
    token = per_sequence(keys.block_ids, len(positions))[..., None] * size + within
    exists = (token >= keys.start[:, None, None, None]) & (token < keys.stop[:, None, None, None])
    mask = mask & exists[:, :, None, None]
    return mask.reshape(*mask.shape[:4], -1)


def per_sequence(array: Array, batch: int) -> Array:
    """The array [z, ...] of contexts, repeated to [b, ...] for the sequences that share each of them."""
    return array if len(array) == batch else jnp.repeat(array, batch // len(array), 0)
