"""Steps of a KV cache, on one device or on a shard of a mesh: appends tokens and attends to them."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.checks import as_dtype, clipped, kind_of
from s2jax.cache.attention import Keys, Options, Parts, Rows, attend, for_each
from s2jax.cache.buffers import Buffer, Space, in_blocks, like
from s2jax.cache.layout import CacheLayout
from s2jax.messages import shown
from s2jax.patterns.checks import is_integer

NEVER = 2**30
"""A length beyond every context: that of a sequence which was asked for what cannot be."""


class ShardHeads(typing.NamedTuple):
    """Counts of the heads that a cache has here, and the `head_axis` that says so to `s2jax.attention`."""

    query: int
    kv: int
    axis: tuple[str, ...] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tables:
    """Arrays with a row for each KV head, which a mesh splits as it does the heads.

    Attributes:
      spaces, rows: of every buffer.
      order: int32 [k], where every KV head stands among those of all buffers, one buffer after the other; on a mesh,
        among those of its shard.
    """

    spaces: tuple[Space, ...]
    rows: tuple[Rows, ...]
    order: Int32[np.ndarray | Array, " k"]

    @classmethod
    def of(cls, layout: CacheLayout, room: int | None, shards: int) -> "Tables":
        """Builds the tables of a cache with `room` blocks after a fork, split over `shards` of the layout's shards."""
        spaces = tuple(Space.of(layout, heads, room, shards) for heads in layout.buffers)
        stand = [space.heads.reshape(shards, -1) for space in spaces]
        order = np.argsort(np.concatenate(stand, 1), 1).astype(np.int32).reshape(-1)
        return cls(spaces, tuple(Rows.of(layout, heads) for heads in layout.buffers), order)

    def join(self, parts: list[Parts]) -> Parts:
        """Joins the results of the buffers into those of all KV heads, in their order."""
        if len(parts) == 1:
            return parts[0]
        return jax.tree.map(lambda *each: jnp.concatenate(each, 2)[:, :, self.order], *parts)


@dataclasses.dataclass(frozen=True)
class Step:
    """Tokens that come to every sequence.

    Attributes:
      positions: int32 [b, t], of the tokens.
      before, after: int32 [b], lengths of the sequences.
      limit: int32 [b], the first position that there is no place for.
      first: int32 [b], the first own block after a fork.
      finite: whether no value that may be met is NaN or Inf.
    """

    layout: CacheLayout
    positions: Int32[Array, "b t"]
    before: Int32[Array, " b"]
    after: Int32[Array, " b"]
    limit: Int32[Array, " b"]
    first: Int32[Array, " b"] | None
    finite: Bool[Array, ""]
    options: Options

    def extend(
        self,
        space: Space,
        walked: Rows,
        before: Buffer,
        prefix: Buffer | None,
        query: Float[Array, "b t k g d"],
        key: Float[Array, "b t k d"],
        value: Float[Array, "b t k e"],
    ) -> tuple[Parts, Buffer]:
        """Attends over one buffer, for the tokens of its own KV heads."""
        batch, length = self.positions.shape
        size, masks = self.layout.block_size, self.layout.schedule.token_masks
        count = (length + size - 2) // size + 1
        rows = self.positions[:, :1] // size + jnp.arange(count, dtype=jnp.int32)[None]
        start, end = jnp.zeros_like(self.before), jnp.minimum(self.after, self.limit)

        def over(buffer: Buffer, place, since, until) -> Parts:
            kinds = walked.kinds(rows, for_each(buffer.held, batch), place)
            keys = Keys(
                buffer.key, buffer.value, buffer.key_scale, buffer.value_scale, buffer.held, kinds, since, until
            )
            return attend(query, self.positions, keys, masks, self.options, self.finite)

        def place(block):
            return space.place(block, self.first)

        after = space.append(before, key, value, self.positions, end, self.first)
        if length - 1 <= self.layout.max_rollback:
            # Nothing was written over that one of these tokens reads.
            parts = over(after, place, start, self.after)
        else:
            own = in_blocks(key, value, self.positions[:, 0], size, count)
            parts = over(before, place, start, self.before)
            parts = parts.merge(over(own, lambda block: block - like(rows[:, 0], block), self.before, self.after))
        if prefix is not None:
            as_laid_out = space.as_laid_out()
            shared = over(prefix, lambda block: as_laid_out.place(block, None), start, self.after)
            parts = parts.merge(shared)
        return parts, after


