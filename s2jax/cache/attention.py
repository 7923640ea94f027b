"""Attention over blocks of keys that lie anywhere, each with its number in the context.

What a query reads of them is looked up in the compiled pattern: its row's entries are carried to the slots where their
blocks lie. A slot that holds another block than its row asks for is not read, whatever the slots are thought to hold.
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
from s2jax.cache.layout import CacheLayout

PAIRS_AT_ONCE = 1 << 23
"""Logits computed together: what several tokens read is walked in parts, so that memory is that of keys and queries."""

RUN, FEW_ROWS = 512, 16
"""Where so few rows of weights meet many values, XLA for CPUs multiplies runs of these six times as fast as all."""


class Parts(typing.NamedTuple):
    """Attention over some of the keys, to be merged with that over others.

    Attributes:
      out: float32 [b, t, k, g, e], sums of values weighed with exp(logit - most).
      most: float32 [b, t, k, g], the largest logit; -inf where nothing is read.
      total: float32 [b, t, k, g], sums of the weights.
    """

    out: Float[Array, "b t k g e"]
    most: Float[Array, "b t k g"]
    total: Float[Array, "b t k g"]

    def merge(self, other: "Parts") -> "Parts":
        most = jnp.maximum(self.most, other.most)
        safe = jnp.where(jnp.isneginf(most), 0, most)
        mine, others = jnp.exp(self.most - safe), jnp.exp(other.most - safe)
        return Parts(
            self.out * mine[..., None] + other.out * others[..., None], most, self.total * mine + other.total * others
        )

    def finish(self, sinks: Float[Array, "k g"] | None, dtype) -> tuple[Array, Array]:
        """The result [b, t, k, g, e] and its log-sum-exp [b, t, k, g]."""
        parts = self
        if sinks is not None:
            logit = jnp.broadcast_to(sinks.astype(jnp.float32), self.most.shape)
            parts = self.merge(Parts(jnp.zeros_like(self.out), logit, jnp.ones_like(logit)))
        reads = parts.total != 0  # a NaN that is read is seen
        total = jnp.where(reads, parts.total, 1)
        out = jnp.where(reads[..., None], parts.out / total[..., None], 0)
        return out.astype(dtype), jnp.where(reads, parts.most + jnp.log(total), -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The read pattern of a buffer's KV heads, for lookups under `jit`.

    Attributes:
      unique_heads: int32 [k, w], the distinct heads whose lists their query heads walk: all of a group, or one for all.
      most: entries of the longest row of any of them.
    """

    unique_heads: Int32[np.ndarray | Array, "k w"]
    layout: CacheLayout = dataclasses.field(metadata={"static": True})
    most: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, layout: CacheLayout, kv_heads: tuple[int, ...]) -> "Rows":
        lists = layout.schedule.lists
        unique_heads = layout.schedule.head_index.reshape(layout.schedule.num_kv_heads, -1)[list(kv_heads)]
        same_lists = (unique_heads == unique_heads[:, :1]).all()
        ranges = lists.ranges[np.unique(unique_heads)]
        most = max(1, int(np.maximum(ranges[..., 1] - ranges[..., 0], 0).sum(-1).max()))
        return cls(unique_heads[:, :1] if same_lists else unique_heads, layout, most)

    def kinds(
        self, rows: Int32[Array, "b r"], held: Int32[Array, "b k slots"], place: typing.Callable[[Array], Array]
    ) -> Int32[Array, "b k w r slots"]:
        """The schedule's token mask for the block in each slot.

        Args:
          rows: of queries, numbered as blocks of the context are.
          held: the block in every slot, -1 for none.
          place: of blocks [b, k, w, r, n] the slots that they have, wherever that is none of the cache's.
        """
        lists = self.layout.schedule.lists
        row, shift = self._listed(rows)
        listed, mask_ids = (
            np.append(array, np.int32(NOTHING)) for array in (lists.blocks, lists.mask_ids)
        )  # never empty
        ranges = jnp.asarray(lists.ranges)[
            self.unique_heads[None, :, :, None], row[:, None, None]
        ]  # [b, k, w, r, ranges, 2]
        number = jnp.arange(self.most, dtype=jnp.int32).reshape(1, 1, 1, 1, -1)
        position = jnp.zeros((*ranges.shape[:4], self.most), jnp.int32)
        before = jnp.zeros((*ranges.shape[:4], 1), jnp.int32)
        for part in range(ranges.shape[4]):
            start, stop = ranges[..., part, 0, None], ranges[..., part, 1, None]
            position = jnp.where(number >= before, start + number - before, position)
            before = before + jnp.maximum(stop - start, 0)
        block = jnp.asarray(listed)[position] + shift[:, None, None, :, None]
        slot = place(block)
        there = jnp.take_along_axis(held[:, :, None, None], jnp.clip(slot, 0, held.shape[2] - 1), -1) == block
        slots = held.shape[2]
        slot = jnp.where(there & (number < before) & (slot >= 0) & (slot < slots), slot, slots)
        kinds = jnp.full((*ranges.shape[:4], slots), NOTHING, jnp.int32)
        numbers = (jnp.arange(size, dtype=jnp.int32) for size in kinds.shape[:4])
        at = jnp.meshgrid(*numbers, indexing="ij", sparse=True)
        return kinds.at[(*(each[..., None] for each in at), slot)].set(jnp.asarray(mask_ids)[position], mode="drop")

    def _listed(self, rows: Array) -> tuple[Array, Array]:
        """The rows of the lists that read alike, and how many blocks further on the given ones stand."""
        layout, last = self.layout, self.layout.schedule.lists.num_rows - 1
        if layout.max_length is None:
            beyond = jnp.maximum(rows - layout.first_repeated, 0) // layout.period * layout.period
            return rows - beyond, beyond
        return jnp.minimum(rows, last), jnp.zeros_like(rows)


