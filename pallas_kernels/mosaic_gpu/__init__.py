"""Block-sparse attention on NVIDIA Hopper GPUs, in Pallas Mosaic GPU."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from pallas_kernels import xla
from pallas_kernels.batching import over_sequences
from pallas_kernels.mosaic_gpu.arrange import arrange, arrange_query_gradient
from pallas_kernels.mosaic_gpu.arrange_keys import arrange_key_gradients
from pallas_kernels.mosaic_gpu.chip import refuse_chip
from pallas_kernels.mosaic_gpu.chip import refuse_device as refuse_device
from pallas_kernels.mosaic_gpu.forward import attend
from pallas_kernels.mosaic_gpu.key_gradient import key_gradients
from pallas_kernels.mosaic_gpu.key_tables import KeyTables, key_tables, selection_key_tables
from pallas_kernels.mosaic_gpu.query_gradient import query_gradient
from pallas_kernels.mosaic_gpu.tables import ForwardTables, Tables, schedule_tables, selection_tables
from pallas_kernels.mosaic_gpu.tiles import (
    SHARED_BYTES,
    HopperTiles,
    choose_gradient_tiles,
    choose_heads,
    choose_key_tiles,
    choose_tiles,
)
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.sharding import Sharding
from pallas_kernels.unread import depends_on_arrays, on_read_arrays, unread_keys

TILES = HopperTiles
DTYPES = ("bfloat16", "float16")
MOST_FEATURES = 256
BLOCK_SIZES = (16, 32, 64, 128)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BackwardTables:
    """What the backward pass walks.

    Attributes:
      queries: for their gradient.
      keys: for those of keys and values.
    """

    queries: ForwardTables
    keys: KeyTables


def refuse(problem: Problem, operands: Operands) -> str | None:
    """Why this backend cannot do it."""
    query, value = operands.query, operands.value
    if not isinstance(query.shape[0], int):
        return f"needs a batch known while tracing, got {query.shape[0]}"
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
    walked = _schedule_tables(schedule, _tiles(problem, operands))
    if depends_on_arrays(problem, operands):
        return ForwardTables(walked, None, xla.backward_tables(dataclasses.replace(problem, tiles=None), operands))
    return ForwardTables(walked, unread_keys(schedule), None)


def backward_tables(problem: Problem, operands: Operands) -> BackwardTables | None:
    """What the kernels of the gradients walk; None for a selection."""
    queries = forward_tables(dataclasses.replace(problem, tiles=_gradient_tiles(problem, operands)), operands)
    if problem.schedule is None or queries is None:
        return None
    width = _key_tiles(problem, operands).word_bits(problem.schedule.block_size)
    return BackwardTables(queries, key_tables(problem.schedule, width))


def _schedule_tables(schedule: BlockSchedule, tiles: HopperTiles) -> Tables:
    return schedule_tables(schedule, tiles.queries, tiles.word_bits(schedule.block_size))


def _gradient_tiles(problem: Problem, operands: Operands) -> HopperTiles:
    """Of the gradient of the queries, with as many heads as in the forward pass."""
    sizes = *_widths(operands), _block_size(problem, operands)
    return choose_gradient_tiles(*sizes, operands.key.shape[1], _tiles(problem, operands).heads)


def _key_tiles(problem: Problem, operands: Operands) -> HopperTiles:
    selection = operands.selection
    query_block = _block_size(problem, operands) if selection is None else selection.query_block
    return choose_key_tiles(*_widths(operands), query_block, operands.query.shape[1])


def _widths(operands: Operands) -> tuple[int, int]:
    return _up(operands.query.shape[-1]), _up(operands.value.shape[-1])


def table_specs(tables: ForwardTables | BackwardTables, sharding: Sharding) -> typing.Any:
    """How the tables are split over a mesh: slices and packs with their heads, the lists that they share not at all."""
    if isinstance(tables, BackwardTables):
        return BackwardTables(
            table_specs(tables.queries, sharding),
            _split(tables.keys, slices=sharding.of(heads=1, ndim=6), members=sharding.of(heads=0, ndim=3)),
        )
    unread = None if tables.unread is None else sharding.of(heads=0, ndim=2)
    walks = None if tables.walks is None else xla.table_specs(tables.walks, sharding)
    walked = _split(tables.walked, slices=sharding.of(heads=1, ndim=5))
    return dataclasses.replace(tables, walked=walked, unread=typing.cast(typing.Any, unread), walks=walks)


def _split(tables: typing.Any, **split: PartitionSpec) -> typing.Any:
    return dataclasses.replace(jax.tree.map(lambda array: PartitionSpec(), tables), **split)


def forward(problem: Problem, operands: Operands) -> tuple[Array, Array]:
    """out [b, t, h, e] in the query's dtype and lse [b, h, t] in float32, sinks included."""
    return over_sequences(functools.partial(_forward, problem))(operands)


def _forward(problem: Problem, operands: Operands) -> tuple[Array, Array]:
    tiles = _tiles(problem, operands)

    def run(operands: Operands) -> tuple[Array, Array]:
        walked = _walked(operands, operands.tables, tiles)
        plan, inputs, finish = arrange(problem, operands, walked, tiles)
        return finish(*attend(plan, inputs))

    return _on_read_arrays(problem, operands, ("value",), run)


def backward(problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array) -> tuple[Array, Array, Array]:
    """dq, dk and dv in the inputs' dtype.

    Args:
      dout: [b, t, h, e].
      lse: [b, h, t], sinks included.
      delta: [b, h, t], Σ out · dout - dlse.
    """
    return over_sequences(functools.partial(_backward, problem))(operands, dout, lse, delta)


def _backward(
    problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array]:
    tables: BackwardTables | None = operands.tables
    # Queries that do not exist seem to read, too: what nobody else reads must not be a NaN.
    run = functools.partial(_gradients, problem, dout, lse, delta, None if tables is None else tables.keys)
    operands = dataclasses.replace(operands, tables=None if tables is None else tables.queries)
    return _on_read_arrays(problem, operands, ("key", "value"), run)


def _gradients(
    problem: Problem, dout: Array, lse: Array, delta: Array, packs: KeyTables | None, operands: Operands
) -> tuple[Array, Array, Array]:
    over_keys: ForwardTables | None = operands.tables
    tiles, key_tiles = _gradient_tiles(problem, operands), _key_tiles(problem, operands)
    of_rows = dout, lse, delta
    walked = _walked(operands, over_keys, tiles)
    plan, inputs, finish = arrange_query_gradient(problem, operands, *of_rows, walked, tiles)
    dquery = finish(query_gradient(plan, inputs, problem.scale))
    if packs is None:
        assert operands.selection is not None  # all else has tables
        width = key_tiles.word_bits(operands.selection.query_block)
        packs = selection_key_tables(operands.selection, operands, width)
    plan, inputs, finish = arrange_key_gradients(problem, operands, *of_rows, packs, key_tiles)
    return dquery, *finish(*key_gradients(plan, inputs))


def _walked(operands: Operands, tables: ForwardTables | None, tiles: HopperTiles) -> Tables:
    return selection_tables(operands, tiles) if tables is None else tables.walked


def _on_read_arrays(problem: Problem, operands: Operands, names: tuple[str, ...], run: typing.Callable) -> typing.Any:
    tables: ForwardTables | None = operands.tables
    if tables is None:
        return on_read_arrays(problem, operands, names, None, None, run)
    unread = None if tables.unread is None else jnp.asarray(tables.unread)
    return on_read_arrays(problem, operands, names, unread, tables.walks, run)
