"""Device time: the time that the GPU is busy with a call, whichever library launches it.

CUPTI sees every kernel of the process, JAX's and PyTorch's alike, by the GPU's own clock. Its weakness: copies and the
gaps between kernels are missing, and kernels that run side by side count twice. The host's time is recorded too.

Without a believable CUPTI the host's clock is taken: calls are queued, and each further call adds its device time, as
long as the GPU is slower than the host.
"""

import dataclasses
import importlib
import statistics
import time
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.gpu.errors import EXPECTED, LeftOut, NoDeviceTime, one_line

Call = Callable[[], typing.Any]
"""Launches a computation and returns what `Wait` waits for."""

Wait = Callable[[typing.Any], typing.Any]

MAX_TFLOPS = 1000
"""A rate above that of any Hopper GPU in bfloat16."""

MAX_MS = 2000
"""Calls that take longer are not timed."""

SAMPLE_MS = 30
"""Target duration of a sample's calls, of which there are twenty at most."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Milliseconds of one call, the mean of `calls`, on the device and on the host; and a call's kernels, if known."""

    device_ms: float
    host_ms: float
    calls: int
    kernels: int | None


class Cupti:
    """The sum of the kernels' durations, by the CUPTI reader of JAX's CUDA plugin."""

    name = "cupti"

    def __init__(self, reader: typing.Any = None):
        self._reader = reader or importlib.import_module("jax_cuda13_plugin._mosaic_gpu_ext")
        if not hasattr(self._reader, "_cupti_init"):
            raise NoDeviceTime("the CUDA plugin has no CUPTI reader")

    def measure(self, call: Call, wait: Wait, calls: int) -> Sample:
        self._reader._cupti_init()
        try:
            host_ms = _milliseconds(call, wait, calls)
        finally:
            timings = self._reader._cupti_get_timings(False)
        if not timings or len(timings) % calls:
            raise NoDeviceTime(f"CUPTI saw {len(timings)} kernels in {calls} equal calls")
        busy_ms = sum(milliseconds for _, milliseconds in timings)
        if not 0 < busy_ms <= 1.05 * host_ms:
            raise NoDeviceTime(f"CUPTI says {busy_ms:.3f} ms for calls that took {host_ms:.3f} ms")
        return Sample(busy_ms / calls, host_ms / calls, calls, len(timings) // calls)


class QueuedCalls:
    """The host's time for each further call when calls are queued one behind the other."""

    name = "queued calls, host clock"

    def measure(self, call: Call, wait: Wait, calls: int) -> Sample:
        one, many = _milliseconds(call, wait, 1), _milliseconds(call, wait, 1 + calls)
        if many <= one:
            raise NoDeviceTime(f"{1 + calls} calls took {many:.3f} ms, one {one:.3f} ms")
        return Sample((many - one) / calls, one, calls, None)


Clock = Cupti | QueuedCalls


def _milliseconds(call: Call, wait: Wait, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    wait(result)
    return (time.perf_counter() - start) * 1e3


def matrix_product(size: int = 8192) -> tuple[Call, Wait, float]:
    """A known computation to try clocks with: its call, how to wait for it, and its operations."""
    first, second = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    return lambda: product(first, second), jax.block_until_ready, 2.0 * size**3


def choose_clock(call: Call, wait: Wait, operations: float) -> tuple[Clock, dict[str, str]]:
    """The first clock that times a known computation believably, and the evidence for or against each.

    Args:
      operations: floating-point operations of the call.
    """
    evidence = {}
    for make in (Cupti, QueuedCalls):
        try:
            clock, samples = make(), []
            for calls in (3, 5, 2):
                wait(call())  # a clock must not count this call
                samples.append(clock.measure(call, wait, calls))
            rate = operations / statistics.median(sample.device_ms for sample in samples) / 1e9
            kernels = {sample.kernels for sample in samples}
            evidence[make.name] = f"a matrix product at {rate:.0f} TFLOP/s, kernels: {kernels}"
            if rate < MAX_TFLOPS and len(kernels) == 1:
                return clock, evidence
        except EXPECTED as error:
            evidence[make.name] = one_line(error)
    raise NoDeviceTime("; ".join(f"{name}: {reason}" for name, reason in evidence.items()))


@dataclasses.dataclass
class Timing:
    """The samples of one call so far, and why others were rejected."""

    call: Call
    wait: Wait
    calls: int = 1
    samples: list[Sample] = dataclasses.field(default_factory=list)
    rejected: list[str] = dataclasses.field(default_factory=list)

    def warm_up(self) -> None:
        """Runs uncounted, and chooses the number of calls of a sample."""
        _milliseconds(self.call, self.wait, 1)  # loads code
        milliseconds = _milliseconds(self.call, self.wait, 1)
        if milliseconds > MAX_MS:
            raise LeftOut(f"a call takes {milliseconds / 1e3:.1f} s, above the limit of {MAX_MS / 1e3:g} s")
        self.calls = max(1, min(20, int(SAMPLE_MS / milliseconds)))

    def sample(self, clock: Clock) -> None:
        self.wait(self.call())  # the GPU's clock may still be low after a pause
        try:
            self.samples.append(clock.measure(self.call, self.wait, self.calls))
        except NoDeviceTime as reason:
            self.rejected.append(str(reason))

    def figures(self) -> dict:
        """Entries of a results row."""
        if not self.samples:
            return {"failed": "; ".join(self.rejected) or "not sampled"}
        device = [sample.device_ms for sample in self.samples]
        return {
            "ms": statistics.median(device),
            "min ms": min(device),
            "max ms": max(device),
            "host ms": statistics.median(sample.host_ms for sample in self.samples),
            "calls": [sample.calls for sample in self.samples],
            "kernels": self.samples[-1].kernels,
            "rejected": self.rejected,
        }
