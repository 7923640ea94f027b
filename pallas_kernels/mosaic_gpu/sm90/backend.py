"""The backend for NVIDIA Hopper: supported arguments and chips, choice of configs, and calls of the kernels."""

import typing

from jax._src.lib import cuda_versions
from jaxtyping import Array

from pallas_kernels.mosaic import MosaicBackend
from pallas_kernels.mosaic_gpu.sm90.config import (
    SHARED_BYTES,
    HopperConfig,
    allowed_heads_per_tile,
    choose_config,
    choose_kv_grad_config,
    choose_query_grad_config,
)
from pallas_kernels.mosaic_gpu.sm90.inputs import (
    FEATURE_MULTIPLE,
    KernelTables,
    kv_tables,
    prepare_inputs,
    prepare_kv_grad_inputs,
    prepare_query_grad_inputs,
    q_tables,
    selection_kv_tables,
    selection_q_tables,
)
from pallas_kernels.padding import round_up
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.schedule import BlockSchedule

BLOCK_SIZES = (16, 32, 64, 128)


class HopperBackend(MosaicBackend):
    """NVIDIA Hopper (compute capability 9.0): TMA copies, warpgroup matrix products."""

    name, platform, config_type = "mosaic_gpu", "cuda", HopperConfig
    dtypes = ("bfloat16", "float16")

    def unsupported_device_reason(self, device) -> str | None:
        return unsupported_gpu_reason(device, 9, "Hopper")

    def _unsupported_blocks_reason(self, problem: Problem, operands: Operands) -> str | None:
        block_size = operands.schedule.block_size
        if block_size not in BLOCK_SIZES:
            return f"needs a block size of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}"
        heads = _heads(operands)
        if not heads:
            return "needs query blocks that fill a tile of 128 rows, alone or with heads of a group that read the same"
        config = _config(problem, operands)
        if config.heads_per_tile not in heads:
            return f"a tile can have {' or '.join(map(str, heads))} heads here, got {config.heads_per_tile}"
        shared = config.shared_bytes(*_widths(operands), block_size, 3)
        return f"the tiles need {shared} bytes of shared memory, of {SHARED_BYTES}" if shared > SHARED_BYTES else None

    def _q_tables(
        self, problem: Problem, operands: Operands, schedule: BlockSchedule, *, backward: bool
    ) -> KernelTables:
        config = (_query_grad_config if backward else _config)(problem, operands)
        return q_tables(schedule, config.block_q, config.bits_per_word(schedule.block_size))

    def _kv_tables(self, problem: Problem, operands: Operands, schedule: BlockSchedule) -> KernelTables:
        return kv_tables(schedule, _kv_grad_config(operands).bits_per_word(schedule.block_size))

    def _kernel_specs(self, tables, sharding) -> dict:
        specs = {"ranges": sharding.of(heads=1, ndim=tables.ranges.ndim)}
        return specs if tables.members is None else specs | {"members": sharding.of(heads=0, ndim=3)}

    # Mosaic GPU takes a third of a second to import: only what runs a kernel does.

    def _run_forward(self, problem: Problem, operands: Operands) -> tuple[Array, Array]:
        from pallas_kernels.mosaic_gpu.sm90.forward import forward_kernel

        config = _config(problem, operands)
        tables = operands.tables or selection_q_tables(operands, config)
        spec, inputs, grid = prepare_inputs(problem, operands, tables, config)
        out, lse = forward_kernel(spec, inputs)
        return grid.unpad(out, 1)[..., : operands.value.shape[3]], grid.unpad(lse, 2)

    def _run_backward(
        self, problem: Problem, operands: Operands, kv_tables: typing.Any, dout: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        from pallas_kernels.mosaic_gpu.sm90.backward import dkv_kernel, dq_kernel

        config, (kv_length, _, head_dim) = _query_grad_config(problem, operands), operands.key.shape[1:]
        tables = operands.tables or selection_q_tables(operands, config)
        spec, inputs, grid = prepare_query_grad_inputs(problem, operands, dout, lse, delta, tables, config)
        dquery = grid.unpad(dq_kernel(spec, inputs, problem.scale), 1)[..., :head_dim]
        config = _kv_grad_config(operands)
        kv_tables = kv_tables or selection_kv_tables(operands, config.bits_per_word(operands.schedule.query_block))
        spec, inputs = prepare_kv_grad_inputs(problem, operands, dout, lse, delta, kv_tables, config)
        dkey, dvalue = dkv_kernel(spec, inputs)
        return dquery, dkey[:, :kv_length, :, :head_dim], dvalue[:, :kv_length, :, : operands.value.shape[3]]


HOPPER = HopperBackend()


def _heads(operands: Operands) -> tuple[int, ...]:
    return allowed_heads_per_tile(operands.schedule, operands.query.shape[2], operands.key.shape[2])


def _widths(operands: Operands) -> tuple[int, int]:
    """Head dims of keys and values, padded to what the tensor cores multiply at a time."""
    query, value = operands.query, operands.value
    return round_up(query.shape[-1], FEATURE_MULTIPLE), round_up(value.shape[-1], FEATURE_MULTIPLE)


def _config(problem: Problem, operands: Operands) -> HopperConfig:
    if problem.config is not None:
        return problem.config
    heads = _heads(operands)
    return choose_config(*_widths(operands), operands.schedule.block_size, operands.key.shape[1], heads[-1], heads)


def _query_grad_config(problem: Problem, operands: Operands) -> HopperConfig:
    """The config of the dq kernel, with as many heads as in the forward pass."""
    heads = _config(problem, operands).heads_per_tile
    return choose_query_grad_config(*_widths(operands), operands.schedule.block_size, operands.key.shape[1], heads)


def _kv_grad_config(operands: Operands) -> HopperConfig:
    return choose_kv_grad_config(*_widths(operands), operands.schedule.query_block, operands.query.shape[1])


def unsupported_gpu_reason(device, major: int, generation: str) -> str | None:
    """The reason why kernels of a generation cannot run on a GPU; None if they can.

    Args:
      device: None, or one without a compute capability, is taken for one of the generation: a caller that lowers
        without a GPU lowers for another machine.
      major: the generation's compute capability.
    """
    capability = float(getattr(device, "compute_capability", major))
    if int(capability) != major:
        return f"needs a {generation} GPU, compute capability {major}.0, got {device.device_kind}, {capability}"
    version = None if device is None or cuda_versions is None else cuda_versions.cuda_runtime_get_version()
    if version is not None and 12080 <= version < 12091:
        # The version has no patch number: 12.9.1, which is sound, looks like 12.9.0.
        return f"CUDA 12.8.0 to 12.9.0 miscompile masks, got {version // 1000}.{version % 1000 // 10}; take 13"
    return None
