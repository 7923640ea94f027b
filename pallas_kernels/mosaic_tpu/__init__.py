"""Block-sparse attention on TPUs, in Pallas Mosaic."""

import dataclasses
import functools
import logging
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool

from pallas_kernels import xla
from pallas_kernels.batching import over_sequences
from pallas_kernels.mosaic_tpu.arrange import arrange, prepare_query_grad_inputs, rows_back
from pallas_kernels.mosaic_tpu.arrange_keys import prepare_kv_grad_inputs, scatter_kv_tiles
from pallas_kernels.mosaic_tpu.backward import dkv_kernel, dq_kernel
from pallas_kernels.mosaic_tpu.config import (
    MAX_ROWS,
    MIN_ROWS,
    KVGradConfig,
    TpuConfig,
    allowed_heads_per_tile,
    choose_config,
    choose_kv_grad_config,
)
from pallas_kernels.mosaic_tpu.forward import forward_kernel
from pallas_kernels.mosaic_tpu.tables import (
    KVTables,
    Tables,
    kv_tables,
    schedule_tables,
    selection_kv_tables,
    selection_tables,
)
from pallas_kernels.nonfinite import depends_on_arrays, unread_keys, zero_unread_keys
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.selection import BlockSelection
from pallas_kernels.sharding import Sharding

LOG = logging.getLogger("s2jax")

CONFIG = TpuConfig
DTYPES = ("bfloat16", "float32")
MOST_FEATURES = 256
SCALAR_BYTES = 384 << 10
"""Of scalar memory for one head's lists and slices; the next head's are brought meanwhile."""

