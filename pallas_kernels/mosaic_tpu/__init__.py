"""Block-sparse attention on TPUs, in Pallas Mosaic."""

import typing

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.mosaic import MosaicBackend
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
from pallas_kernels.mosaic_tpu.entries import (
    EntryLists,
    KVTables,
    kv_tables,
    q_tables,
    selection_kv_tables,
    selection_q_tables,
)
from pallas_kernels.mosaic_tpu.forward import forward_kernel
from pallas_kernels.mosaic_tpu.inputs import (
    from_kv_tiles,
    from_rows,
    prepare_inputs,
    prepare_kv_grad_inputs,
    prepare_query_grad_inputs,
)
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection

SCALAR_BYTES = 384 << 10
"""Scalar memory for one head's lists and ranges; the next head's are copied meanwhile."""

RESIDENT_BYTES = 8 << 20
"""Vector memory for what stays there: masks, and in the kernel of dk and dv the lse and delta of queries."""


class TpuBackend(MosaicBackend):
    """TPUs since v4."""

    name, platform, config_type = "mosaic_tpu", "tpu", TpuConfig
    dtypes = ("bfloat16", "float32")

    def unsupported_device_reason(self, device) -> str | None:
        return None

    def _unsupported_blocks_reason(self, problem: Problem, operands: Operands) -> str | None:
        schedule, query = operands.schedule, operands.query
        block_size, query_block = schedule.block_size, schedule.query_block
        if not MIN_ROWS <= block_size <= MAX_ROWS or not _is_power_of_two(block_size):
            return f"needs a block size that is a power of two from {MIN_ROWS} to {MAX_ROWS}, got {block_size}"
        if query_block < MIN_ROWS or not _is_power_of_two(query_block):
            return f"needs query blocks of a power of two from {MIN_ROWS}, got {query_block}"
        selected = isinstance(schedule, BlockSelection)
        if selected and not schedule.kv_blocks.shape[3]:
            return "needs room for one block in every row of a selection"
        config = _config(problem, operands)
        heads = allowed_heads_per_tile(schedule, query.shape[2], operands.key.shape[2])
        if config.heads_per_tile not in heads:
            return f"a tile can have {' or '.join(map(str, heads))} heads here, got {config.heads_per_tile}"
        if config.block_q < (MIN_ROWS if selected else block_size) or (selected and query_block % config.block_q):
            return f"a tile of {config.block_q} queries does not fit blocks of them"
        if selected:
            entries = int(np.prod(schedule.kv_blocks.shape[2:])) * (block_size // config.chunk_size(block_size))
            return _too_much(4 * entries + 12 * -(-query.shape[1] // config.block_q), 0)
        try:
            tables = q_tables(schedule, config)
        except NotImplementedError as reason:
            return str(reason)
        return _too_much(*_memory(tables, operands))

    def _unsupported_gradient_reason(self, problem: Problem, operands: Operands) -> str | None:
        """The kernel of dk and dv holds lse and delta of all heads of a group, and one head's lists."""
        schedule, config = operands.schedule, _kv_grad_config(operands)
        length, num_heads = operands.query.shape[1:3]
        of_queries = 8 * length * num_heads // operands.key.shape[2]
        if of_queries > 4 * RESIDENT_BYTES:
            return f"lse and delta of a group need {of_queries} bytes of vector memory, of {4 * RESIDENT_BYTES}"
        if isinstance(schedule, BlockSelection):
            lists, num_rows, most = schedule.kv_blocks.shape[1:]
            head_passes = max(1, lists // operands.key.shape[2])
            entries = num_rows * most * (schedule.query_block // config.chunk_size(schedule.query_block))
            return _too_much(4 * head_passes * (entries + 3 * -(-operands.key.shape[1] // config.block_kv)), 0)
        try:
            tables = kv_tables(schedule, config)
        except NotImplementedError as reason:
            return str(reason)
        return _too_much(*_memory(tables.queries, operands))

    def _q_tables(self, problem: Problem, operands: Operands, schedule: BlockSchedule, *, backward: bool) -> EntryLists:
        return q_tables(schedule, _config(problem, operands))

    def _kv_tables(self, problem: Problem, operands: Operands, schedule: BlockSchedule) -> KVTables:
        return kv_tables(schedule, _kv_grad_config(operands))

    def _kernel_specs(self, tables, sharding) -> dict:
        if isinstance(tables, KVTables):
            return {"queries": self._specs(tables.queries, sharding), "members": sharding.of(heads=0, ndim=3)}
        return {"list_ids": sharding.of(heads=1, ndim=2), "ranges": sharding.of(heads=1, ndim=tables.ranges.ndim)}

    def _run_forward(self, problem: Problem, operands: Operands) -> tuple[Array, Array]:
        config = _config(problem, operands)
        tables = operands.tables or selection_q_tables(operands, config)
        spec, inputs, grid = prepare_inputs(problem, operands, tables, config)
        out, lse = forward_kernel(spec, inputs)
        out = grid.unpad(out.swapaxes(1, 2), 1)[..., : operands.value.shape[3]]
        return out, from_rows(grid, lse, config.heads_per_tile)

    def _run_backward(
        self, problem: Problem, operands: Operands, kv_tables: typing.Any, dout: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        config, key, value = _config(problem, operands), operands.key, operands.value
        tables = operands.tables or selection_q_tables(operands, config)
        spec, inputs, grid = prepare_query_grad_inputs(problem, operands, dout, lse, delta, tables, config)
        dquery = grid.unpad(dq_kernel(spec, inputs).swapaxes(1, 2), 1)[..., : operands.query.shape[3]]
        config = _kv_grad_config(operands)
        kv_tables = kv_tables or selection_kv_tables(operands, config)
        spec, inputs = prepare_kv_grad_inputs(problem, operands, dout, lse, delta, kv_tables, config)
        members, size = jnp.asarray(kv_tables.members), operands.schedule.block_size
        dkey, dvalue = (from_kv_tiles(each, members, size, key.shape[1]) for each in dkv_kernel(spec, inputs))
        return dquery, dkey[..., : key.shape[3]], dvalue[..., : value.shape[3]]


TPU = TpuBackend()


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _memory(tables: EntryLists, operands: Operands) -> tuple[int, int]:
    """Bytes of scalar memory for one head, and of vector memory for masks."""
    *passes, ranges, _ = tables.ranges.shape[2:]
    # Segments cut every range of full entries into three.
    cut = ranges + 2 * tables.num_full_ranges if operands.query_segment_ids is not None else ranges
    mask_bytes = 0 if tables.mask_bits is None else tables.mask_bits.nbytes
    return 4 * (tables.entries.shape[1] + int(np.prod(passes)) * (2 * cut + 1)), mask_bytes


def _too_much(scalar_bytes: int, mask_bytes: int) -> str | None:
    if scalar_bytes > SCALAR_BYTES:
        return f"the lists of a head need {scalar_bytes} bytes of scalar memory, of {SCALAR_BYTES}"
    if mask_bytes > RESIDENT_BYTES:
        return f"the masks need {mask_bytes} bytes of vector memory, of {RESIDENT_BYTES}"
    return None


def _config(problem: Problem, operands: Operands) -> TpuConfig:
    if problem.config is not None:
        return problem.config
    schedule, query, key = operands.schedule, operands.query, operands.key
    shapes = schedule, query.shape[2], key.shape[2], query.shape[1], key.shape[1]
    config = choose_config(*shapes)
    # Fewer heads in a tile are fewer tiles for each, whose ranges take less scalar memory.
    for heads in reversed(allowed_heads_per_tile(*shapes[:3])):
        config = choose_config(*shapes, heads)
        if isinstance(schedule, BlockSelection):
            break
        if _too_much(*_memory(q_tables(schedule, config), operands)) is None:
            break
    return config


def _kv_grad_config(operands: Operands) -> KVGradConfig:
    query, key = operands.query, operands.key
    return choose_kv_grad_config(operands.schedule, query.shape[2], key.shape[2], query.shape[1], key.shape[1])
