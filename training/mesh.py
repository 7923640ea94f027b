"""Devices: joining a cluster, the mesh (data, fsdp, tensor), and the sharding of the batch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.sharding import BATCH_AXES
from s2jax.messages import counted
from training.config import IMPLEMENTATIONS, Config, require
from training.output import show
from training.rendezvous import meet

AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = PartitionSpec(BATCH_AXES)  # each row whole

# A process that is gone is noticed after the first, in seconds; one that ends in an error takes the others with it
# after the second. Shorter ones mistake a slow file system for a death.
_HEARTBEAT_TIMEOUT, _SHUTDOWN_TIMEOUT = 30, 30


def join_cluster(config: Config) -> None:
    """Makes this process one of a cluster, before anything touches a device.

    Raises:
        ValueError: the flags make no cluster, none was recognised, or not all of its processes came in time.
    """
    options = config.devices
    if not options.distributed:
        return
    if options.coordinator is None:
        show(f"Waiting for the cluster that the environment describes; giving up after {options.join_timeout} s")
    else:
        assert options.num_processes is not None
        assert options.process_id is not None
        fits = options.process_id < options.num_processes
        require(fits, "--process-id", f"one below --num-processes {options.num_processes}", options.process_id)
        meet(
            options.coordinator,
            options.num_processes,
            options.process_id,
            _run_identity(config),
            timeout=options.join_timeout,
            say=show,
        )
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.num_processes,
            options.process_id,
            initialization_timeout=options.join_timeout,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: expected a cluster that JAX recognises, or --coordinator, --num-processes and "
            f"--process-id; got: {error}"
        ) from error


def _run_identity(config: Config) -> str:
    """A digest of all flags that the processes of a run share; paths of data may differ between machines."""
    values = json.loads(config.to_json()) | {"data": None, "pretrained": None}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def make_mesh(config: Config) -> Mesh:
    """The mesh that --mesh describes, over all devices of all processes.

    Raises:
        ValueError: it does not match the devices, the heads do not divide over it, or --implementation is for others.
    """
    implementation, here = config.model.implementation, jax.devices()[0].platform
    needed = IMPLEMENTATIONS.get(implementation)
    expected = f"auto, or one for the platform {here} of this machine's devices"
    require(needed in (None, here), "--implementation", expected, f"{implementation}, which is for {needed}")
    sizes, devices = list(config.devices.mesh), jax.device_count()
    named = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        fits = devices % named == 0
        require(fits, "--mesh", f"counts whose product divides {counted(devices, 'device')}", f"{named} beside the -1")
        sizes[sizes.index(-1)] = devices // named
    shown = " × ".join(map(str, sizes))
    asked = math.prod(sizes)
    require(asked == devices, "--mesh", f"counts for {counted(devices, 'device')}", f"{shown} = {asked}")
    heads, tensor = config.model.num_kv_heads, sizes[2]
    require(heads % tensor == 0, "--mesh", f"a tensor axis that divides {counted(heads, 'KV head')}", tensor)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Explicit,) * 3)


def with_batch_size(config: Config, mesh: Mesh) -> Config:
    """The config with a --batch-size of 0 filled in.

    Raises:
        ValueError: the batch does not divide over the mesh.
    """
    groups, parts = mesh.shape["data"] * mesh.shape["fsdp"], config.optimizer.accumulate
    rows = config.input.batch_size or groups * parts
    expected = f"a multiple of data × fsdp × --accumulate = {mesh.shape['data']} × {mesh.shape['fsdp']} × {parts}"
    require(rows % (groups * parts) == 0, "--batch-size", expected, rows)
    return dataclasses.replace(config, input=dataclasses.replace(config.input, batch_size=rows))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch `[b, t]`."""
    return NamedSharding(mesh, BATCH_SPEC)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a scalar."""
    return NamedSharding(mesh, PartitionSpec())