class Keys(typing.NamedTuple):
    """Keys and values in slots, with what is known of them; `z` contexts, each of them for b / z sequences.

    Attributes:
      key: [z, k, slots, block, d], of the queries' dtype or int8.
      value: [z, k, slots, block, e].
      key_scale, value_scale: float32 [z, k, slots, block] of int8; else None.
      held: int32 [z, k, slots], the block in every slot, -1 for none.
      kinds: int32 [b, k, w, r, slots].
      since, until: int32 [b], positions: tokens before and from there on are not there.
    """

    key: Array
    value: Array
    key_scale: Array | None
    value_scale: Array | None
    held: Int32[Array, "z k slots"]
    kinds: Int32[Array, "b k w r slots"]
    since: Int32[Array, " b"]
    until: Int32[Array, " b"]

    def part(self, start, slots: int) -> "Keys":
        """Some of the slots; those before `start` are hidden where fewer than so many come after it."""
        first = jnp.minimum(start, self.held.shape[2] - slots)

        def cut(array, axis) -> typing.Any:
            return None if array is None else jax.lax.dynamic_slice_in_dim(array, first, slots, axis)

        fresh = first + jnp.arange(slots, dtype=jnp.int32) >= start
        kinds = jnp.where(fresh.reshape(1, 1, 1, 1, -1), cut(self.kinds, 4), NOTHING)
        key, value, key_scale, value_scale, held = (cut(array, 2) for array in self[:5])
        return Keys(key, value, key_scale, value_scale, held, kinds, self.since, self.until)


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings of a call of attention that are no arrays.

    Attributes:
      pairs_at_once: logits computed together.
    """

    scale: float
    soft_cap: float | None
    pairs_at_once: int

    @classmethod
    def of(cls, head_dim: int, scale: float | None, soft_cap: float | None) -> "Options":
        """Raises ValueError where the op would."""
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
    finite: Bool[Array, ""],
) -> Parts:
    """Attention over all slots.

    Args:
      positions: of the queries, ascending, each sequence's without a gap.
      finite: whether no value is NaN or Inf; else those that none of the queries reads are kept from
        all of them at more cost: a NaN comes where it is read, and may come to the queries beside.
    """
    batch, length, kv_heads, group, _ = query.shape
    slots, size = keys.held.shape[2], masks.shape[1]
    each = max(1, options.pairs_at_once // max(1, batch * length * kv_heads * group * size))
    # A single token's logits are few beside the keys that they are of.
    if each >= slots or length == 1:
        return _attend(query, positions, keys, masks, options, finite)

    def step(parts: Parts, start):
        return parts.merge(_attend(query, positions, keys.part(start, each), masks, options, finite)), None

    shape = batch, length, kv_heads, group
    # Inside a `shard_map` what a loop begins with must vary over the mesh as its results do.
    query, positions, keys, finite = equally_varying((query, positions, keys, finite))
    nothing = Parts(
        jnp.zeros((*shape, keys.value.shape[-1]), jnp.float32),
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    nothing, _ = equally_varying((nothing, query))
    return jax.lax.scan(step, nothing, jnp.arange(math.ceil(slots / each), dtype=jnp.int32) * each)[0]


def _attend(query, positions, keys: Keys, masks, options: Options, finite) -> Parts:
    contexts, kv_heads = keys.held.shape[:2]
    seen = _seen(positions, keys, masks)  # [b, k, w, t, n]
    query = query.reshape(contexts, -1, *query.shape[1:])
    dtype, shape = query.dtype, (*query.shape[:2], *seen.shape[1:])

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
    seen = seen.reshape(shape)
    logits = jnp.where(seen, logits, -jnp.inf)
    most = logits.max(-1)
    weights = jnp.exp(logits - jnp.where(jnp.isneginf(most), 0, most)[..., None])
    total = weights.sum(-1)
    if keys.value_scale is not None:
        # Of a NaN the scale is one.
        weights = jnp.where(seen, weights * tokens(keys.value_scale)[:, None, :, None, None], 0)

    def product(value):
        return _weighted(weights.astype(dtype), value)

    def without_unread(value):
        # 0 · NaN is NaN: what no query of the call reads is not multiplied.
        return product(jnp.where(seen.any((1, 3, 4))[..., None], value, 0))

    out = jax.lax.cond(finite, product, without_unread, tokens(keys.value).astype(dtype))
    each = (array.reshape(-1, *array.shape[2:]) for array in (out, *(jnp.moveaxis(a, 4, 2) for a in (most, total))))
    return Parts(*each)


def _weighted(weights: Float[Array, "z u k g t n"], value: Float[Array, "z k n e"]) -> Float[Array, "z u t k g e"]:
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


def _seen(positions: Array, keys: Keys, masks: np.ndarray) -> Bool[Array, "b k w t n"]:
    """The mask of the slots' tokens that each query reads."""
    size = masks.shape[1]
    row = positions // size - positions[:, :1] // size
    kind = jnp.take_along_axis(keys.kinds, row[:, None, None, :, None], 3)  # [b, k, w, t, slots]
    seen = jnp.asarray(masks)[kind, (positions % size)[:, None, None, :, None]]  # [b, k, w, t, slots, block]
    within = jnp.arange(size, dtype=jnp.int32).reshape(1, 1, 1, -1)
    token = for_each(keys.held, len(positions))[..., None] * size + within
    there = (token >= keys.since[:, None, None, None]) & (token < keys.until[:, None, None, None])
    seen = seen & there[:, :, None, None]
    return seen.reshape(*seen.shape[:4], -1)


def for_each(array: Array, batch: int) -> Array:
    """[z, ...] -> [b, ...]: what a context has, for every sequence that shares it."""
    return array if len(array) == batch else jnp.repeat(array, batch // len(array), 0)
