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
from pallas_kernels.mosaic_gpu.arrange import arrange, prepare_query_grad_inputs
from pallas_kernels.mosaic_gpu.arrange_keys import prepare_kv_grad_inputs
from pallas_kernels.mosaic_gpu.chip import unsupported_chip_reason
from pallas_kernels.mosaic_gpu.chip import unsupported_device_reason as unsupported_device_reason
from pallas_kernels.mosaic_gpu.kv_tables import KVTables, kv_tables, selection_kv_tables
from pallas_kernels.mosaic_gpu.sm90.backward import dkv_kernel, dq_kernel
from pallas_kernels.mosaic_gpu.sm90.config import (
    SHARED_BYTES,
    HopperConfig,
    choose_config,
    choose_heads,
    choose_kv_grad_config,
    choose_query_grad_config,
)
from pallas_kernels.mosaic_gpu.sm90.forward import forward_kernel
from pallas_kernels.mosaic_gpu.tables import ForwardTables, Tables, schedule_tables, selection_tables
from pallas_kernels.nonfinite import depends_on_arrays, unread_keys, zero_unread_keys
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.sharding import Sharding

CONFIG = HopperConfig
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
    keys: KVTables


def unsupported_reason(problem: Problem, operands: Operands) -> str | None:
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
    config = _config(problem, operands)
    if config.heads_per_tile not in heads:
        return f"a tile can have {' or '.join(map(str, heads))} heads here, got {config.heads_per_tile}"
    shared = config.shared_bytes(_up(query.shape[-1]), _up(value.shape[-1]), block_size, 3)
    if shared > SHARED_BYTES:
        return f"the tiles need {shared} bytes of shared memory, of {SHARED_BYTES}"
    return unsupported_chip_reason()


def _up(features: int) -> int:
    return -(-features // 16) * 16


def _block_size(problem: Problem, operands: Operands) -> int:
    if operands.selection is not None:
        return operands.selection.block_size
    assert problem.schedule is not None  # one of the two says what is read
    return problem.schedule.block_size


def _config(problem: Problem, operands: Operands) -> HopperConfig:
    if problem.config is not None:
        return problem.config
    query, key, value = operands.query, operands.key, operands.value
    heads = choose_heads(problem.schedule, operands.selection, query.shape[2], key.shape[2])
    sizes = _up(query.shape[-1]), _up(value.shape[-1]), _block_size(problem, operands)
    return choose_config(*sizes, key.shape[1], heads[-1], heads)


def forward_tables(problem: Problem, operands: Operands) -> ForwardTables | None:
    """What the kernel walks, and what it does not read; None for a selection."""
    schedule = problem.schedule
    if schedule is None:
        return None
    walked = _schedule_tables(schedule, _config(problem, operands))
    if depends_on_arrays(problem, operands):
        return ForwardTables(walked, None, xla.backward_tables(dataclasses.replace(problem, config=None), operands))
    return ForwardTables(walked, unread_keys(schedule), None)


def backward_tables(problem: Problem, operands: Operands) -> BackwardTables | None:
    """What the kernels of the gradients walk; None for a selection."""
    queries = forward_tables(dataclasses.replace(problem, config=_query_grad_config(problem, operands)), operands)
    if problem.schedule is None or queries is None:
        return None
    width = _kv_grad_config(problem, operands).bits_per_word(problem.schedule.block_size)
    return BackwardTables(queries, kv_tables(problem.schedule, width))


def _schedule_tables(schedule: BlockSchedule, config: HopperConfig) -> Tables:
    return schedule_tables(schedule, config.block_q, config.bits_per_word(schedule.block_size))


def _query_grad_config(problem: Problem, operands: Operands) -> HopperConfig:
    """Of the gradient of the queries, with as many heads as in the forward pass."""
    sizes = *_widths(operands), _block_size(problem, operands)
    return choose_query_grad_config(*sizes, operands.key.shape[1], _config(problem, operands).heads_per_tile)


def _kv_grad_config(problem: Problem, operands: Operands) -> HopperConfig:
    selection = operands.selection
    query_block = _block_size(problem, operands) if selection is None else selection.query_block
    return choose_kv_grad_config(*_widths(operands), query_block, operands.query.shape[1])


def _widths(operands: Operands) -> tuple[int, int]:
    return _up(operands.query.shape[-1]), _up(operands.value.shape[-1])


def table_specs(tables: ForwardTables | BackwardTables, sharding: Sharding) -> typing.Any:
    """How the tables are split over a mesh: slices and packs with their heads, the lists that they share not at all."""
    if isinstance(tables, BackwardTables):
        return BackwardTables(
            table_specs(tables.queries, sharding),
            _split(tables.keys, ranges=sharding.of(heads=1, ndim=6), members=sharding.of(heads=0, ndim=3)),
        )
    unread = None if tables.unread is None else sharding.of(heads=0, ndim=2)
    walks = None if tables.walks is None else xla.table_specs(tables.walks, sharding)
    walked = _split(tables.walked, ranges=sharding.of(heads=1, ndim=5))
    return dataclasses.replace(tables, walked=walked, unread=typing.cast(typing.Any, unread), walks=walks)


def _split(tables: typing.Any, **split: PartitionSpec) -> typing.Any:
    return dataclasses.replace(jax.tree.map(lambda array: PartitionSpec(), tables), **split)


def forward(problem: Problem, operands: Operands) -> tuple[Array, Array]:
    """out [b, t, h, e] in the query's dtype and lse [b, h, t] in float32, sinks included."""
    return over_sequences(functools.partial(_forward, problem))(operands)


def _forward(problem: Problem, operands: Operands) -> tuple[Array, Array]:
    config = _config(problem, operands)

    def run(operands: Operands) -> tuple[Array, Array]:
        walked = _walked(operands, operands.tables, config)
        plan, inputs, finish = arrange(problem, operands, walked, config)
        return finish(*forward_kernel(plan, inputs))

    return _zero_unread_keys(problem, operands, ("value",), run)


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
    return _zero_unread_keys(problem, operands, ("key", "value"), run)


def _gradients(
    problem: Problem, dout: Array, lse: Array, delta: Array, kv_tiles: KVTables | None, operands: Operands
) -> tuple[Array, Array, Array]:
    over_keys: ForwardTables | None = operands.tables
    config, kv_grad_config = _query_grad_config(problem, operands), _kv_grad_config(problem, operands)
    of_rows = dout, lse, delta
    walked = _walked(operands, over_keys, config)
    plan, inputs, finish = prepare_query_grad_inputs(problem, operands, *of_rows, walked, config)
    dquery = finish(dq_kernel(plan, inputs, problem.scale))
    if kv_tiles is None:
        assert operands.selection is not None  # all else has tables
        width = kv_grad_config.bits_per_word(operands.selection.query_block)
        kv_tiles = selection_kv_tables(operands.selection, operands, width)
    plan, inputs, finish = prepare_kv_grad_inputs(problem, operands, *of_rows, kv_tiles, kv_grad_config)
    return dquery, *finish(*dkv_kernel(plan, inputs))


def _walked(operands: Operands, tables: ForwardTables | None, config: HopperConfig) -> Tables:
    return selection_tables(operands, config) if tables is None else tables.walked


def _zero_unread_keys(problem: Problem, operands: Operands, names: tuple[str, ...], run: typing.Callable) -> typing.Any:
    tables: ForwardTables | None = operands.tables
    if tables is None:
        return zero_unread_keys(problem, operands, names, None, None, run)
    unread = None if tables.unread is None else jnp.asarray(tables.unread)
    return zero_unread_keys(problem, operands, names, unread, tables.walks, run)
