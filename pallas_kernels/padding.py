"""Padding of a call's arrays to whole tiles: queries to query tiles, lengths and features to multiples."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.problem import Operands
from pallas_kernels.selection import BlockSelection


@dataclasses.dataclass(frozen=True)
class QueryGrid:
    """Query tiles of a call; the first `shift` rows of the first tile are padding.

    Attributes:
      block_q: queries in a tile.
      num_tiles: tiles of the call.
      length: queries of the call.
      shift: int, or int32 [b].
      first: number of the first tile among the tiles of the schedule: int, or int32 [b].
    """

    block_q: int
    num_tiles: int
    length: int
    shift: int | Array
    first: int | Array

    def pad_to_tiles(self, array: Array, length: int | None = None, fill: float = 0) -> Array:
        """Pads [b, t, ...] to [b, length, ...]; the default length is that of all tiles."""
        length = self.num_tiles * self.block_q if length is None else length
        if isinstance(self.shift, int):
            after = length - self.shift - self.length
            widths = ((0, 0), (self.shift, after), *((0, 0) for _ in array.shape[2:]))
            return jnp.pad(array, widths, constant_values=fill)
        room = jnp.full((array.shape[0], length, *array.shape[2:]), fill, array.dtype)
        return jax.vmap(lambda r, a, at: jax.lax.dynamic_update_slice_in_dim(r, a, at, 0))(room, array, self.shift)

    def pad_rows(self, array: Array, length: int | None = None, fill: float = 0) -> Array:
        """Pads [b, h, t] to [b, h, length]."""
        return self.pad_to_tiles(array.swapaxes(1, 2), length, fill).swapaxes(1, 2)

    def unpad(self, array: Array, axis: int) -> Array:
        """Removes the padding along an axis after the batch."""
        if isinstance(self.shift, int):
            return jax.lax.slice_in_dim(array, self.shift, self.shift + self.length, axis=axis)
        return jax.vmap(lambda a, at: jax.lax.dynamic_slice_in_dim(a, at, self.length, axis - 1))(array, self.shift)

    def tile_rows(self, array: Array, rows: int) -> Array:
        """Splits [b, t] into [b, tiles, rows], with the queries of a tile once for each of its heads."""
        array = self.pad_to_tiles(array).reshape(array.shape[0], self.num_tiles, self.block_q)
        return jnp.tile(array, (1, 1, rows // self.block_q))

    def edge_ids(self, ids: Int32[Array, "b t"]) -> Int32[Array, "b tiles block_q"]:
        """Segment ids by tile; padding has the nearest query's id, so that it adds no segment to a tile."""
        index = jnp.arange(self.num_tiles * self.block_q, dtype=jnp.int32)
        shift = jnp.full(ids.shape[0], self.shift, jnp.int32) if isinstance(self.shift, int) else self.shift
        index = jnp.clip(index - shift[:, None], 0, self.length - 1)
        return jnp.take_along_axis(ids, index, 1).reshape(ids.shape[0], self.num_tiles, self.block_q)


def make_query_grid(operands: Operands, block_q: int) -> QueryGrid:
    """The query tiles of a call, `block_q` queries in each."""
    schedule, length, offset = operands.schedule, operands.query.shape[1], operands.query_offset
    if isinstance(schedule, BlockSelection):
        shift, first, most = 0, 0, 0
    elif offset is None:
        shift = schedule.query_offset % schedule.block_size
        first, most = 0, shift
    else:
        shift, first, most = offset % block_q, offset // block_q, block_q - 1
    return QueryGrid(block_q, -(-(length + most) // block_q), length, shift, first)


def pad_blocks(ids: Int32[Array, "b s"], multiple: int) -> Int32[Array, "b s_padded"]:
    """Segment ids padded with the last one, so that a block with padding is still of one segment."""
    return jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % multiple)), mode="edge")


def positive_scale(query: Array, scale: float) -> tuple[Array, float]:
    """Query and scale with the same products and a scale above 0, as the maximum is taken before scaling."""
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale < 0 else (query * 0, 1.0)  # a NaN stays one


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is at least `number`."""
    return -(-number // multiple) * multiple


def pad(array: Array, axis: int, multiple: int) -> Array:
    """The array with zeros after the end of an axis, up to a multiple."""
    after = -array.shape[axis] % multiple
    widths = [(0, after if each == axis else 0) for each in range(array.ndim)]
    return jnp.pad(array, widths) if after else array
