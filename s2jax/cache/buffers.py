"""The arrays of a KV cache, and how tokens come into them."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from s2jax.cache.attention import for_each
from s2jax.cache.layout import CacheLayout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Buffer:
    """Slots of some KV heads.

    Attributes:
      key, value: [b, k, slots, block, d] and [b, k, slots, block, e].
      key_scale, value_scale: float32 [b, k, slots, block], what a token's int8 are multiples of; None for floats.
      held: int32 [b, k, slots], the block in every slot; -1 for none.
    """

    key: Array
    value: Array
    key_scale: Array | None
    value_scale: Array | None
    held: Int32[Array, "b k slots"]

    @classmethod
    def empty(cls, shape: tuple[int, ...], head_dim: int, value_dim: int, dtype) -> "Buffer":
        """Builds an empty buffer; `shape` is [b, k, slots, block]."""
        key, value = (jnp.zeros((*shape, features), dtype) for features in (head_dim, value_dim))
        key_scale, value_scale = (jnp.ones(shape, jnp.float32) if dtype == jnp.int8 else None for _ in range(2))
        return cls(key, value, key_scale, value_scale, jnp.full(shape[:3], -1, jnp.int32))

    @classmethod
    def over(cls, function: typing.Callable[..., Array], held: Array, *buffers: "Buffer") -> "Buffer":
        """Applies the function to each array that the buffers hold a slot of."""
        each = zip(*((b.key, b.value, b.key_scale, b.value_scale) for b in buffers), strict=True)
        key, value, key_scale, value_scale = (None if arrays[0] is None else function(*arrays) for arrays in each)
        assert key is not None  # scales alone may be absent
        assert value is not None
        return cls(key, value, key_scale, value_scale, held)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Space:
    """The slots of a buffer: which block has which, and for how long.

    The arrays have a row for every KV head of the buffer; on a mesh, for those of a shard.

    Attributes:
      heads: int32 [k], where the buffer's KV heads stand among all, or among all of their shard.
      slot_of, last: int32 [k, blocks], see `CacheLayout`.
      slots: for every head.
      room: blocks that there are for what comes after a fork, one after the other from its first own block on; None
        where blocks stand as the layout has them.
    """

    heads: Int32[np.ndarray | Array, " k"]
    slot_of: Int32[np.ndarray | Array, "k blocks"] | None
    last: Int32[np.ndarray | Array, "k blocks"] | None
    layout: CacheLayout = dataclasses.field(metadata={"static": True})
    slots: int = dataclasses.field(metadata={"static": True})
    room: int | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, layout: CacheLayout, heads: tuple[int, ...], room: int | None, shards: int) -> "Space":
        """Builds the space, with `room` blocks after a fork, but no more than the layout takes anyway."""
        chosen, slots = list(heads), int(layout.slots[list(heads)].max())
        slot_of, last = (None if table is None else table[chosen] for table in (layout.slot_of, layout.last))
        local = np.array(heads, np.int32) % (layout.heads.num_kv_heads // shards)
        if room is not None and room > slots:
            room = None
        return cls(local, slot_of, last, layout, slots if room is None else room, room)

    def as_laid_out(self) -> "Space":
        """The space as it is without a fork, to look blocks up."""
        return dataclasses.replace(self, room=None)

    def take(self, array: Array) -> Array:
        """Selects the buffer's KV heads of an array [b, t, k, ...]."""
        return array if len(self.heads) == array.shape[2] else array[:, :, self.heads]

    def empty(self, batch: int, head_dim: int, value_dim: int, dtype) -> Buffer:
        return Buffer.empty((batch, len(self.heads), self.slots, self.layout.block_size), head_dim, value_dim, dtype)

    def place(self, block: Int32[Array, "b k ..."], first: Int32[Array, " b"] | None) -> Int32[Array, "b k ..."]:
        """The slots of blocks; none of the buffer's for those that are not kept.

        Args:
          first: the first own block after a fork.
        """
        if self.room is not None:
            return block - like(first, block)
        if self.slot_of is None:
            return block % int(self.layout.slots[0])
        return self._look_up(self.slot_of, block)

    def kept(self, block: Int32[Array, "b k ..."], row: Int32[Array, " b"]) -> Bool[Array, "b k ..."]:
        """True where a block is still kept at a row of queries."""
        if self.room is not None:
            return jnp.ones(block.shape, bool)
        if self.last is None:
            return block > like(row, block) - int(self.layout.slots[0])
        return self._look_up(self.last, block) >= like(row, block)

    def _look_up(self, table: np.ndarray | Array, block: Array) -> Array:
        """Entries of a table [k, blocks] for the blocks; -1 beyond its end."""
        head = jnp.arange(len(self.heads), dtype=jnp.int32).reshape(1, -1, *[1] * (block.ndim - 2))
        most = table.shape[1] - 1
        return jnp.where(block <= most, jnp.asarray(table)[head, jnp.clip(block, 0, most)], -1)

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
        kept = self.kept(block, (end - 1) // size) & (positions < end[:, None])[:, None]
        at = self._at(block, kept, first)
        held = buffer.held.at[at].set(block, mode="drop")
        new, at = (
            stored(key.swapaxes(1, 2), value.swapaxes(1, 2), buffer.key.dtype, held),
            (*at, positions[:, None] % size),
        )
        return Buffer.over(lambda array, tokens: array.at[at].set(tokens, mode="drop"), held, buffer, new)

    def survivors(
        self, key: Float[Array, "b s k d"], value: Float[Array, "b s k e"], lengths: Int32[Array, " b"], dtype
    ) -> Buffer:
        """The blocks that are kept of a prompt of so many tokens."""
        size, length = self.layout.block_size, key.shape[1]
        count = -(-length // size)
        block = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (len(key), len(self.heads), count))
        row = (lengths - 1) // size
        at = self._at(block, self.kept(block, row) & (block <= like(row, block)), None)
        held = jnp.full((*block.shape[:2], self.slots), -1, jnp.int32).at[at].set(block, mode="drop")

        def blocks(array):
            array = jnp.pad(array, ((0, 0), (0, count * size - length), (0, 0), (0, 0))).swapaxes(1, 2)
            return jnp.take_along_axis(array.reshape(*block.shape, size, -1), jnp.maximum(held, 0)[..., None, None], 2)

        return stored(blocks(key), blocks(value), dtype, held)

    def begun(self, shared: Buffer, first: Int32[Array, " z"], batch: int) -> Buffer:
        """After a fork, with a copy of the block that is still being filled for each of the sequences."""
        block = jnp.broadcast_to(first[:, None, None], (*shared.held.shape[:2], 1))
        source = jnp.maximum(self.as_laid_out().place(block, None), 0)
        filling = jnp.take_along_axis(shared.held, source, 2) == block
        filling, block = for_each(filling, batch), for_each(block, batch)
        at = self._at(block, filling, for_each(first, batch))
        held = jnp.full((batch, len(self.heads), self.slots), -1, jnp.int32).at[at].set(block, mode="drop")

        def copied(array):
            found = jnp.take_along_axis(array, source.reshape(*source.shape, *[1] * (array.ndim - 3)), 2)
            room = jnp.zeros((*held.shape, *array.shape[3:]), array.dtype)
            return room.at[at].set(for_each(found, batch), mode="drop")

        return Buffer.over(copied, held, shared)

    def _at(self, block: Array, kept: Array, first: Array | None) -> tuple:
        """Indices of slots [b, k, n] for `.at`, beyond all of them for what is not kept."""
        slot = self.place(block, first)
        numbers = (jnp.arange(size, dtype=jnp.int32) for size in slot.shape)
        b, k, _ = jnp.meshgrid(*numbers, indexing="ij", sparse=True)
        return b, k, jnp.where(kept & (slot >= 0), slot, self.slots)


def with_blocks(buffers: tuple[Buffer, ...], held: tuple[Array, ...]) -> tuple[Buffer, ...]:
    """The buffers, with other blocks in their slots."""
    return tuple(dataclasses.replace(buffer, held=blocks) for buffer, blocks in zip(buffers, held, strict=True))


def like(array: Array | None, other: Array) -> Array:
    """[b] for [b, ...]."""
    assert array is not None  # else there is nothing that stands from there on
    return array.reshape(-1, *[1] * (other.ndim - 1))


def in_blocks(key: Array, value: Array, start: Array, size: int, count: int) -> Buffer:
    """Tokens [b, t, k, f] from positions [b] on, in blocks as the context has them."""

    def place(tokens, offset):
        room = jnp.zeros((count * size, *tokens.shape[1:]), tokens.dtype)
        return jax.lax.dynamic_update_slice_in_dim(room, tokens, offset, 0)

    def blocks(array):
        found = jax.vmap(place)(array, start % size).swapaxes(1, 2)
        return found.reshape(*found.shape[:2], count, size, -1)

    first = start // size
    held = first[:, None, None] + jnp.arange(count, dtype=jnp.int32)[None, None]
    return Buffer(blocks(key), blocks(value), None, None, jnp.broadcast_to(held, (len(key), key.shape[2], count)))


def stored(key: Array, value: Array, dtype, held: Array) -> Buffer:
    """Keys and values [..., f] as a buffer of that dtype holds them."""
    if dtype != jnp.int8:
        return Buffer(key.astype(dtype), value.astype(dtype), None, None, held)
    (key, key_scale), (value, value_scale) = map(_quantised, (key, value))
    return Buffer(key, value, key_scale, value_scale, held)


def _quantised(array: Array) -> tuple[Array, Array]:
    """int8 and the float32 [...] that they are multiples of."""
    wide = array.astype(jnp.float32)
    scale = jnp.abs(wide).max(-1) / 127
    # A NaN stays one: its scale is it.
    steps = jnp.round(wide / jnp.where(scale > 0, scale, 1)[..., None])
    return jnp.where(jnp.isfinite(steps), steps, 0).astype(jnp.int8), scale
