"""How a call's arrays are laid out for kernels: queries in tiles, lengths and features rounded up."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.problem import Operands, Problem


@dataclasses.dataclass(frozen=True)
class QueryGrid:
    """Queries in tiles: the first `shift` rows of the first tile are empty.

    Attributes:
      shift: int, or int32 [b].
      first: int, or int32 [b], which tile of the tables the first one is.
    """

    block_q: int
    num_tiles: int
    length: int
    shift: int | Array
    first: int | Array

    def place(self, array: Array, length: int, nothing: float = 0) -> Array:
        """[b, t, ...] -> [b, length, ...], `nothing` where there is no query."""
        if isinstance(self.shift, int):
            after = length - self.shift - self.length
            widths = ((0, 0), (self.shift, after), *((0, 0) for _ in array.shape[2:]))
            return jnp.pad(array, widths, constant_values=nothing)
        room = jnp.full((array.shape[0], length, *array.shape[2:]), nothing, array.dtype)
        return jax.vmap(lambda r, a, at: jax.lax.dynamic_update_slice_in_dim(r, a, at, 0))(room, array, self.shift)

    def unpad(self, array: Array, axis: int) -> Array:
        """The inverse, along an axis after the batch."""
        if isinstance(self.shift, int):
            return jax.lax.slice_in_dim(array, self.shift, self.shift + self.length, axis=axis)
        return jax.vmap(lambda a, at: jax.lax.dynamic_slice_in_dim(a, at, self.length, axis - 1))(array, self.shift)

    def rows(self, array: Array, rows: int) -> Array:
        """[b, t] -> [b, tiles, rows]: the rows of the tiles, the same queries once for every head."""
        array = self.place(array, self.num_tiles * self.block_q).reshape(array.shape[0], self.num_tiles, self.block_q)
        return jnp.tile(array, (1, 1, rows // self.block_q))


def make_query_grid(problem: Problem, operands: Operands, queries: int) -> QueryGrid:
    length, offset = operands.query.shape[1], operands.query_offset
    if problem.schedule is None:
        shift, first, most = 0, 0, 0
    elif offset is None:
        shift = problem.schedule.query_offset % problem.schedule.block_size
        first, most = 0, shift
    else:
        shift, first, most = offset % queries, offset // queries, queries - 1
    return QueryGrid(queries, -(-(length + most) // queries), length, shift, first)


def edge_ids(grid: QueryGrid, ids: Array) -> Array:
    """[b, t] -> [b, tiles, queries]; where there is no query the nearest one's, so that no tile is mixed by it."""
    index = jnp.arange(grid.num_tiles * grid.block_q, dtype=jnp.int32)
    shift = jnp.full(ids.shape[0], grid.shift, jnp.int32) if isinstance(grid.shift, int) else grid.shift
    index = jnp.clip(index - shift[:, None], 0, grid.length - 1)
    return jnp.take_along_axis(ids, index, 1).reshape(ids.shape[0], grid.num_tiles, grid.block_q)


def positive_scale(query: Array, scale: float) -> tuple[Array, float]:
    """The kernel takes the maximum before it scales, which needs a scale above 0."""
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale < 0 else (query * 0, 1.0)  # of a NaN, still one


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def pad(array: Array, axis: int, multiple: int) -> Array:
    after = -array.shape[axis] % multiple
    widths = [(0, after if each == axis else 0) for each in range(array.ndim)]
    return jnp.pad(array, widths) if after else array
