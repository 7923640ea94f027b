"""How long the GPU is busy with a call, whichever library launches it.

CUPTI sees every kernel of the process, JAX's and PyTorch's alike, with the GPU's own clock. Its weakness: only kernels
count, so copies and the gaps between kernels are missing (a loop that waits for the host looks better than it is), and
kernels that run side by side count twice. So the host's time for the same call is recorded beside it.

Where CUPTI cannot be had or is caught lying, the host's clock must do: calls are queued one behind the other, and what
each one more takes is the time of a call, as long as the GPU is slower than the host.
"""

import dataclasses
import statistics
import time
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.gpu.attempt import NoDeviceTime, attempt

Call = Callable[[], typing.Any]
"""Launches a computation and returns what `wait` waits for."""

Wait = Callable[[typing.Any], typing.Any]


LONG_MS = 300
"""Calls that take longer are not run more often than needed."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Milliseconds of one call, the mean of `calls`: of the GPU, and of the host; and a call's kernels, if known."""

    device_ms: float
    host_ms: float
    calls: int
    kernels: int | None


class Cupti:
    """The sum of the kernels' durations, by jaxlib's own CUPTI reader."""

    name = "cupti"

    def __init__(self, reader: typing.Any = None):
        if reader is None:
            from jax._src.lib import mosaic_gpu

            # Absent where jaxlib has no CUDA plugin.
            reader = getattr(mosaic_gpu, "_mosaic_gpu_ext", None)
        if not hasattr(reader, "_cupti_init"):
            raise NoDeviceTime("jaxlib has no CUPTI reader here")
        self._reader = reader

    def measure(self, call: Call, wait: Wait, calls: int) -> Sample:
        self._reader._cupti_init()
        try:
            start = time.perf_counter()
            for _ in range(calls):
                result = call()
            wait(result)
            host_ms = (time.perf_counter() - start) * 1e3
        finally:
            timings = self._reader._cupti_get_timings(False)
        if not timings:
            raise NoDeviceTime("CUPTI saw no kernel")
        if len(timings) % calls:
            raise NoDeviceTime(f"CUPTI saw {len(timings)} kernels in {calls} equal calls")
        busy_ms = sum(milliseconds for _, milliseconds in timings)
        if not 0 < busy_ms <= 1.05 * host_ms:
            raise NoDeviceTime(f"CUPTI says {busy_ms:.3f} ms of calls that took {host_ms:.3f} ms")
        return Sample(busy_ms / calls, host_ms / calls, calls, len(timings) // calls)


class Queued:
    """What one more call takes on the host's clock when calls are queued one behind the other."""

    name = "queued calls, host clock"

    def measure(self, call: Call, wait: Wait, calls: int) -> Sample:
        one, many = self._seconds(call, wait, 1), self._seconds(call, wait, 1 + calls)
        if many <= one:
            raise NoDeviceTime(f"{1 + calls} calls took {many:.6f} s, one {one:.6f} s")
        return Sample((many - one) * 1e3 / calls, one * 1e3, calls, None)

    def _seconds(self, call: Call, wait: Wait, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        return time.perf_counter() - start


Clock = Cupti | Queued


def choose_clock(call: Call, wait: Wait, operations: float, most_per_second: float) -> tuple[Clock, dict]:
    """The first clock that times a known computation believably, and what became of each.

    Args:
      call: takes `operations`, at a rate of no more than `most_per_second`.
    """
    told = {}
    for make in (Cupti, Queued):
        tried, reason = attempt(lambda make=make: _checked(make(), call, wait, operations, most_per_second))
        if tried is None:
            told[make.name] = reason
            continue
        clock, milliseconds = tried
        told[make.name] = f"a matrix product at {operations / milliseconds / 1e9:.0f} TFLOP/s"
        return clock, told
    raise NoDeviceTime("; ".join(f"{name}: {reason}" for name, reason in told.items()))


def matrix_product(size: int = 8192) -> tuple[Call, Wait, float]:
    """A known computation to try clocks with: its call, how to wait for it, and its operations."""
    first, second = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    return lambda: product(first, second), jax.block_until_ready, 2.0 * size**3


def _checked(clock: Clock, call: Call, wait: Wait, operations: float, most_per_second: float) -> tuple[Clock, float]:
    """The clock, and milliseconds of a call; raises where it counts what ran outside its measurements, or little."""
    wait(call())
    samples = []
    for calls in (3, 5, 2):
        samples.append(clock.measure(call, wait, calls))
        wait(call())
    kernels = {sample.kernels for sample in samples}
    if len(kernels) > 1:
        raise NoDeviceTime(f"the same call has {sorted(kernels, key=str)} kernels")
    milliseconds = statistics.median(sample.device_ms for sample in samples)
    if operations / milliseconds * 1e3 > most_per_second:
        raise NoDeviceTime(f"{milliseconds:.4f} ms are less than this GPU can take")
    return clock, milliseconds


@dataclasses.dataclass
class Timing:
    """The samples of one call so far."""

    call: Call
    wait: Wait
    before: Callable[[], None] = lambda: None
    calls: int = 1
    samples: list[Sample] = dataclasses.field(default_factory=list)
    failed: str | None = None
    rejected: list[str] = dataclasses.field(default_factory=list)

    def warm_up(self, burst_ms: float) -> None:
        """Runs uncounted, and chooses how many calls make a sample of about so many milliseconds."""
        self.before()
        milliseconds = self._run()
        if milliseconds < LONG_MS:
            milliseconds = self._run()  # the first one loaded code
        self.calls = max(1, min(20, int(burst_ms / milliseconds)))

    def sample(self, clock: Clock) -> None:
        self.before()
        if self.calls > 1:
            self._run()  # short calls may find the GPU's clock still low after a pause
        try:
            self.samples.append(clock.measure(self.call, self.wait, self.calls))
        except NoDeviceTime as reason:
            self.rejected.append(str(reason))

    def is_enough(self) -> bool:
        """Of long calls three samples do."""
        return len(self.samples) >= 3 and sum(each.host_ms * each.calls for each in self.samples) > 3 * LONG_MS

    def _run(self) -> float:
        start = time.perf_counter()
        self.wait(self.call())
        return (time.perf_counter() - start) * 1e3

    def row(self, name: str) -> dict:
        """The keys of a results row that begin with `name`."""
        if self.failed is not None or not self.samples:
            return {f"{name} failed": self.failed or "; ".join(self.rejected) or "not measured"}
        rejected = {f"{name} rejected": self.rejected} if self.rejected else {}
        device = [sample.device_ms for sample in self.samples]
        return {
            f"{name} ms": statistics.median(device),
            f"{name} min ms": min(device),
            f"{name} max ms": max(device),
            f"{name} host ms": statistics.median(sample.host_ms for sample in self.samples),
            f"{name} samples": len(device),
            f"{name} calls a sample": self.calls,
            f"{name} kernels": self.samples[-1].kernels,
            **rejected,
        }


def in_turn(
    timings: dict[str, Timing],
    clock: Clock,
    repeats: int,
    *,
    burst_ms: float = 30,
    pause_s: float = 0.03,
    enough: Callable[[], bool] = lambda: False,
    tried: Callable[[Callable], tuple] = attempt,
) -> None:
    """Samples all calls in turn, `repeats` rounds; one that fails drops out. Stops after a round if there is enough."""
    for timing in timings.values():
        if timing.failed is not None:
            continue
        _, timing.failed = tried(lambda timing=timing: timing.warm_up(burst_ms))
    for _ in range(repeats):
        for timing in timings.values():
            if timing.failed is None and not timing.is_enough():
                time.sleep(pause_s)
                _, timing.failed = tried(lambda timing=timing: timing.sample(clock))
        if enough():
            return


def clocked(timings: dict[str, Timing], clock: Clock, repeats: int, **more: typing.Any) -> dict[str, str]:
    """As `in_turn`, and once more by the host's clock what this one cannot see; by which clock each was timed."""
    in_turn(timings, clock, repeats, **more)
    names = dict.fromkeys(timings, clock.name)
    unread = {name: timing for name, timing in timings.items() if timing.failed is None and not timing.samples}
    if unread and clock.name != Queued.name:
        in_turn(unread, Queued(), repeats, **more)
        names |= dict.fromkeys(unread, Queued.name)
    return names
