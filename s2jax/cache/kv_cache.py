"""A KV cache that holds what will be read again, and nothing else, for any causal pattern."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.checks import check_flag, check_sinks
from pallas_kernels.head_place import HeadAxis, possible_head_axes
from pallas_kernels.sharding import Axes, Sharding
from pallas_kernels.unknown_arguments import explains_unknown_arguments
from s2jax.cache import step as cache_step
from s2jax.cache.attention import Options, for_each
from s2jax.cache.buffers import Buffer, Space, with_blocks
from s2jax.cache.layout import CacheLayout, compile_cache
from s2jax.cache.sharding import OwnTables, heads_of_shard, over_shards, sharding_of, split_to_create, vary_by_heads
from s2jax.cache.step import NEVER, Step, Tables
from s2jax.compiler import refuse_unsaid_heads
from s2jax.functional import ATTENTION_OPTIONS, attention
from s2jax.patterns import PatternLike, as_pattern
from s2jax.patterns.checks import check_counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """The whole blocks of contexts that several sequences share; read once for all of them.

    Attributes:
      first: int32 [z], the first block that the sequences have for themselves.
    """

    buffers: tuple[Buffer, ...]
    first: Int32[Array, " z"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The keys and values of one layer that later tokens will read, of several sequences at lengths of their own.

    A pytree of arrays of fixed shapes, passed in and given back: a step that is jitted once serves every length. Make
    one with `KVCache.create`; donate it to the step, so that it is updated in place. Outside of `jit` each call is
    compiled on its own, once for every layout and shapes, and JAX keeps these programs, a few megabytes a pattern.

    Where a length is only known at run time, what cannot be is told by NaN in the results of `extend`: tokens beyond
    `max_length`, more taken back than `max_rollback`, counts below 0 or above the tokens that there are.

    Attributes:
      lengths: int32 [b], tokens of every sequence.
      furthest: int32 [b], the most there have been: what was dropped then is gone.
      finite: bool [b, k], whether there was never a NaN or Inf among the values.
      prefix: what `fork` shares, else None.
      room: blocks for the tokens after a fork, else None.
      query_spec: how sequences and heads are split over a mesh.
      head_axis: axes of a caller's `shard_map` that heads are split over; None if nobody said which heads these are.
    """

    buffers: tuple[Buffer, ...]
    lengths: Int32[Array, " b"]
    furthest: Int32[Array, " b"]
    finite: Bool[Array, "b k"]
    prefix: Prefix | None
    layout: CacheLayout = dataclasses.field(metadata={"static": True})
    room: int | None = dataclasses.field(metadata={"static": True})
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
        """An empty cache.

        Args:
          num_heads, num_kv_heads: counts of all heads, also where `head_axis` splits them.
          value_dim: features of a value; by default those of a key.
          max_length: tokens of the longest context; None for patterns of bounded reach, which stream without end.
          max_rollback: tokens that `rollback` may take back.
          dtype: bfloat16, float16 or float32, that of keys and values; or int8, with a scale for every token and head.
          query_spec: how the queries of all calls are sharded over the mesh that is set with `jax.set_mesh`, as
            P(batch, None, heads, None): so is the cache, and no device tells another anything. Each keeps as many
            blocks as the one whose heads need the most. See `s2jax.attention`; over Explicit axes it is needed where
            heads are split.
          head_axis: axes of a caller's `shard_map` that heads are split over, see `s2jax.attention`. Inside, the cache
            holds a shard's heads; outside, under a mesh with this axis, all heads, to be split as P(batch, head_axis).

        Raises:
          ValueError: see `compile_cache`; the dtype is none of these; sequences or KV heads cannot be split so.
        """
        dtype = cache_step.check_dtype(dtype)
        value_dim = head_dim if value_dim is None else value_dim
        check_counts(
            batch=batch, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, value_dim=value_dim
        )
        pattern = as_pattern(pattern)
        if head_axis is None:
            refuse_unsaid_heads(pattern, possible_head_axes(), num_heads, num_kv_heads, *[max_length or 1] * 2)
        axes, sharding, shards = split_to_create(query_spec, head_axis, batch, num_kv_heads)
        layout = compile_cache(
            pattern, num_heads=num_heads, num_kv_heads=num_kv_heads, max_length=max_length, max_rollback=max_rollback,
            shards=shards,
        )  # fmt: skip
        tables, zeros = OwnTables(layout, None, axes), cache_step.equal_counts(batch, 0)
        empty = functools.partial(
            cls._empty, layout=layout, head_dim=head_dim, value_dim=value_dim, dtype=dtype, query_spec=query_spec,
            head_axis=axes,
        )  # fmt: skip
        like = jax.eval_shape(lambda zeros: empty(tables.make(sharding), zeros), zeros)
        cache = over_shards(cls._empty, sharding, "kc", "c", tables, zeros, like=like, **empty.keywords)[0]
        buffers, finite = vary_by_heads((cache.buffers, cache.finite), axes)
        return dataclasses.replace(cache, buffers=buffers, finite=finite)

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
        counts: Int32[Array, " b"] | None = None,
        **options: typing.Any,
    ) -> tuple[typing.Any, "KVCache"]:
        """Begins every sequence anew with a prompt; attends by the op, in time and memory of what the pattern reads.

        Args:
          counts: tokens of every sequence, between 0 and t; those after them are padding, whose outputs mean nothing.
          options: of `s2jax.attention`, but for offsets and segments, as the prompt begins the context and is one, and
            for `query_spec`, which is the cache's.

        Returns:
          What `s2jax.attention` gives, and the cache.

        Raises:
          ValueError: the prompt is empty or longer than `max_length`; arrays do not fit the cache.
        """
        counts = self._checked(query, key, value, counts)
        cache_step.check_prompt(self.layout, query.shape[1], self.prefix is not None, options)
        sharding, place = self._sharding(query), heads_of_shard(self.layout, self.head_axis).axis
        out = attention(
            query, key, value, self.layout.pattern, query_spec=self.query_spec, head_axis=place, **options
        )  # fmt: skip
        tables = OwnTables(self.layout, None, self.head_axis)
        arguments = self, tables, key, value, counts
        return out, over_shards(KVCache._begun, sharding, "ckqqc", "c", *arguments, like=(self,))[0]

    @explains_unknown_arguments
    def extend(
        self,
        query: Float[Array, "b t h d"],
        key: Float[Array, "b t k d"],
        value: Float[Array, "b t k e"],
        *,
        counts: Int32[Array, " b"] | None = None,
        scale: float | None = None,
        logits_soft_cap: float | None = None,
        sinks: Float[Array, " h"] | None = None,
        return_lse: bool = False,
    ) -> tuple[typing.Any, "KVCache"]:
        """Appends tokens to every sequence and attends from them: one to decode, a chunk of a prompt, or a draft.

        Args:
          key: rotated already, where positions are rotary.
          counts: of the tokens, how many are each sequence's, between 0 and t; the others are padding.
          scale, logits_soft_cap, sinks, return_lse: see `s2jax.attention`.

        Returns:
          What `s2jax.attention` gives for these queries over the whole context, and the cache.

        Raises:
          ValueError: there is no token; arrays do not fit the cache.
        """
        counts, sharding = self._checked(query, key, value, counts), self._sharding(query)
        return_lse = check_flag("return_lse", return_lse)
        options, sinks = Options.of(query.shape[3], scale, logits_soft_cap), check_sinks(sinks, query.shape[2])
        tables = OwnTables(self.layout, self.room, self.head_axis)
        # An lse that nobody asked for is no result: it may be -inf, which JAX's debug_infs refuses.
        own = dataclasses.replace(self, prefix=None)
        gives, like = ("cql", (own, query, query)) if return_lse else ("cq", (own, query))
        cache, *found = over_shards(
            KVCache._extended, sharding, "ckqqqck", gives, self, tables, query, key, value, counts, sinks,
            like=like, options=options, return_lse=return_lse,
        )  # fmt: skip
        return (tuple(found) if return_lse else found[0]), dataclasses.replace(cache, prefix=self.prefix)

    def rollback(self, tokens: int | Int32[Array, "#b"]) -> "KVCache":
        """Without the last tokens of every sequence, as when a draft was refused.

        Raises:
          ValueError: more tokens than `max_rollback`, where that is known; or they are not integers.
        """
        counts = cache_step.check_removed(tokens, self.layout.max_rollback, len(self.lengths))
        arguments = KVCache._shortened, self._sharding(), "cc", "c", self, counts
        return dataclasses.replace(self, lengths=over_shards(*arguments, like=(self.lengths,))[0])

    def reset(self, which: Bool[Array, " b"]) -> "KVCache":
        """Empties some of the sequences, for others to take their place.

        Raises:
          ValueError: the sequences share a prefix, or `which` does not say of every sequence whether.
        """
        which = cache_step.check_which(which, len(self.lengths))
        if self.prefix is not None:
            raise ValueError("sequences that share a prefix cannot be reset alone: fork the prompt's cache anew")
        held = tuple(each.held for each in self.buffers)
        held, lengths, furthest = cache_step.emptied(which, held, self.lengths, self.furthest)
        return dataclasses.replace(self, buffers=with_blocks(self.buffers, held), lengths=lengths, furthest=furthest)

    def fork(self, samples: int, max_new_tokens: int) -> "KVCache":
        """Several continuations of every sequence, one after the other: [b] -> [b · samples].

        What the cache holds is not copied, and is read once for all samples; but a block that is still being filled is.
        So whoever donates the fork donates the prompt's cache with it.

        Args:
          max_new_tokens: that every sample may have; their room is for all of these, where that is less than the
            layout's slots.

        Raises:
          ValueError: the cache is a fork itself, or a number is below 1.
        """
        check_counts(samples=samples, max_new_tokens=max_new_tokens)
        if self.prefix is not None:
            raise ValueError("a fork cannot be forked again: fork the prompt's cache into all samples at once")
        size = self.layout.block_size
        room = -(-(size - 1 + max_new_tokens) // size)
        sharding = self._sharding()
        tables = OwnTables(self.layout, room, self.head_axis)
        like = dataclasses.replace(self, room=room), tuple(each.held for each in self.buffers), self.lengths
        arguments = KVCache._forked, sharding, "ck", "ccc", self, tables
        fork, held, first = over_shards(*arguments, like=like, samples=samples, room=room)
        return dataclasses.replace(fork, prefix=Prefix(with_blocks(self.buffers, held), first))

    @property
    def arrangement(self) -> tuple:
        """A key that is equal for caches whose lengths and blocks mean the same."""
        groups = (self.buffers, () if self.prefix is None else self.prefix.buffers)
        shapes = tuple(tuple(buffer.held.shape for buffer in buffers) for buffers in groups)
        return self.layout, self.room, self.query_spec, self.head_axis, self.prefix is None, shapes

    def beside(self, other: "KVCache") -> "KVCache":
        """The cache, with the lengths and blocks of another one that holds the same tokens.

        What XLA computes of these alone it then computes once for both, as for the layers of a model.

        Raises:
          ValueError: the caches differ in layout, sequences, mesh, or in how they were forked.
        """
        if not isinstance(other, KVCache):
            raise ValueError(f"a cache can stand beside another KVCache alone, got {type(other).__name__}")
        if self.arrangement != other.arrangement:
            raise ValueError("a cache can stand beside one of its own arrangement alone, this one is of another")

        def beside(buffers: tuple[Buffer, ...], others: tuple[Buffer, ...]) -> tuple[Buffer, ...]:
            return with_blocks(buffers, tuple(other.held for other in others))

        buffers, prefix = beside(self.buffers, other.buffers), self.prefix
        if prefix is not None and other.prefix is not None:
            prefix = Prefix(beside(prefix.buffers, other.prefix.buffers), other.prefix.first)
        lengths, furthest = other.lengths, other.furthest
        return dataclasses.replace(self, buffers=buffers, lengths=lengths, furthest=furthest, prefix=prefix)

    @property
    def spaces(self) -> tuple[Space, ...]:
        """The assignment of blocks to slots, for each buffer."""
        return Tables.of(self.layout, self.room, 1).spaces

    def _sharding(self, query: Array | None = None) -> Sharding | None:
        """The sharding over a mesh, taken from the queries if given, else from the cache's arrays."""
        example = self.buffers[0].held[:, None] if query is None else query
        return sharding_of(self.layout, example, self.query_spec, self.head_axis)

    def _checked(self, query: Array, key: Array, value: Array, counts) -> Int32[Array, " b"] | None:
        """The counts; raises ValueError where tokens do not fit the cache, or may be of heads that nobody named."""
        heads = heads_of_shard(self.layout, self.head_axis)
        counts = cache_step.check_tokens(heads, self.buffers[0], len(self.lengths), query, key, value, counts)
        if self.head_axis is None:
            length = [self.layout.max_length or 1] * 2
            refuse_unsaid_heads(self.layout.pattern, possible_head_axes(query), heads.query, heads.kv, *length)
        return counts

    # What follows runs on every shard by itself: the cache's arrays, the tokens and the tables are the shard's. What
    # stays as it is is no result: a compiled function copies it.

    @classmethod
    def _empty(
        cls, tables: Tables, zeros: Array, *, layout, head_dim: int, value_dim: int, dtype, query_spec, head_axis
    ) -> "tuple[KVCache]":
        buffers = tuple(space.empty(len(zeros), head_dim, value_dim, dtype) for space in tables.spaces)
        finite = jnp.ones((len(zeros), len(tables.order)), bool)
        # An array each: one that stands twice in a pytree cannot be donated.
        return (cls(buffers, zeros, jnp.array(zeros), finite, None, layout, None, query_spec, head_axis),)

    def _begun(self, tables: Tables, key: Array, value: Array, counts: Array | None) -> "tuple[KVCache]":
        lengths = cache_step.lengthened(jnp.zeros_like(self.lengths), key.shape[1], counts)
        buffers = tuple(
            space.survivors(space.take(key), space.take(value), lengths, buffer.key.dtype)
            for space, buffer in zip(tables.spaces, self.buffers, strict=True)
        )
        finite, furthest = self._finite(value), jnp.array(lengths)
        return (dataclasses.replace(self, buffers=buffers, lengths=lengths, furthest=furthest, finite=finite),)

    def _extended(
        self, tables: Tables, query: Array, key: Array, value: Array, counts: Array | None, sinks: Array | None, *,
        options: Options, return_lse: bool,
    ) -> "tuple[KVCache, Array] | tuple[KVCache, Array, Array]":  # fmt: skip
        batch, length, num_heads, head_dim = query.shape
        kv_heads = key.shape[2]
        lengths = cache_step.lengthened(self.lengths, length, counts)
        positions = self.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
        finite, limit = self.finite & self._finite(value), self._limit(tables.spaces)
        step = Step(self.layout, positions, self.lengths, lengths, limit, self._first, finite.all(), options)
        grouped = query.reshape(batch, length, kv_heads, num_heads // kv_heads, head_dim)
        parts, buffers = [], []
        for index, (space, rows) in enumerate(zip(tables.spaces, tables.rows, strict=True)):
            mine = space.take(grouped), space.take(key), space.take(value)
            prefix = None if self.prefix is None else self.prefix.buffers[index]
            found, buffer = step.extend(space, rows, self.buffers[index], prefix, *mine)
            parts.append(found)
            buffers.append(buffer)
        sinks = None if sinks is None else sinks.reshape(kv_heads, -1)
        out, lse = tables.join(parts).finish(sinks, query.dtype)
        # Padding beyond the limit is none of the caller's faults.
        beyond = ((positions >= limit[:, None]) & (positions < lengths[:, None])) | (lengths >= NEVER)[:, None]
        out = jnp.where(beyond[..., None, None, None], jnp.nan, out).reshape(batch, length, num_heads, -1)
        lse = jnp.where(beyond[..., None, None], jnp.nan, lse).reshape(batch, length, num_heads).swapaxes(1, 2)
        cache = dataclasses.replace(
            self, buffers=tuple(buffers), lengths=lengths, furthest=jnp.maximum(self.furthest, lengths), finite=finite,
            prefix=None,
        )  # fmt: skip
        return (cache, out, lse) if return_lse else (cache, out)

    def _shortened(self, tokens: Array) -> tuple[Array]:
        lengths, most = self.lengths - tokens, self.layout.max_rollback
        possible = (lengths >= jnp.maximum(self.furthest - most, self._begins())) & (lengths <= self.lengths)
        possible &= self.lengths < NEVER
        return (jnp.where(possible, lengths, NEVER),)

    def _forked(self, tables: Tables, *, samples: int, room: int) -> "tuple[KVCache, tuple[Array, ...], Array]":
        first = self.lengths // self.layout.block_size
        batch = len(first) * samples
        pairs = zip(tables.spaces, self.buffers, strict=True)
        buffers = tuple(space.begun(buffer, first, batch) for space, buffer in pairs)
        held = tuple(jnp.where(each.held >= first[:, None, None], -1, each.held) for each in self.buffers)
        lengths, finite = for_each(self.lengths, batch), for_each(self.finite, batch)
        fork = dataclasses.replace(
            self, buffers=buffers, lengths=lengths, furthest=jnp.array(lengths), finite=finite, room=room
        )
        return fork, held, first

    @property
    def _first(self) -> Array | None:
        """The first block that sequences have for themselves, after a fork."""
        return None if self.prefix is None else for_each(self.prefix.first, len(self.lengths))

    def _begins(self) -> Array:
        """The least length to go back to."""
        return jnp.zeros_like(self.lengths) if self._first is None else self._first * self.layout.block_size

    def _limit(self, spaces: tuple[Space, ...]) -> Array:
        """The first position of every sequence that there is no place for."""
        most = NEVER if self.layout.max_length is None else self.layout.max_length
        if self.room is None or all(space.room is None for space in spaces):
            return jnp.full(len(self.lengths), most, jnp.int32)
        return jnp.minimum(most, self._begins() + self.room * self.layout.block_size)

    def _finite(self, value: Array) -> Bool[Array, "b k"]:
        """True where no value is NaN or Inf, as it comes or as it is stored."""
        stored = self.buffers[0].value.dtype
        return jnp.isfinite(value.astype(stored) if jnp.issubdtype(stored, jnp.floating) else value).all((1, 3))
