"""KVCache: the keys and values of one layer that later tokens will read, for any causal pattern."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32, Integer

from pallas_kernels.checks import check_flag, check_sinks
from pallas_kernels.head_place import HeadAxis, possible_head_axes
from pallas_kernels.sharding import Axes, Sharding
from pallas_kernels.unknown_arguments import explains_unknown_arguments
from s2jax.cache.attention import Options, per_sequence
from s2jax.cache.buffers import Buffer, Prefix, with_block_ids
from s2jax.cache.checks import check_dtype, check_prompt, check_removed, check_tokens, check_which
from s2jax.cache.layout import CacheLayout, compile_cache
from s2jax.cache.sharding import (
    DeferredTables,
    Role,
    heads_of_shard,
    on_each_shard,
    sharding_of,
    split_to_create,
    vary_by_heads,
)
from s2jax.cache.step import INVALID_LENGTH, Step, Tables, emptied, longer, same_counts
from s2jax.compiler import check_heads_known
from s2jax.functional import ATTENTION_OPTIONS, attention
from s2jax.patterns import PatternLike, as_pattern
from s2jax.patterns.checks import check_counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The keys and values of one layer that later tokens will read, of several sequences of different lengths.

    A pytree of arrays of fixed shapes, passed in and given back: a step that is jitted once serves every length. Make
    one with `KVCache.create`; donate it to the step, so that it is updated in place. Outside of `jit` each method is
    compiled on its own, once for every layout and shapes; the programs of the last few layouts are kept.

    Lengths known only at run time cannot raise; `extend` returns NaN instead for tokens beyond `max_length`, for
    sequences that were rolled back by more than `max_rollback`, and for counts below 0 or above the tokens given.

    Attributes:
      lengths: int32 [b], tokens of every sequence.
      max_lengths: int32 [b], the largest `lengths` so far, from which `max_rollback` counts.
      all_finite: bool [b, k], True if no value was ever NaN or Inf.
      prefix: the blocks that the sequences of a fork share, else None.
      fork_blocks: blocks for the tokens after a fork, else None.
      query_spec: the split of sequences and heads over a mesh.
      head_axis: axes of a caller's `shard_map` that heads are split over; None if the caller did not say.
    """

    buffers: tuple[Buffer, ...]
    lengths: Int32[Array, " b"]
    max_lengths: Int32[Array, " b"]
    all_finite: Bool[Array, "b k"]
    prefix: Prefix | None
    layout: CacheLayout = dataclasses.field(metadata={"static": True})
    fork_blocks: int | None = dataclasses.field(metadata={"static": True})
    query_spec: PartitionSpec | None = dataclasses.field(metadata={"static": True})
    head_axis: Axes | None = dataclasses.field(metadata={"static": True})

    @classmethod
    @explains_unknown_arguments
    def create(
        cls,
        pattern: PatternLike,
        *,
        batch: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        max_length: int | None = None,
        max_rollback: int = 0,
        dtype: typing.Any = jnp.bfloat16,
        query_spec: PartitionSpec | None = None,
        head_axis: HeadAxis = None,
    ) -> "KVCache":
        """Creates an empty cache.

        Args:
          pattern: who reads whom; causal. Also all else that `s2jax.as_pattern` takes.
          batch: count of sequences.
          num_heads: count of all query heads, also if `head_axis` splits them.
          num_kv_heads: count of all KV heads.
          head_dim: features of a key.
          value_dim: features of a value; by default those of a key.
          max_length: tokens of the longest context; None for patterns of bounded reach, which stream without end.
          max_rollback: tokens that `rollback` may take back.
          dtype: the dtype of stored keys and values, bfloat16, float16, float32, or int8 with a scale for every token
            and head.
          query_spec: the sharding of the queries of all calls, P(batch, None, heads, None), over the mesh that is set
            with `jax.set_mesh`. The cache is split likewise, and no device communicates. Each keeps as many blocks as
            the one whose heads need the most. See `s2jax.attention`; over Explicit axes it is needed where heads are
            split.
          head_axis: axes of a caller's `shard_map` that heads are split over, see `s2jax.attention`. Inside, the cache
            holds a shard's heads; outside, under a mesh with this axis, all heads, to be split as P(batch, head_axis).

        Raises:
          ValueError: see `compile_cache`; the dtype is none of these; sequences or KV heads cannot be split so.
        """
        dtype = check_dtype(dtype)
        value_dim = head_dim if value_dim is None else value_dim
        check_counts(
            batch=batch, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, value_dim=value_dim
        )
        pattern = as_pattern(pattern)
        if head_axis is None:
            check_heads_known(pattern, possible_head_axes(), num_heads, num_kv_heads, *[max_length or 1] * 2)
        axes, sharding, shards = split_to_create(query_spec, head_axis, batch, num_kv_heads)
        layout = compile_cache(
            pattern, num_heads=num_heads, num_kv_heads=num_kv_heads, max_length=max_length, max_rollback=max_rollback,
            shards=shards,
        )  # fmt: skip
        tables, zeros = DeferredTables(layout, None, axes), same_counts(batch, 0)
        static = {
            "head_dim": head_dim, "value_dim": value_dim, "dtype": dtype, "query_spec": query_spec, "head_axis": axes,
        }  # fmt: skip
        (empty,) = jax.eval_shape(lambda zeros: cls._empty(tables.make(sharding), zeros, **static), zeros)
        arguments, results = [(Role.HEADS, tables), (Role.CACHE, zeros)], [(Role.CACHE, empty)]
        (cache,) = on_each_shard(cls._empty, layout, sharding, arguments, results, **static)
        buffers, all_finite = vary_by_heads((cache.buffers, cache.all_finite), axes)
        return dataclasses.replace(cache, buffers=buffers, all_finite=all_finite)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, scales included; those of a shared prefix count once."""
        prefix = () if self.prefix is None else self.prefix.buffers
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves((self.buffers, prefix)))

    @functools.partial(explains_unknown_arguments, also=ATTENTION_OPTIONS)
    def prefill(
        self,
        query: Float[Array, "b t h d"],
        key: Float[Array, "b t k d"],
        value: Float[Array, "b t k e"],
        *,
        counts: Integer[Array, " b"] | None = None,
        **options: typing.Any,
    ) -> tuple[typing.Any, "KVCache"]:
        """Begins every sequence anew with a prompt, and attends from it by `s2jax.attention`.

        Args:
          query: [b, t, h, d].
          key: [b, t, k, d], rotated if positions are rotary.
          value: [b, t, k, e].
          counts: tokens of every sequence, between 0 and t. The tokens after them are padding; their outputs are
            undefined.
          **options: options of `s2jax.attention`, except for offsets and segments, as the prompt begins the context
            and is one segment, and for `query_spec`, which is the cache's.

        Returns:
          The result of `s2jax.attention`, and the cache.

        Raises:
          ValueError: the prompt is empty or longer than `max_length`; arrays do not fit the cache.
        """
        counts = self._checked(query, key, value, counts)
        check_prompt(self.layout, query.shape[1], self.prefix is not None, options)
        sharding, place = self._sharding(query), heads_of_shard(self.layout, self.head_axis).axis
        out = attention(query, key, value, self.layout.pattern, query_spec=self.query_spec, head_axis=place, **options)
        arguments = [(Role.CACHE, self), self._tables, (Role.TOKENS, (key, value)), (Role.CACHE, counts)]
        (cache,) = on_each_shard(KVCache._of_prompt, self.layout, sharding, arguments, [(Role.CACHE, self)])
        return out, cache

    @explains_unknown_arguments
    def extend(
        self,
        query: Float[Array, "b t h d"],
        key: Float[Array, "b t k d"],
        value: Float[Array, "b t k e"],
        *,
        counts: Integer[Array, " b"] | None = None,
        scale: float | None = None,
        logits_soft_cap: float | None = None,
        sinks: Float[Array, " h"] | None = None,
        return_lse: bool = False,
    ) -> tuple[typing.Any, "KVCache"]:
        """Appends tokens to every sequence and attends from them: one to decode, a chunk of a prompt, or a draft.

        Args:
          query: [b, t, h, d].
          key: [b, t, k, d], rotated if positions are rotary.
          value: [b, t, k, e].
          counts: tokens of every sequence, between 0 and t; the tokens after them are padding.
          scale: see `s2jax.attention`.
          logits_soft_cap: see `s2jax.attention`.
          sinks: see `s2jax.attention`.
          return_lse: see `s2jax.attention`.

        Returns:
          The result of `s2jax.attention` for these queries over the whole context, and the cache.

        Raises:
          ValueError: there is no token; arrays do not fit the cache.
        """
        counts, sharding = self._checked(query, key, value, counts), self._sharding(query)
        return_lse = check_flag("return_lse", return_lse)
        options, sinks = Options.of(query.shape[3], scale, logits_soft_cap), check_sinks(sinks, query.shape[2])
        arguments = [(Role.CACHE, self), self._tables, (Role.TOKENS, (query, key, value))]
        arguments += [(Role.CACHE, counts), (Role.HEADS, sinks)]
        results = [(Role.CACHE, dataclasses.replace(self, prefix=None)), (Role.TOKENS, query)]
        if return_lse:  # else it is no result: it may be -inf, which JAX's debug_infs refuses
            results.append((Role.LSE, query))
        cache, *found = on_each_shard(
            KVCache._extended, self.layout, sharding, arguments, results, options=options, return_lse=return_lse
        )
        return (tuple(found) if return_lse else found[0]), dataclasses.replace(cache, prefix=self.prefix)

    def rollback(self, tokens: int | Integer[Array, ""] | Integer[Array, " b"]) -> "KVCache":
        """Removes the last tokens of every sequence, as when a draft was refused.

        Raises:
          ValueError: more tokens than `max_rollback`, where that is known; or they are not integers.
        """
        counts = check_removed(tokens, self.layout.max_rollback, len(self.lengths))
        arguments, results = [(Role.CACHE, self), (Role.CACHE, counts)], [(Role.CACHE, self.lengths)]
        (lengths,) = on_each_shard(KVCache._rolled_back, self.layout, self._sharding(), arguments, results)
        return dataclasses.replace(self, lengths=lengths)

    def reset(self, which: Bool[Array, " b"]) -> "KVCache":
        """Empties some of the sequences, for others to take their place.

        Raises:
          ValueError: the sequences share a prefix, or `which` is no bool for each of them.
        """
        which = check_which(which, len(self.lengths))
        if self.prefix is not None:
            raise ValueError("sequences that share a prefix cannot be reset alone: fork the prompt's cache anew")
        block_ids, lengths, max_lengths = emptied(which, self._block_ids, self.lengths, self.max_lengths)
        buffers = with_block_ids(self.buffers, block_ids)
        return dataclasses.replace(self, buffers=buffers, lengths=lengths, max_lengths=max_lengths)

    def fork(self, samples: int, max_new_tokens: int) -> "KVCache":
        """Returns a cache for several continuations of every sequence, one after the other: [b] -> [b · samples].

        Whole blocks of the prompt are not copied, and are read once for all samples; a block that is still being filled
        is copied. Donating the fork donates the prompt's cache with it.

        Args:
          samples: continuations of each sequence.
          max_new_tokens: the most tokens of a continuation; it has slots for all of them, unless the layout needs
            fewer.

        Raises:
          ValueError: the cache is a fork itself, or a number is below 1.
        """
        check_counts(samples=samples, max_new_tokens=max_new_tokens)
        if self.prefix is not None:
            raise ValueError("a fork cannot be forked again: fork the prompt's cache into all samples at once")
        size = self.layout.block_size
        fork_blocks = -(-(size - 1 + max_new_tokens) // size)
        like = dataclasses.replace(self, fork_blocks=fork_blocks), self._block_ids, self.lengths
        arguments = [(Role.CACHE, self), like[0]._tables]
        fork, block_ids, first = on_each_shard(
            KVCache._forked, self.layout, self._sharding(), arguments, [(Role.CACHE, each) for each in like],
            samples=samples, fork_blocks=fork_blocks,
        )  # fmt: skip
        return dataclasses.replace(fork, prefix=Prefix(with_block_ids(self.buffers, block_ids), first))

    @property
    def arrangement(self) -> tuple:
        """A key that is equal for caches whose lengths and blocks mean the same."""
        groups = (self.buffers, () if self.prefix is None else self.prefix.buffers)
        shapes = tuple(tuple(buffer.block_ids.shape for buffer in buffers) for buffers in groups)
        return self.layout, self.fork_blocks, self.query_spec, self.head_axis, self.prefix is None, shapes

    def share_lengths_with(self, other: "KVCache") -> "KVCache":
        """Returns the cache with the lengths and blocks of another one that holds the same tokens.

        XLA then computes what depends on these alone once for both, as for the layers of a model.

        Raises:
          ValueError: the caches differ in layout, sequences, mesh, or in how they were forked.
        """
        if not isinstance(other, KVCache):
            raise ValueError(f"a cache can share lengths with another KVCache alone, got {type(other).__name__}")
        if self.arrangement != other.arrangement:
            raise ValueError("a cache can share lengths with one of its own arrangement alone, this one is of another")
        prefix = self.prefix
        if prefix is not None and other.prefix is not None:
            block_ids = tuple(each.block_ids for each in other.prefix.buffers)
            prefix = Prefix(with_block_ids(prefix.buffers, block_ids), other.prefix.first)
        buffers = with_block_ids(self.buffers, other._block_ids)
        lengths, max_lengths = other.lengths, other.max_lengths
        return dataclasses.replace(self, buffers=buffers, lengths=lengths, max_lengths=max_lengths, prefix=prefix)

    @property
    def _tables(self) -> tuple[Role, DeferredTables]:
        return Role.HEADS, DeferredTables(self.layout, self.fork_blocks, self.head_axis)

    @property
    def _block_ids(self) -> tuple[Array, ...]:
        return tuple(each.block_ids for each in self.buffers)

    def _sharding(self, query: Array | None = None) -> Sharding | None:
        """The sharding over a mesh, taken from the queries if given, else from the cache's arrays."""
        example = self.buffers[0].block_ids[:, None] if query is None else query
        return sharding_of(self.layout, example, self.query_spec, self.head_axis)

    def _checked(self, query: Array, key: Array, value: Array, counts) -> Int32[Array, " b"] | None:
        """The counts; raises ValueError if tokens do not fit the cache, or a caller may have split their heads."""
        heads = heads_of_shard(self.layout, self.head_axis)
        counts = check_tokens(heads, self.buffers[0], len(self.lengths), query, key, value, counts)
        if self.head_axis is None:
            length = [self.layout.max_length or 1] * 2
            check_heads_known(self.layout.pattern, possible_head_axes(query), heads.query, heads.kv, *length)
        return counts

    # These run on each shard: arrays, tokens and tables are the shard's. What does not change is no result, as a
    # compiled function would copy it.

    @classmethod
    def _empty(
        cls, tables: Tables, zeros: Array, *, head_dim: int, value_dim: int, dtype, query_spec, head_axis
    ) -> "tuple[KVCache]":
        buffers = tuple(each.empty(len(zeros), head_dim, value_dim, dtype) for each in tables.layouts)
        all_finite = jnp.ones((len(zeros), len(tables.order)), bool)
        layout = tables.layouts[0].layout
        # An array each: one that stands twice in a pytree cannot be donated.
        return (cls(buffers, zeros, jnp.array(zeros), all_finite, None, layout, None, query_spec, head_axis),)

    def _of_prompt(self, tables: Tables, tokens: tuple[Array, Array], counts: Array | None) -> "tuple[KVCache]":
        key, value = tokens
        lengths = longer(jnp.zeros_like(self.lengths), key.shape[1], counts)
        buffers = tuple(
            layout.of_prompt(layout.take(key), layout.take(value), lengths, buffer.key.dtype)
            for layout, buffer in zip(tables.layouts, self.buffers, strict=True)
        )
        all_finite, max_lengths = self.buffers[0].is_finite(value), jnp.array(lengths)
        fresh = {"buffers": buffers, "lengths": lengths, "max_lengths": max_lengths, "all_finite": all_finite}
        return (dataclasses.replace(self, **fresh),)

    def _extended(
        self, tables: Tables, tokens: tuple[Array, Array, Array], counts: Array | None, sinks: Array | None, *,
        options: Options, return_lse: bool,
    ) -> "tuple[KVCache, Array] | tuple[KVCache, Array, Array]":  # fmt: skip
        query, key, value = tokens
        batch, length, num_heads, head_dim = query.shape
        kv_heads, lengths = key.shape[2], longer(self.lengths, length, counts)
        positions = self.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
        all_finite, limit = self.all_finite & self.buffers[0].is_finite(value), tables.limit(self._lowest())
        step = Step(self.layout, positions, self.lengths, lengths, limit, self._first, all_finite.all(), options)
        grouped = query.reshape(batch, length, kv_heads, num_heads // kv_heads, head_dim)
        parts, buffers = [], []
        prefixes = [None] * len(self.buffers) if self.prefix is None else self.prefix.buffers
        tables_of = zip(tables.layouts, tables.schedules, self.buffers, prefixes, strict=True)
        for layout, schedule, old, prefix in tables_of:
            part, buffer = step.extend(layout, schedule, old, prefix, *map(layout.take, (grouped, key, value)))
            parts.append(part)
            buffers.append(buffer)
        state = tables.join(parts)
        if sinks is not None:
            state = state.with_sinks(sinks.reshape(kv_heads, -1))
        out, lse = state.finish(query.dtype)
        # Padding beyond the limit is none of the caller's faults.
        beyond = ((positions >= limit[:, None]) & (positions < lengths[:, None])) | (lengths >= INVALID_LENGTH)[:, None]
        out = jnp.where(beyond[..., None, None, None], jnp.nan, out).reshape(batch, length, num_heads, -1)
        lse = jnp.where(beyond[..., None, None], jnp.nan, lse).reshape(batch, length, num_heads).swapaxes(1, 2)
        max_lengths = jnp.maximum(self.max_lengths, lengths)
        cache = dataclasses.replace(
            self, buffers=tuple(buffers), lengths=lengths, max_lengths=max_lengths, all_finite=all_finite, prefix=None
        )
        return (cache, out, lse) if return_lse else (cache, out)

    def _rolled_back(self, tokens: Array) -> tuple[Array]:
        lengths = self.lengths - tokens
        lowest = jnp.maximum(self.max_lengths - self.layout.max_rollback, self._lowest())
        possible = (lengths >= lowest) & (lengths <= self.lengths) & (self.lengths < INVALID_LENGTH)
        return (jnp.where(possible, lengths, INVALID_LENGTH),)

    def _forked(self, tables: Tables, *, samples: int, fork_blocks: int) -> "tuple[KVCache, tuple[Array, ...], Array]":
        first = self.lengths // self.layout.block_size
        batch = len(first) * samples
        pairs = zip(tables.layouts, self.buffers, strict=True)
        buffers = tuple(layout.of_fork(buffer, first, batch) for layout, buffer in pairs)
        shared = tuple(jnp.where(each >= first[:, None, None], -1, each) for each in self._block_ids)
        lengths, all_finite = per_sequence(self.lengths, batch), per_sequence(self.all_finite, batch)
        fork = dataclasses.replace(
            self, buffers=buffers, lengths=lengths, max_lengths=jnp.array(lengths), all_finite=all_finite,
            fork_blocks=fork_blocks,
        )  # fmt: skip
        return fork, shared, first

    @property
    def _first(self) -> Array | None:
        """The first block that sequences have for themselves, after a fork."""
        return None if self.prefix is None else per_sequence(self.prefix.first, len(self.lengths))

    def _lowest(self) -> Array:
        """The lowest length to roll back to."""
        return jnp.zeros_like(self.lengths) if self._first is None else self._first * self.layout.block_size
