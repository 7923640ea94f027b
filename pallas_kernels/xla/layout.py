"""Layout of a call's arrays in the blocks and tiles that the XLA passes compute on."""

import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.padding import QueryGrid, make_query_grid
from pallas_kernels.problem import Operands, Problem, accumulation_dtype
from pallas_kernels.selection import BlockSelection
from pallas_kernels.xla.block_lists import TileLists, along


class Tokens(typing.NamedTuple):
    """Some tokens: a mask of those that exist, their positions among the keys, and their segments, if any."""

    exists: Array
    position: Array
    segment: Array | None

    def reshape(self, *shape: int) -> "Tokens":
        return jax.tree.map(lambda array: array.reshape(shape), self)


CACHE_BYTES = 2 << 20
"""Logits computed at a time on a CPU: large enough to keep the cores busy, small enough to stay in a cache."""

LEAST_BYTES, MOST_BYTES = 32 << 20, 512 << 20
"""The same on GPUs and TPUs, where every operation of a chunk is a launch, and the arrays stay in the main memory."""


def chunk_bytes(platform: str | None, arrays: tuple[Array, ...]) -> int:
    """Bytes of logits that are computed at a time: on GPUs and TPUs as many as the arrays have, between two bounds."""
    if (platform or jax.default_backend()) == "cpu":
        return CACHE_BYTES
    if any(not isinstance(size, int) for array in arrays for size in array.shape):
        return LEAST_BYTES
    return min(max(LEAST_BYTES, sum(array.size * array.dtype.itemsize for array in arrays)), MOST_BYTES)


