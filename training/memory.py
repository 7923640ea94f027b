"""Memory: a model or a batch that cannot fit is refused before anything is compiled or a machine begins to swap."""

from __future__ import annotations

import os

import jax
from jax.sharding import Mesh

import models
from s2jax.messages import counted
from training.config import Config, require


def check_memory(config: Config, mesh: Mesh) -> None:
    """Compares the least that a training step holds with the memory of a device.

    That is weights, gradients and one moment in float32; and of each token the row's five numbers, its embedding, and
    the logits. What activations add depends on --remat and is not counted.

    Raises:
        ValueError: it does not fit.
    """
    room = device_memory()
    count = models.param_count(config.model.transformer())
    state = 12 * count / (mesh.shape["fsdp"] * mesh.shape["tensor"])
    fits = state <= room
    require(
        fits,
        "--preset, --num-layers, --d-model",
        f"a model that can be trained in {_gigabytes(room)} a device",
        f"one of {count:,} parameters, which takes {_gigabytes(state)} on each: fewer, or more devices",
    )
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    tokens = config.input.batch_size // (groups * config.optimizer.accumulate) * config.input.seq_len
    numbers = 5 + config.model.d_model + config.model.vocab_size / mesh.shape["tensor"]
    require(
        state + 4 * tokens * numbers <= room,
        "--seq-len, --batch-size",
        f"rows that fit into {_gigabytes(room)} a device beside the model's {_gigabytes(state)}",
        f"{counted(tokens, 'token')} at once on each, for {_gigabytes(4 * tokens * numbers)}: fewer, or --accumulate",
    )


def device_memory() -> float:
    """Bytes of one device: its own, or for a CPU its part of the machine's."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
