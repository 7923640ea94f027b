"""Block-sparse attention kernels for JAX, usable on their own: no dependency but jax, numpy and jaxtyping."""

from pallas_kernels.mosaic_gpu.sm90.config import HopperConfig
from pallas_kernels.mosaic_tpu.config import TpuConfig
from pallas_kernels.op import block_sparse_attention
from pallas_kernels.schedule import BlockLists, BlockSchedule
from pallas_kernels.selection import BlockSelection
from pallas_kernels.xla import XlaConfig

__all__ = [
    "BlockLists",
    "BlockSchedule",
    "BlockSelection",
    "HopperConfig",
    "TpuConfig",
    "XlaConfig",
    "block_sparse_attention",
]
