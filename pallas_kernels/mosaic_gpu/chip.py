"""What is lowered for: which GPU, and whether its compiler can be trusted."""

import jax
from jax._src.lib import cuda_versions

HOPPER = 9.0


def unsupported_chip_reason() -> str | None:
    """Why the kernels cannot run on the GPU that is lowered for; None where they can, or where no GPU is known.

    The GPU is that of the abstract mesh that is set, else the first of this machine. Without any, Hopper is taken for
    granted: whoever lowers on a machine with no GPU lowers for another.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        try:
            device = jax.devices("cuda")[0]
        except RuntimeError:
            return None
    reason = unsupported_device_reason(device)
    if reason is not None:
        return reason
    version = cuda_versions.cuda_runtime_get_version() if cuda_versions is not None else None
    if version is not None and 12080 <= version < 12091:
        # The version tells no patch, so that 12.9.1, which is sound, cannot be told from 12.9.0.
        return f"CUDA 12.8.0 to 12.9.0 miscompile masks, got {version // 1000}.{version % 1000 // 10}; take 13"
    return None


def unsupported_device_reason(device) -> str | None:
    """Why the kernels cannot run on a device; None where they can, or where its compute capability is not known."""
    capability = float(getattr(device, "compute_capability", HOPPER))
    if int(capability) != int(HOPPER):
        return f"needs a Hopper GPU, compute capability {HOPPER}, got {device.device_kind}, {capability}"
    return None