def check_tokens(
    heads: ShardHeads, buffer: Buffer, batch: int, query: Array, key: Array, value: Array, counts
) -> Int32[Array, " b"] | None:
    """The counts as int32; raises ValueError where tokens do not fit a cache for so many sequences."""
    head_dim, value_dim = buffer.key.shape[-1], buffer.value.shape[-1]
    length = query.shape[1] if getattr(query, "ndim", None) == 4 else 0
    for name, array, count, features in (
        ("query", query, heads.query, head_dim),
        ("key", key, heads.kv, head_dim),
        ("value", value, heads.kv, value_dim),
    ):
        dtype, shape, came = kind_of(array)
        if dtype is None or shape != (batch, length, count, features) or not length:
            raise ValueError(
                f"{name} must have shape [{batch}, tokens, {count}, {features}] in this cache, with one number of "
                f"tokens for all three and at least one, got {list(shape) or came}"
            )
        if array.dtype != query.dtype or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"query, key and value must be of one floating dtype, got {query.dtype}, {array.dtype}")
        if array.dtype == jnp.float64:
            raise ValueError("a cache computes in float32, got float64: cast query, key and value")
    return None if counts is None else check_counts_of_tokens("counts", counts, batch, ((batch,),))


def check_removed(tokens, most: int, batch: int) -> Int32[Array, " b"]:
    """The tokens to take back of every sequence; raises ValueError if they are no integers, or one beyond `most`."""
    if is_integer(tokens):
        if not 0 <= tokens <= most:
            raise ValueError(
                f"from 0 to max_rollback={most} tokens can be taken back, got {shown(tokens)}; see KVCache.create"
            )
        return equal_counts(batch, int(tokens))
    return check_counts_of_tokens("tokens", tokens, batch, ((), (1,), (batch,)))


def check_counts_of_tokens(name: str, given, batch: int, shapes: tuple[tuple[int, ...], ...]) -> Int32[Array, " b"]:
    """A number of tokens for every sequence; raises ValueError unless they are integers of one of the shapes."""
    array = as_array(given)
    dtype, shape, _ = kind_of(array)
    if dtype is None or shape not in shapes or not jnp.issubdtype(dtype, jnp.integer):
        integers = "integers" if () not in shapes else "an integer or integers"
        raise ValueError(
            f"{name} must be {integers} of shape [{batch}], one for each sequence, got {kind_of(given)[2]}"
        )
    if isinstance(array, np.ndarray):
        array = jnp.asarray(np.clip(array, -1, NEVER))  # what JAX would cut off is no count all the same
    return array if array.dtype == jnp.int32 and array.shape == (batch,) else clipped(array, batch)


def check_which(which, batch: int) -> Bool[Array, " b"]:
    """The sequences that are named by True; raises ValueError unless it is a bool for each of them."""
    array = as_array(which)
    dtype, shape, _ = kind_of(array)
    if dtype is None or shape != (batch,) or not jnp.issubdtype(dtype, jnp.bool_):
        raise ValueError(f"which must be bool of shape [{batch}], one for each sequence, got {kind_of(which)[2]}")
    return jnp.asarray(array)


def as_array(given):
    """The array that a list or the like makes; what makes none, and arrays, as they are."""
    if isinstance(given, jax.Array | np.ndarray):
        return given
    try:
        return jnp.asarray(given)
    except (TypeError, ValueError, OverflowError):
        return given


def check_dtype(given) -> np.dtype:
    """The dtype of what a cache stores; raises ValueError if it is none of these."""
    dtype = as_dtype(given)
    if dtype is None or dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.int8):
        came = shown(given) if dtype is None else dtype
        raise ValueError(f"dtype must be bfloat16, float16, float32 or int8, got {came}")
    return dtype


def check_prompt(layout: CacheLayout, length: int, is_forked: bool, options: dict) -> None:
    """Raises ValueError if a prompt of so many tokens, or an option of `attention`, does not fit a cache."""
    refused = {"query_offset", "query_segment_ids", "kv_segment_ids"} & options.keys()
    if refused:
        names = ", ".join(sorted(refused))
        raise ValueError(f"a prompt begins its sequence's one context: prefill takes no {names}")
    for name in {"query_spec", "head_axis", "heads"} & options.keys():
        raise ValueError(f"prefill takes no {name}: how the cache is split is said once, in KVCache.create")
    if is_forked:
        raise ValueError("prefill begins anew, but the sequences share a prefix: prefill before fork")
    if layout.max_length is not None and length > layout.max_length:
        raise ValueError(
            f"a prompt of {length} tokens does not fit into a cache for {layout.max_length}: create it with a larger "
            "max_length"
        )


def lengthened(lengths: Array, most: int, counts: Array | None) -> Int32[Array, " b"]:
    """Lengths with so many tokens more; `NEVER` where a count is none."""
    if counts is None:
        return lengths + most
    return jnp.where((counts >= 0) & (counts <= most), lengths + counts, NEVER)


@functools.partial(jax.jit, static_argnums=(0, 1))
def equal_counts(batch: int, tokens: int) -> Int32[Array, " b"]:
    """The same number of tokens for every sequence. Compiled: over a mesh it is there where it is needed."""
    return jnp.full(batch, tokens, jnp.int32)


@jax.jit
def emptied(which: Bool[Array, " b"], held: tuple[Array, ...], lengths: Array, furthest: Array) -> tuple:
    """The blocks in every slot, the lengths and the furthest lengths without the sequences that `which` names."""
    kept = tuple(jnp.where(which[:, None, None], -1, blocks) for blocks in held)
    return kept, jnp.where(which, 0, lengths), jnp.where(which, 0, furthest)
