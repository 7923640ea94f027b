"""Block-sparse attention on NVIDIA Hopper GPUs, in Pallas Mosaic GPU: the forward pass."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from pallas_kernels import xla
from pallas_kernels.mosaic_gpu.arrange import arrange
from pallas_kernels.mosaic_gpu.chip import refuse_chip
from pallas_kernels.mosaic_gpu.forward import attend
from pallas_kernels.mosaic_gpu.tables import ForwardTables, schedule_tables, selection_tables
from pallas_kernels.mosaic_gpu.tiles import SHARED_BYTES, HopperTiles, choose_heads, choose_tiles
from pallas_kernels.mosaic_gpu.unread import depends_on_arrays, unread_keys, without_unread
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.sharding import Sharding

TILES = HopperTiles
DTYPES = ("bfloat16", "float16")
MOST_FEATURES = 256
BLOCK_SIZES = (16, 32, 64, 128)


def refuse(problem: Problem, operands: Operands) -> str | None:
    """Why this backend cannot do it."""
    query, value = operands.query, operands.value
    if str(query.dtype) not in DTYPES:
        return f"needs dtype {' or '.join(DTYPES)}, got {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > MOST_FEATURES:
        return f"needs head dims of at most {MOST_FEATURES}, got {query.shape[-1]} and {value.shape[-1]}"
    block_size = _block_size(problem, operands)
    if block_size not in BLOCK_SIZES:
        return f"needs a block size of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}"
    heads = choose_heads(problem.schedule, operands.selection, query.shape[2], operands.key.shape[2])
    if not heads:
        return "needs query blocks that fill a tile of 128 rows, alone or with the heads of a group that read the same"
    tiles = _tiles(problem, operands)
    if tiles.heads not in heads:
        return f"a tile can have {' or '.join(map(str, heads))} heads here, got {tiles.heads}"
    shared = tiles.shared_bytes(_up(query.shape[-1]), _up(value.shape[-1]), block_size, 3)
    if shared > SHARED_BYTES:
        return f"the tiles need {shared} bytes of shared memory, of {SHARED_BYTES}"
    return refuse_chip()


def _up(features: int) -> int:
    return -(-features // 16) * 16


def _block_size(problem: Problem, operands: Operands) -> int:
    if operands.selection is not None:
        return operands.selection.block_size
    assert problem.schedule is not None  # one of the two says what is read
    return problem.schedule.block_size


def _tiles(problem: Problem, operands: Operands) -> HopperTiles:
    if problem.tiles is not None:
        return problem.tiles
    query, key, value = operands.query, operands.key, operands.value
    heads = choose_heads(problem.schedule, operands.selection, query.shape[2], key.shape[2])
    sizes = _up(query.shape[-1]), _up(value.shape[-1]), _block_size(problem, operands)
    return choose_tiles(*sizes, key.shape[1], heads[-1], heads)


def forward_tables(problem: Problem, operands: Operands) -> ForwardTables | None:
    """What the kernel walks, and what it does not read; None for a selection."""
    schedule = problem.schedule
    if schedule is None:
        return None
    walked = schedule_tables(schedule, _tiles(problem, operands).queries)
    if depends_on_arrays(problem, operands):
        return ForwardTables(walked, None, xla.backward_tables(dataclasses.replace(problem, tiles=None), operands))
    return ForwardTables(walked, unread_keys(schedule), None)


def table_specs(tables: ForwardTables, sharding: Sharding) -> typing.Any:
    """How the tables are split over a mesh: rows' slices with their heads, the lists that they share not at all."""
    walked = jax.tree.map(lambda array: PartitionSpec(), tables.walked)
    walked = dataclasses.replace(walked, slices=sharding.of(heads=1, ndim=5))
    unread = None if tables.unread is None else sharding.of(heads=0, ndim=2)
    walks = None if tables.walks is None else xla.table_specs(tables.walks, sharding)
    return dataclasses.replace(tables, walked=walked, unread=typing.cast(typing.Any, unread), walks=walks)


def forward(problem: Problem, operands: Operands) -> tuple[Array, Array]:
    """out [b, t, h, e] in the query's dtype and lse [b, h, t] in float32, sinks included."""
    tiles = _tiles(problem, operands)
    if operands.selection is None:
        tables: ForwardTables = operands.tables
    else:
        tables = ForwardTables(selection_tables(operands, tiles), None, None)
    unread = None if tables.unread is None else jnp.asarray(tables.unread)
    value = without_unread(problem, operands, unread, tables.walks)
    plan, inputs, finish = arrange(problem, operands, value, tables.walked, tiles)
    return finish(*attend(plan, inputs))
