"""What is told of the machine: the GPU, its clocks and power, versions."""

import importlib.metadata
import os
import shutil
import subprocess

import jax

FIELDS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit",
          "temperature.gpu", "pstate", "memory.total")  # fmt: skip
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "nvidia-cuda-nvcc", "tokamax", "torch", "triton")

MOST_PER_SECOND = 1.0e15
"""More bfloat16 operations a second than a Hopper GPU has."""

ENVIRONMENT = {
    # PyTorch wants some of the memory too.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.70",
    # Kernels one by one, not as a CUDA graph, are sure to be seen by CUPTI.
    "XLA_FLAGS": "--xla_gpu_enable_command_buffer=",
}


def set_environment() -> None:
    """Before JAX looks for devices; what the caller has set stands, and flags are added to."""
    for name, value in ENVIRONMENT.items():
        if name == "XLA_FLAGS" and os.environ.get(name):
            value = f"{value} {os.environ[name]}"
        elif name in os.environ:
            continue
        os.environ[name] = value


def leave_alone() -> None:
    """This process does not touch the GPU: others do that for it."""
    jax.config.update("jax_platforms", "cpu")


def has_gpu() -> bool:
    return os.environ.get("JAX_PLATFORMS", "cuda").startswith("cuda") and shutil.which("nvidia-smi") is not None


def state() -> dict[str, str]:
    """By nvidia-smi, of the first GPU; empty where there is none, or where a hanging one does not answer."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.splitlines()
    except subprocess.TimeoutExpired:
        return {}
    return dict(zip(FIELDS, (value.strip() for value in told[0].split(",")), strict=False)) if told else {}


def describe() -> dict:
    """The GPU and the versions, once for a file."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    platform = jax.devices()[0].client.platform_version
    return {"gpu": state(), "versions": versions, "platform": platform, "environment": environment}


def free_bytes() -> int | None:
    """What JAX may still allocate; None where it does not say."""
    stats = jax.devices()[0].memory_stats()
    return int(stats["bytes_limit"] - stats["bytes_in_use"]) if stats and "bytes_limit" in stats else None
