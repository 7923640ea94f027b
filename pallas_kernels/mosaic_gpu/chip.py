"""GPU generations, and CUDA versions that miscompile the kernels."""

from jax._src.lib import cuda_versions


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