class Layout:
    """The arrays of a call in blocks and rows; a unit is one tile of one unique head of one batch element.

    A unique head is a KV head whose query heads read the same blocks and share the gathered keys; or, if they differ, a
    single query head.
    """

    def __init__(self, problem: Problem, operands: Operands, lists: TileLists):
        self.problem, self.operands, self.lists = problem, operands, jax.tree.map(jnp.asarray, lists)
        self.row_size, self.block_size = operands.schedule.query_block, operands.schedule.block_size
        self.batch, self.query_length, self.num_heads, _ = operands.query.shape
        _, self.kv_length, self.num_kv_heads, _ = operands.key.shape
        self.unique_heads = lists.ranges.shape[1]
        self.group = self.num_heads // self.unique_heads
        self.num_blocks = -(-self.kv_length // self.block_size)
        self.accumulate = accumulation_dtype(operands.query.dtype)
        self.chunk_bytes = chunk_bytes(problem.platform, (operands.query, operands.key, operands.value))

    def grid(self, rows_per_tile: int) -> QueryGrid:
        """The query tiles of a pass."""
        return make_query_grid(self.operands, self.row_size * rows_per_tile)

    # Arranging arrays.

    def rows(self, grid: QueryGrid, array: Array, fill: float = 0) -> Array:
        """[b, t, h, f] -> [b, tiles, block_q, h, f], without moving anything."""
        array = grid.pad_to_tiles(array, fill=fill)
        return array.reshape(self.batch, grid.num_tiles, grid.block_q, *array.shape[2:])

    def from_rows(self, grid: QueryGrid, array: Array) -> Array:
        """The inverse: [units, block_q · group, f] -> [b, t, h, f]."""
        rows, features = grid.block_q // self.row_size, array.shape[-1]
        array = array.reshape(self.batch, self.unique_heads, grid.num_tiles, rows, self.group, self.row_size, features)
        array = array.transpose(0, 2, 3, 5, 1, 4, 6).reshape(self.batch, -1, self.num_heads, features)
        return grid.unpad(array, 1)

    def tiles_of(self, rows: Array, units: Array) -> Array:
        """Tiles of an array in rows: [units, size · group, f]."""
        batch, unique_head, tile = (index[:, None] for index in self.split(units, rows.shape[1]))
        heads = unique_head * self.group + along(self.group, 2)
        tiles = rows.at[batch, tile, :, heads].get(mode="promise_in_bounds")
        tiles = tiles.reshape(len(units), self.group, -1, self.row_size, rows.shape[-1])
        return tiles.swapaxes(1, 2).reshape(len(units), -1, rows.shape[-1])

    def query_blocks(self, grid: QueryGrid, array: Array, fill: float = 0) -> Array:
        """[b, t, h, f] -> [b · unique_heads · (rows + 1), group · row_size, f]; the last row of every head is empty."""
        array = self.rows(grid, array, fill)
        array = array.reshape(self.batch, -1, self.row_size, self.unique_heads, self.group, array.shape[-1])
        array = array.transpose(0, 3, 1, 4, 2, 5).reshape(
            self.batch * self.unique_heads, grid.num_tiles, -1, array.shape[-1]
        )
        array = jnp.pad(array, ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=fill)
        return array.reshape(-1, *array.shape[2:])

    def columns(self, array: Array) -> Array:
        """[b, s, k, f] -> [b, blocks, block_size, k, f], without moving anything."""
        after = self.num_blocks * self.block_size - self.kv_length
        array = jnp.pad(array, ((0, 0), (0, after), (0, 0), (0, 0)))
        return array.reshape(self.batch, self.num_blocks, self.block_size, *array.shape[2:])

    def from_columns(self, array: Array) -> Array:
        """The inverse: [b, blocks, block_size, k, f] -> [b, s, k, f]."""
        return array.reshape(self.batch, -1, *array.shape[3:])[:, : self.kv_length]

    def key_blocks(self, array: Array) -> Array:
        """[b, s, k, f] -> [b · k · (blocks + 1), block_size, f]; the last block of every head is zero."""
        after = (self.num_blocks + 1) * self.block_size - self.kv_length
        array = jnp.pad(array, ((0, 0), (0, after), (0, 0), (0, 0)))
        return array.swapaxes(1, 2).reshape(-1, self.block_size, array.shape[-1])

    # Units: numbers that count batch elements, unique heads and tiles, tiles fastest.

    def split(self, units: Array, tiles: int) -> tuple[Array, Array, Array]:
        """Batch element, unique head and tile of each unit."""
        return units // (self.unique_heads * tiles), units // tiles % self.unique_heads, units % tiles

    def kv_head(self, unique_head: Array) -> Array:
        """The KV head that a unique head reads."""
        return unique_head * self.num_kv_heads // self.unique_heads

    def ranges(self, units: Array, tiles: int) -> Array:
        """The ranges of each unit of a pass over the keys: int32 [units, ranges, 2]."""
        batch, unique_head, tile = self.split(units, tiles)
        return self._ranges(batch, unique_head, tile)

    def query_ranges(self, grid: QueryGrid, units: Array) -> Array:
        """The ranges of each unit of a pass over the queries; a tile without queries has empty ones."""
        batch, unique_head, tile = self.split(units, grid.num_tiles)
        if isinstance(grid.first, int):
            return self._ranges(batch, unique_head, tile)
        first, shift = grid.first[batch], typing.cast(Array, grid.shift)[batch]
        used = tile * grid.block_q < shift + self.query_length
        return jnp.where(used[:, None, None], self._ranges(batch, unique_head, first + tile), 0)

    def _ranges(self, batch: Array, unique_head: Array, tile: Array) -> Array:
        table = self.lists.ranges
        tile = jnp.minimum(tile, table.shape[2] - 1)
        return table[batch if table.shape[0] > 1 else 0, unique_head, tile]

    def units(self, tiles: int) -> Array:
        return jnp.arange(self.batch * self.unique_heads * tiles, dtype=jnp.int32)

    # What may see what.

    def query_tokens(self, grid: QueryGrid, batch: Array, tile: Array) -> Tokens:
        """The queries of some tiles; `batch` and `tile` broadcast, tokens come as one more axis."""
        shift = grid.shift if isinstance(grid.shift, int) else grid.shift[batch][..., None]
        index = tile[..., None] * grid.block_q + along(grid.block_q, tile.ndim + 1) - shift
        offset = self.operands.query_offset
        position = index if offset is None else index + offset[batch][..., None]
        return self._tokens(batch, index, position, self.query_length, self.operands.query_segment_ids)

    def key_tokens(self, batch: Array, block: Array) -> Tokens:
        """The keys of some blocks; `batch` and `block` broadcast, tokens come as one more axis."""
        index = block[..., None] * self.block_size + along(self.block_size, block.ndim + 1)
        return self._tokens(batch, index, index, self.kv_length, self.operands.kv_segment_ids)

    @staticmethod
    def _tokens(batch, index, position, length, segment_ids) -> Tokens:
        exists = (index >= 0) & (index < length)
        if segment_ids is not None:
            segment_ids = segment_ids[batch[..., None], jnp.clip(index, 0, length - 1)]
        return Tokens(exists, position, segment_ids)

    @property
    def masks_all(self) -> bool:
        """True if every entry needs a mask over pairs of tokens."""
        return self.operands.query_segment_ids is not None or isinstance(self.operands.schedule, BlockSelection)

    def pairs(self, query: Tokens, key: Tokens) -> Array:
        """True for pairs that may see each other by existence, segments and a selection's causality; broadcasts."""
        allowed = query.exists & key.exists
        if query.segment is not None:
            allowed &= query.segment == key.segment
        schedule = self.operands.schedule
        if isinstance(schedule, BlockSelection) and schedule.causal:
            allowed &= key.position <= query.position
        return allowed

    def full(self, shape: tuple[int, ...], value: float = 0) -> Array:
        """A constant to start a loop with; inside a `shard_map` it varies over the axes that the operands vary over."""
        array = jnp.full(shape, value, self.accumulate)
        axes = frozenset().union(
            *(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(self.operands))
        )
        return jax.lax.pcast(array, tuple(sorted(axes)), to="varying") if axes else array

    def product(self, equation: str, first: Array, second: Array) -> Array:
        """A batched matrix product in the accumulation dtype."""
        return jnp.einsum(
            equation, first, second, precision=jax.lax.Precision.HIGHEST, preferred_element_type=self.accumulate
        )

    def logits(self, products: Array) -> tuple[Array, Array | None]:
        """Scaled and capped logits, and the slope of the cap."""
        logits = products * jnp.asarray(self.problem.scale, products.dtype)
        cap = self.problem.logits_soft_cap
        if cap is None:
            return logits, None
        bent = jnp.tanh(logits / jnp.asarray(cap, logits.dtype))
        return bent * jnp.asarray(cap, logits.dtype), 1 - bent * bent