RESIDENT_BYTES = 8 << 20
"""Of vector memory for what stays there: masks, and in the keys' gradients what queries have."""


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
    query, key, value = operands.query, operands.key, operands.value
    if not isinstance(query.shape[0], int):
        return f"needs a batch known while tracing, got {query.shape[0]}"
    if str(query.dtype) not in DTYPES:
        return f"needs dtype {' or '.join(DTYPES)}, got {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > MOST_FEATURES:
        return f"needs head dims of at most {MOST_FEATURES}, got {query.shape[-1]} and {value.shape[-1]}"
    reads = problem.schedule or operands.selection
    assert reads is not None  # one of the two says what is read
    if not MIN_ROWS <= reads.block_size <= MAX_ROWS or reads.block_size & (reads.block_size - 1):
        return f"needs a block size that is a power of two from {MIN_ROWS} to {MAX_ROWS}, got {reads.block_size}"
    selection = operands.selection
    if selection is not None and (selection.query_block < MIN_ROWS or not _is_power_of_two(selection.query_block)):
        return f"needs query blocks of a power of two from {MIN_ROWS}, got {selection.query_block}"
    if selection is not None and not selection.kv_blocks.shape[3]:
        return "needs room for one block in every row of a selection"
    config = _config(problem, operands)
    heads = allowed_heads_per_tile(reads, query.shape[2], key.shape[2])
    if config.heads_per_tile not in heads:
        return f"a tile can have {' or '.join(map(str, heads))} heads here, got {config.heads_per_tile}"
    least = reads.block_size if selection is None else MIN_ROWS
    if config.block_q < least or (selection is not None and selection.query_block % config.block_q):
        return f"a tile of {config.block_q} queries does not fit blocks of them"
    if selection is not None:
        entries = int(np.prod(selection.kv_blocks.shape[2:])) * (
            reads.block_size // config.chunk_size(reads.block_size)
        )
        return _too_much(4 * entries + 12 * -(-query.shape[1] // config.block_q), 0)
    try:
        walked = schedule_tables(reads, config)
    except NotImplementedError as reason:
        return str(reason)
    return _too_much(*_memory(walked, operands))


def unsupported_device_reason(device) -> str | None:
    """Why the kernels cannot run on a TPU; they run on all since v4."""
    return None


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _memory(walked: Tables, operands: Operands) -> tuple[int, int]:
    """Bytes of scalar memory for one head, and of vector memory for masks."""
    rows, parts, _ = walked.ranges.shape[2:]
    # Segments cut every slice without a mask into three.
    cut = parts + 2 * walked.num_full_ranges if operands.query_segment_ids is not None else parts
    return 4 * (
        walked.entries.shape[1] + rows * (2 * cut + 1)
    ), 0 if walked.mask_bits is None else walked.mask_bits.nbytes


def _too_much(scalars: int, mask_bits: int) -> str | None:
    if scalars > SCALAR_BYTES:
        return f"the lists of a head need {scalars} bytes of scalar memory, of {SCALAR_BYTES}"
    if mask_bits > RESIDENT_BYTES:
        return f"the masks need {mask_bits} bytes of vector memory, of {RESIDENT_BYTES}"
    return None


def _config(problem: Problem, operands: Operands) -> TpuConfig:
    if problem.config is not None:
        return problem.config
    query, key, reads = operands.query, operands.key, problem.schedule or operands.selection
    assert reads is not None  # one of the two says what is read
    shapes = reads, query.shape[2], key.shape[2], query.shape[1], key.shape[1]
    config = choose_config(*shapes)
    # Fewer heads in a tile are fewer tiles for each, whose slices take less scalar memory.
    for heads in reversed(allowed_heads_per_tile(*shapes[:3])):
        config = choose_config(*shapes, heads)
        if problem.schedule is None or _too_much(*_memory(schedule_tables(problem.schedule, config), operands)) is None:
            break
    return config


def forward_tables(problem: Problem, operands: Operands) -> ForwardTables | None:
    """What the kernel walks, and what it does not read; None for a selection."""
    schedule = problem.schedule
    if schedule is None:
        return None
    walked = schedule_tables(schedule, _config(problem, operands))
    if depends_on_arrays(problem, operands):
        return ForwardTables(walked, None, xla.backward_tables(dataclasses.replace(problem, config=None), operands))
    return ForwardTables(walked, unread_keys(schedule), None)


def backward_tables(problem: Problem, operands: Operands) -> typing.Any:
    """What the kernels of the gradients walk; None for a selection. XLA's tables where they cannot do it."""
    queries = forward_tables(problem, operands)
    if problem.schedule is None or queries is None:
        return None
    try:
        keys = kv_tables(problem.schedule, _kv_grad_config(problem, operands))
        reason = _too_much_backward(*_memory(keys.walked, operands), operands)
    except NotImplementedError as told:
        keys, reason = None, str(told)
    if keys is None or reason is not None:
        LOG.info("mosaic_tpu leaves the gradients to xla: %s", reason)
        return xla.backward_tables(dataclasses.replace(problem, config=None), operands)
    return BackwardTables(queries, keys)


def _too_much_backward(scalars: int, mask_bits: int, operands: Operands) -> str | None:
    """Why the kernel of the keys' gradients cannot do it: it has lse and delta of all heads of a group at hand."""
    length, num_heads = operands.query.shape[1:3]
    of_queries = 8 * length * num_heads // operands.key.shape[2]
    if of_queries > 4 * RESIDENT_BYTES:
        return f"lse and delta of a group need {of_queries} bytes of vector memory, of {4 * RESIDENT_BYTES}"
    return _too_much(scalars, mask_bits)


def _selection_too_large(operands: Operands, selection: BlockSelection, config: KVGradConfig) -> bool:
    """Whether the transpose of a selection does not fit into scalar memory."""
    batch_heads, num_rows, most = selection.kv_blocks.shape[1:]
    head_passes = max(1, batch_heads // operands.key.shape[2])
    entries = num_rows * most * (selection.query_block // config.chunk_size(selection.query_block))
    scalars = 4 * head_passes * (entries + 3 * -(-operands.key.shape[1] // config.block_kv))
    return _too_much_backward(scalars, 0, operands) is not None


def _kv_grad_config(problem: Problem, operands: Operands) -> KVGradConfig:
    query, key, reads = operands.query, operands.key, problem.schedule or operands.selection
    assert reads is not None  # one of the two says what is read
    return choose_kv_grad_config(reads, query.shape[2], key.shape[2], query.shape[1], key.shape[1])


def table_specs(tables: typing.Any, sharding: Sharding) -> typing.Any:
    """How the tables are split over a mesh: slices and the choice of a list with their heads, all else not at all."""
    if isinstance(tables, BackwardTables):
        keys = KVTables(_split(tables.keys.walked, sharding), typing.cast(typing.Any, sharding.of(heads=0, ndim=3)))
        return BackwardTables(table_specs(tables.queries, sharding), keys)
    if not isinstance(tables, ForwardTables):
        return xla.table_specs(tables, sharding)
    unread = None if tables.unread is None else sharding.of(heads=0, ndim=2)
    walks = None if tables.walks is None else xla.table_specs(tables.walks, sharding)
    return ForwardTables(_split(tables.walked, sharding), typing.cast(typing.Any, unread), walks)


def _split(walked: Tables, sharding: Sharding) -> typing.Any:
    whole: typing.Any = jax.tree.map(lambda array: PartitionSpec(), walked)
    return dataclasses.replace(whole, lists=sharding.of(heads=1, ndim=2), ranges=sharding.of(heads=1, ndim=5))


def forward(problem: Problem, operands: Operands) -> tuple[Array, Array]:
    """out [b, t, h, e] in the query's dtype and lse [b, h, t] in float32, sinks included."""
    return over_sequences(functools.partial(_forward, problem))(operands)


def _forward(problem: Problem, operands: Operands) -> tuple[Array, Array]:
    config = _config(problem, operands)

    def run(operands: Operands) -> tuple[Array, Array]:
        walked = _walked(operands, operands.tables, config)
        spec, inputs, grid = arrange(problem, operands, walked, config)
        out, lse = forward_kernel(spec, inputs)
        out = grid.unpad(out.swapaxes(1, 2), 1)[..., : operands.value.shape[3]]
        return out, rows_back(grid, lse, config.heads_per_tile)

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
    kv_grad_config, selection = _kv_grad_config(problem, operands), operands.selection
    too_large = selection is not None and _selection_too_large(operands, selection, kv_grad_config)
    if too_large or not (tables is None or isinstance(tables, BackwardTables)):
        return xla.backward(dataclasses.replace(problem, config=None), operands, dout, lse, delta)
    # Queries that do not exist seem to read, too: what nobody else reads must not be a NaN.
    run = functools.partial(_gradients, problem, dout, lse, delta, None if tables is None else tables.keys)
    operands = dataclasses.replace(operands, tables=None if tables is None else tables.queries)
    return _zero_unread_keys(problem, operands, ("key", "value"), run)


def _gradients(
    problem: Problem, dout: Array, lse: Array, delta: Array, kv_tiles: KVTables | None, operands: Operands
) -> tuple[Array, Array, Array]:
    config, kv_grad_config, over_keys = _config(problem, operands), _kv_grad_config(problem, operands), operands.tables
    key, value, of_rows = operands.key, operands.value, (dout, lse, delta)
    spec, inputs, grid = prepare_query_grad_inputs(
        problem, operands, *of_rows, _walked(operands, over_keys, config), config
    )
    dquery = grid.unpad(dq_kernel(spec, inputs).swapaxes(1, 2), 1)[..., : operands.query.shape[3]]
    if kv_tiles is None:
        assert operands.selection is not None  # all else has tables
        kv_tiles = selection_kv_tables(operands, operands.selection, kv_grad_config)
    spec, inputs = prepare_kv_grad_inputs(problem, operands, *of_rows, kv_tiles, kv_grad_config)
    reads = problem.schedule or operands.selection
    assert reads is not None  # one of the two says what is read
    members = jnp.asarray(kv_tiles.members)
    dkey, dvalue = (
        scatter_kv_tiles(each, members, reads.block_size, key.shape[1]) for each in dkv_kernel(spec, inputs)
    )
    return dquery, dkey[..., : key.shape[3]], dvalue[..., : value.shape[3]]


def _walked(operands: Operands, tables: ForwardTables | None, config: TpuConfig) -> Tables:
    if tables is not None:
        return tables.walked
    assert operands.selection is not None  # all else has tables
    return selection_tables(operands, operands.selection, config)


def _zero_unread_keys(problem: Problem, operands: Operands, names: tuple[str, ...], run: typing.Callable) -> typing.Any:
    tables: ForwardTables | None = operands.tables
    if tables is None:
        return zero_unread_keys(problem, operands, names, None, None, run)
    unread = None if tables.unread is None else jnp.asarray(tables.unread)
    return zero_unread_keys(problem, operands, names, unread, tables.walks, run)
