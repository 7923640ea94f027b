"""Block-sparse attention on TPUs, in Pallas Mosaic."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool

from pallas_kernels import xla
from pallas_kernels.mosaic_tpu.arrange import arrange, rows_back
from pallas_kernels.mosaic_tpu.forward import attend
from pallas_kernels.mosaic_tpu.tables import Tables, schedule_tables, selection_tables
from pallas_kernels.mosaic_tpu.tiles import LEAST_ROWS, MOST_ROWS, TpuTiles, choose_heads, choose_tiles
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.sharding import Sharding
from pallas_kernels.unread import depends_on_arrays, unread_keys, without_unread

TILES = TpuTiles
DTYPES = ("bfloat16", "float32")
MOST_FEATURES = 256
SCALAR_BYTES = 384 << 10
"""Of scalar memory for one head's lists and slices; the next head's are brought meanwhile."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardTables:
    """What a call needs to know of its schedule.

    Attributes:
      walked: by its tiles.
      unread: bool [k, s], keys that nobody reads in blocks that are loaded; None where there are none.
      walks: XLA's tables, where it takes more than the schedule to know what is read; else None.
    """

    walked: Tables
    unread: Bool[Array | np.ndarray, "k s"] | None
    walks: typing.Any


def refuse(problem: Problem, operands: Operands) -> str | None:
    """Why this backend cannot do it."""
    query, key, value = operands.query, operands.key, operands.value
    if str(query.dtype) not in DTYPES:
        return f"needs dtype {' or '.join(DTYPES)}, got {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > MOST_FEATURES:
        return f"needs head dims of at most {MOST_FEATURES}, got {query.shape[-1]} and {value.shape[-1]}"
    reads = problem.schedule or operands.selection
    assert reads is not None  # one of the two says what is read
    if not LEAST_ROWS <= reads.block_size <= MOST_ROWS or reads.block_size & (reads.block_size - 1):
        return f"needs a block size that is a power of two from {LEAST_ROWS} to {MOST_ROWS}, got {reads.block_size}"
    selection = operands.selection
    if selection is not None and selection.query_block % LEAST_ROWS:
        return f"needs query blocks of a multiple of {LEAST_ROWS} tokens, got {selection.query_block}"
    tiles = _tiles(problem, operands)
    heads = choose_heads(problem.schedule, selection, query.shape[2], key.shape[2])
    if tiles.heads not in heads:
        return f"a tile can have {' or '.join(map(str, heads))} heads here, got {tiles.heads}"
    least = reads.block_size if selection is None else LEAST_ROWS
    if tiles.queries < least or (selection is not None and selection.query_block % tiles.queries):
        return f"a tile of {tiles.queries} queries does not fit blocks of them"
    if selection is None:
        scalars = schedule_tables(reads, tiles).scalar_bytes
    else:
        scalars = 4 * int(np.prod(selection.kv_blocks.shape[2:])) + 8 * (query.shape[1] // tiles.queries)
    if scalars > SCALAR_BYTES:
        return f"the lists of a head need {scalars} bytes of scalar memory, of {SCALAR_BYTES}"
    return None


def _tiles(problem: Problem, operands: Operands) -> TpuTiles:
    if problem.tiles is not None:
        return problem.tiles
    query, key = operands.query, operands.key
    return choose_tiles(
        problem.schedule, operands.selection, query.shape[2], key.shape[2], query.shape[1], key.shape[1]
    )


def forward_tables(problem: Problem, operands: Operands) -> ForwardTables | None:
    """What the kernel walks, and what it does not read; None for a selection."""
    schedule = problem.schedule
    if schedule is None:
        return None
    walked = schedule_tables(schedule, _tiles(problem, operands))
    if depends_on_arrays(problem, operands):
        return ForwardTables(walked, None, xla.backward_tables(dataclasses.replace(problem, tiles=None), operands))
    return ForwardTables(walked, unread_keys(schedule), None)


def backward_tables(problem: Problem, operands: Operands) -> typing.Any:
    """Those of XLA, which computes the backward pass."""
    return xla.backward_tables(dataclasses.replace(problem, tiles=None), operands)


def table_specs(tables: typing.Any, sharding: Sharding) -> typing.Any:
    """How the tables are split over a mesh: slices and the choice of a list with their heads, all else not at all."""
    if not isinstance(tables, ForwardTables):
        return xla.table_specs(tables, sharding)
    walked = dataclasses.replace(
        jax.tree.map(lambda array: PartitionSpec(), tables.walked),
        lists=sharding.of(heads=1, ndim=2),
        slices=sharding.of(heads=1, ndim=5),
    )
    unread = None if tables.unread is None else sharding.of(heads=0, ndim=2)
    walks = None if tables.walks is None else xla.table_specs(tables.walks, sharding)
    return ForwardTables(typing.cast(typing.Any, walked), typing.cast(typing.Any, unread), walks)


def forward(problem: Problem, operands: Operands) -> tuple[Array, Array]:
    """out [b, t, h, e] in the query's dtype and lse [b, h, t] in float32, sinks included."""
    tiles, tables = _tiles(problem, operands), operands.tables
    operands = dataclasses.replace(operands, value=_without_unread(problem, operands, operands.value))
    walked = _walked(operands, tables, tiles)
    plan, inputs, grid = arrange(problem, operands, walked, tiles)
    out, lse = attend(plan, inputs)
    out = grid.take_back(out.swapaxes(1, 2), 1)[..., : operands.value.shape[3]]
    return out, rows_back(grid, lse, tiles.heads)


def backward(problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array):
    return xla.backward(dataclasses.replace(problem, tiles=None), operands, dout, lse, delta)


def _walked(operands: Operands, tables: ForwardTables | None, tiles: TpuTiles) -> Tables:
    if tables is not None:
        return tables.walked
    assert operands.selection is not None  # all else has tables
    return selection_tables(operands, operands.selection, tiles)


def _without_unread(problem: Problem, operands: Operands, array: Array) -> Array:
    tables: ForwardTables | None = operands.tables
    if tables is None:
        return without_unread(problem, operands, array, None, None)
    unread = None if tables.unread is None else jnp.asarray(tables.unread)
    return without_unread(problem, operands, array, unread, tables.walks)
