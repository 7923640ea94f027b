"""The arrays of a KV cache, and the writing of tokens into their slots."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from s2jax.cache.attention import per_sequence
from s2jax.cache.layout import CacheLayout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Buffer:
    """Slots of some KV heads.

    Attributes:
      key: [b, k, slots, block, d].
      value: [b, k, slots, block, e].
      key_scale, value_scale: float32 [b, k, slots, block], the factors of int8 keys and values; None for floats.
      block_ids: int32 [b, k, slots], the block in every slot; -1 for none.
    """

    key: Array
    value: Array
    key_scale: Array | None
    value_scale: Array | None
    block_ids: Int32[Array, "b k slots"]

    @classmethod
    def empty(cls, shape: tuple[int, ...], head_dim: int, value_dim: int, dtype) -> "Buffer":
        """Builds an empty buffer; `shape` is [b, k, slots, block]."""
        key, value = (jnp.zeros((*shape, features), dtype) for features in (head_dim, value_dim))
        key_scale, value_scale = (jnp.ones(shape, jnp.float32) if dtype == jnp.int8 else None for _ in range(2))
        return cls(key, value, key_scale, value_scale, jnp.full(shape[:3], -1, jnp.int32))

    @classmethod
    def stored(cls, key: Array, value: Array, dtype, block_ids: Array) -> "Buffer":
        """Builds a buffer from keys and values [..., f], cast or quantised to the dtype."""
        if dtype != jnp.int8:
            return cls(key.astype(dtype), value.astype(dtype), None, None, block_ids)
        (key, key_scale), (value, value_scale) = map(_quantised, (key, value))
        return cls(key, value, key_scale, value_scale, block_ids)

    @classmethod
    def map(cls, function: typing.Callable[..., Array], block_ids: Array, *buffers: "Buffer") -> "Buffer":
        """Applies a function to the keys, values and scales of some buffers."""
        each = zip(*((b.key, b.value, b.key_scale, b.value_scale) for b in buffers), strict=True)
        key, value, key_scale, value_scale = (None if arrays[0] is None else function(*arrays) for arrays in each)
        assert key is not None  # scales alone may be absent
        assert value is not None
        return cls(key, value, key_scale, value_scale, block_ids)

    def is_finite(self, value: Float[Array, "b t k e"]) -> Bool[Array, "b k"]:
        """True where no value is NaN or Inf, as it comes and as it is stored."""
        stored = self.value.dtype
        return jnp.isfinite(value.astype(stored) if jnp.issubdtype(stored, jnp.floating) else value).all((1, 3))


def _quantised(array: Array) -> tuple[Array, Array]:
    """int8 values [..., f] and their float32 factors [...]."""
    wide = array.astype(jnp.float32)
    scale = jnp.abs(wide).max(-1) / 127
    # A NaN stays one: its scale is it.
    steps = jnp.round(wide / jnp.where(scale > 0, scale, 1)[..., None])
    return jnp.where(jnp.isfinite(steps), steps, 0).astype(jnp.int8), scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """The whole blocks of contexts that several sequences share, read once for all of them.

    Attributes:
      first: int32 [z], the first block that each sequence has for itself.
    """

    buffers: tuple[Buffer, ...]
    first: Int32[Array, " z"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BufferLayout:
    """The part of a cache's layout that belongs to one buffer: the slot of every block, and how long it is kept.

    The arrays have a row for every KV head of the buffer; on a mesh, for those of a shard.

    Attributes:
      heads: int32 [k], the buffer's KV heads among all, or among all of their shard.
      slot_table, last_rows: int32 [k, blocks], `CacheLayout.slot_of` and `last_rows` of these heads.
      num_slots: slots of every head.
      fork_blocks: blocks for the tokens after a fork, in order from the first own block on; None where blocks have
        the layout's slots.
    """

    heads: Int32[np.ndarray | Array, " k"]
    slot_table: Int32[np.ndarray | Array, "k blocks"] | None
    last_rows: Int32[np.ndarray | Array, "k blocks"] | None
    layout: CacheLayout = dataclasses.field(metadata={"static": True})
    num_slots: int = dataclasses.field(metadata={"static": True})
    fork_blocks: int | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, layout: CacheLayout, heads: tuple[int, ...], fork_blocks: int | None, shards: int) -> "BufferLayout":
        """Builds the buffer's layout, with `fork_blocks` after a fork, but no more than the cache's layout takes."""
        chosen, num_slots = list(heads), int(layout.num_slots[list(heads)].max())
        slot_table, last_rows = (
            None if table is None else table[chosen] for table in (layout.slot_of, layout.last_rows)
        )
        local = np.array(heads, np.int32) % (layout.heads.num_kv_heads // shards)
        if fork_blocks is not None and fork_blocks > num_slots:
            fork_blocks = None
        return cls(local, slot_table, last_rows, layout, num_slots if fork_blocks is None else fork_blocks, fork_blocks)

    def without_fork(self) -> "BufferLayout":
        """The layout before a fork, by which shared blocks are looked up."""
        return dataclasses.replace(self, fork_blocks=None)

    def take(self, array: Array) -> Array:
        """Selects the buffer's KV heads of an array [b, t, k, ...]."""
        return array if len(self.heads) == array.shape[2] else array[:, :, self.heads]

    def empty(self, batch: int, head_dim: int, value_dim: int, dtype) -> Buffer:
        return Buffer.empty(
            (batch, len(self.heads), self.num_slots, self.layout.block_size), head_dim, value_dim, dtype
        )

    def slot_of(self, block: Int32[Array, "b k ..."], first: Int32[Array, " b"] | None) -> Int32[Array, "b k ..."]:
        """The slots of blocks, which are outside of the buffer for blocks that are never kept.

        Args:
          block: blocks of the context.
          first: the first own block after a fork.
        """
        if self.fork_blocks is not None:
            return block - expand_like(first, block)
        if self.slot_table is None:
            return block % int(self.layout.num_slots[0])
        return self._look_up(self.slot_table, block)

    def is_kept(self, block: Int32[Array, "b k ..."], row: Int32[Array, " b"]) -> Bool[Array, "b k ..."]:
        """True where a block is still kept at a row of queries."""
        if self.fork_blocks is not None:
            return jnp.ones(block.shape, bool)
        if self.last_rows is None:
            return block > expand_like(row, block) - int(self.layout.num_slots[0])
        return self._look_up(self.last_rows, block) >= expand_like(row, block)

    def _look_up(self, table: np.ndarray | Array, block: Array) -> Array:
        """Entries of a table [k, blocks] for the blocks; -1 beyond its end."""
        head = jnp.arange(len(self.heads), dtype=jnp.int32).reshape(1, -1, *[1] * (block.ndim - 2))
        last = table.shape[1] - 1
        return jnp.where(block <= last, jnp.asarray(table)[head, jnp.clip(block, 0, last)], -1)

    def append(
        self,
        buffer: Buffer,
        key: Float[Array, "b t k d"],
        value: Float[Array, "b t k e"],
        positions: Int32[Array, "b t"],
        end: Int32[Array, " b"],
        first: Int32[Array, " b"] | None,
    ) -> Buffer:
        """The buffer with tokens stored at their positions: those before `end` that are still kept there."""
        size = self.layout.block_size
        block = jnp.broadcast_to(positions[:, None] // size, (len(positions), *key.shape[2:0:-1]))
        kept = self.is_kept(block, (end - 1) // size) & (positions < end[:, None])[:, None]
        at = self._index(block, kept, first)
        block_ids = buffer.block_ids.at[at].set(block, mode="drop")
        new = Buffer.stored(key.swapaxes(1, 2), value.swapaxes(1, 2), buffer.key.dtype, block_ids)
        at = *at, positions[:, None] % size
        return Buffer.map(lambda array, tokens: array.at[at].set(tokens, mode="drop"), block_ids, buffer, new)

    def of_prompt(
        self, key: Float[Array, "b s k d"], value: Float[Array, "b s k e"], lengths: Int32[Array, " b"], dtype
    ) -> Buffer:
        """The buffer after a prompt: the blocks of `lengths` tokens that are still kept."""
        size, length = self.layout.block_size, key.shape[1]
        count = -(-length // size)
        block = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (len(key), len(self.heads), count))
        row = (lengths - 1) // size
        at = self._index(block, self.is_kept(block, row) & (block <= expand_like(row, block)), None)
        block_ids = jnp.full((*block.shape[:2], self.num_slots), -1, jnp.int32).at[at].set(block, mode="drop")

        def in_slots(array):
            array = jnp.pad(array, ((0, 0), (0, count * size - length), (0, 0), (0, 0))).swapaxes(1, 2)
            array, chosen = array.reshape(*block.shape, size, -1), jnp.maximum(block_ids, 0)[..., None, None]
            return jnp.take_along_axis(array, chosen, 2)

        return Buffer.stored(in_slots(key), in_slots(value), dtype, block_ids)

    def of_fork(self, shared: Buffer, first: Int32[Array, " z"], batch: int) -> Buffer:
        """The buffer after a fork: a copy of the block that is still being filled for each of the sequences."""
        block = jnp.broadcast_to(first[:, None, None], (*shared.block_ids.shape[:2], 1))
        source = jnp.maximum(self.without_fork().slot_of(block, None), 0)
        filling = jnp.take_along_axis(shared.block_ids, source, 2) == block
        filling, block = per_sequence(filling, batch), per_sequence(block, batch)
        at = self._index(block, filling, per_sequence(first, batch))
        block_ids = jnp.full((batch, len(self.heads), self.num_slots), -1, jnp.int32).at[at].set(block, mode="drop")

        def copied(array):
            found = jnp.take_along_axis(array, source.reshape(*source.shape, *[1] * (array.ndim - 3)), 2)
            empty = jnp.zeros((*block_ids.shape, *array.shape[3:]), array.dtype)
            return empty.at[at].set(per_sequence(found, batch), mode="drop")

        return Buffer.map(copied, block_ids, shared)

    def _index(self, block: Array, kept: Array, first: Array | None) -> tuple:
        """Indices of slots [b, k, n] for `.at`, beyond all of them for what is not kept."""
        slot = self.slot_of(block, first)
        numbers = (jnp.arange(size, dtype=jnp.int32) for size in slot.shape)
        b, k, _ = jnp.meshgrid(*numbers, indexing="ij", sparse=True)
        return b, k, jnp.where(kept & (slot >= 0), slot, self.num_slots)


def with_block_ids(buffers: tuple[Buffer, ...], block_ids: tuple[Array, ...]) -> tuple[Buffer, ...]:
    """The buffers, with other blocks in their slots."""
    return tuple(dataclasses.replace(buffer, block_ids=ids) for buffer, ids in zip(buffers, block_ids, strict=True))


def expand_like(array: Array | None, other: Array) -> Array:
    """An array [b], expanded to [b, 1, ...] with the axes of the other."""
    assert array is not None  # without a fork there is no first own block, and nobody asks
    return array.reshape(-1, *[1] * (other.ndim - 1))


def in_blocks(key: Array, value: Array, start: Array, size: int, count: int) -> Buffer:
    """A buffer of `count` blocks that hold tokens [b, t, k, f] from the positions `start` [b] on."""

    def shift(tokens, offset):
        padded = jnp.zeros((count * size, *tokens.shape[1:]), tokens.dtype)
        return jax.lax.dynamic_update_slice_in_dim(padded, tokens, offset, 0)

    def blocks(array):
        found = jax.vmap(shift)(array, start % size).swapaxes(1, 2)
        return found.reshape(*found.shape[:2], count, size, -1)

    first = start // size
    block_ids = first[:, None, None] + jnp.arange(count, dtype=jnp.int32)[None, None]
    shape = len(key), key.shape[2], count
    return Buffer(blocks(key), blocks(value), None, None, jnp.broadcast_to(block_ids, shape))
