"""State of the machine under test: the GPU's clocks, power and temperature, and the versions."""

import importlib.metadata
import os
import shutil
import subprocess

import jax

FIELDS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit",
          "temperature.gpu", "pstate")  # fmt: skip
PEERS = ("nvidia-cudnn-cu13", "tokamax", "torch", "triton")

ENVIRONMENT = {
    # PyTorch needs some of the memory too.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.70",
    # CUPTI sees kernels that are launched one by one; those of a CUDA graph may escape it.
    "XLA_FLAGS": "--xla_gpu_enable_command_buffer=",
}


def set_environment() -> None:
    """Sets the environment that JAX reads when it starts; the caller's values are kept, and flags are added to."""
    flags = f"{ENVIRONMENT['XLA_FLAGS']} {os.environ.get('XLA_FLAGS', '')}".strip()
    os.environ.update(ENVIRONMENT | dict(os.environ) | {"XLA_FLAGS": flags})


def leave_alone() -> None:
    """Keeps this process off the GPU, which other processes use."""
    jax.config.update("jax_platforms", "cpu")


def has_gpu() -> bool:
    return os.environ.get("JAX_PLATFORMS", "cuda").startswith("cuda") and shutil.which("nvidia-smi") is not None


def state() -> dict[str, str]:
    """Fields of nvidia-smi for the first GPU; empty without one, or where nvidia-smi hangs."""
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {}
    return dict(zip(FIELDS, map(str.strip, output.partition("\n")[0].split(",")), strict=False))


def describe() -> dict:
    """The GPU, the versions and the environment, once for a results file."""
    installed = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    return {
        "gpu": state(),
        "versions": {name: installed[name] for name in PEERS if name in installed},
        "environment": jax.print_environment_info(return_string=True),
    }
