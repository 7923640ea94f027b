"""Metrics of a run while it goes: metrics.jsonl, a line of progress, speed against the device's peak, the loss plot."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from pathlib import Path

import jax
import matplotlib.figure

from training.files import write_whole
from training.output import on_terminal, show

# Dense bf16 matrix products, FLOP/s of one device as JAX counts devices, from the makers' data sheets. The first entry
# whose name the device's kind begins with.
PEAK_FLOPS = {
    "NVIDIA B200": 2.25e15,
    "NVIDIA GH200": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "TPU7x": 1.153e15,  # two devices to a chip
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


# What the names of held-out scores in metrics.jsonl begin with.
HELDOUT = "heldout_bits_per_"


def peak_flops(device_kind: str) -> float | None:
    """Peak bf16 FLOP/s of a device, or None where it is not known."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if device_kind.startswith(kind)), None)


def describe_speed(tokens_per_second: float, flops_per_token: float) -> str:
    """Tokens per second over all devices, and the MFU or, where no peak is known, the model FLOP/s."""
    flops = tokens_per_second * flops_per_token
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    peak = peak_flops(kind)
    if peak is None:
        no_peak = f"no MFU, for no peak is known for the device {kind}"
        return f"{tokens_per_second:,.0f} tokens/s, {_si(flops)}FLOP/s of the model ({no_peak})"
    return (
        f"{tokens_per_second:,.0f} tokens/s, MFU {flops / (peak * count):.1%} "
        f"({_si(flops)}FLOP/s of the model, {count} × {kind})"
    )


def mfu(tokens_per_second: float, flops_per_token: float) -> float | None:
    """Model FLOP/s over the peak of all devices; None where no peak is known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * jax.device_count())


def _si(value: float) -> str:
    scale, prefix = next(((s, p) for s, p in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")) if value >= s), (1, ""))
    return f"{value / scale:.3g} {prefix}"


class MetricsLog:
    """`metrics.jsonl`: one object per step, appended to. A run that goes on drops the lines beyond its first step.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, *, from_step: int):
        self.path = path
        if path.exists():
            before = path.read_bytes()
            lines = before.decode("utf-8", "replace").splitlines()
            kept = "".join(line + "\n" for line in lines if _step_of(line) <= from_step).encode()
            if kept != before:
                write_whole(path, kept)
        self._file = path.open("ab", buffering=0)

    def write(self, **record: float | int | None) -> None:
        """Adds a line; values that are None are left out.

        Raises:
            OSError: the disk is full, or the file is gone.
        """
        line = json.dumps({name: value for name, value in record.items() if value is not None}) + "\n"
        content = line.encode()
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            error.filename = str(self.path)
            raise

    def check(self) -> None:
        """Raises FileNotFoundError if the file was removed: what is appended would be lost."""
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise FileNotFoundError(f"{self.path} was removed while the run went on")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def _step_of(line: str) -> float:
    """The step of a line of metrics; a line cut short by a crash, or no such line, is beyond all."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
    return step if isinstance(step, int) else float("inf")


class Progress:
    """One line that is rewritten in place on a terminal; lines of their own elsewhere. Counts the speed."""

    def __init__(self, *, step: int, steps: int, tokens_per_step: int, shown: bool):
        self.steps, self.tokens_per_step = steps, tokens_per_step
        self.training_seconds = 0.0
        self.trained_steps = 0
        self._shown, self._in_place = shown, on_terminal()
        self._step, self._time = step, time.perf_counter()

    def restart_clock(self) -> None:
        """Leaves out of the speed what was just spent on something else."""
        self._time = time.perf_counter()

    def advance(self, step: int, loss: float) -> float:
        """Shows the state after `step`; returns the tokens per second since the last call."""
        now = time.perf_counter()
        seconds, done = now - self._time, step - self._step
        self.training_seconds, self.trained_steps = self.training_seconds + seconds, self.trained_steps + done
        self._step, self._time = step, now
        speed = done * self.tokens_per_step / max(seconds, 1e-9)
        left = (self.steps - step) * self.training_seconds / max(self.trained_steps, 1)
        line = f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {loss:.4f}  {speed:,.0f} tokens/s  "
        self._show(line + f"{_clock(left)} left")
        return speed

    def tokens_per_second(self) -> float:
        """Mean speed of all steps shown."""
        return self.trained_steps * self.tokens_per_step / max(self.training_seconds, 1e-9)

    def _show(self, line: str) -> None:
        if self._shown:
            show(f"\r{line}\033[K" if self._in_place else line, end="" if self._in_place else "\n")

    def note(self, line: str) -> None:
        """Shows a line that stays."""
        self._show(line)
        self.finish()

    def finish(self) -> None:
        """Leaves the line standing."""
        if self._shown and self._in_place:
            show("")


class Countdown:
    """A line that counts what is done of something that takes a while; on a terminal in place, elsewhere now and then.

    Args:
        title: what is counted, such as "Evaluating".
        shown: False shows nothing.
    """

    def __init__(self, title: str, *, shown: bool):
        self._title, self._shown, self._in_place = title, shown, on_terminal()
        self._begin = self._last = time.perf_counter()
        self._every = 0.2 if self._in_place else 10.0
        self._open = False

    def __call__(self, done: int, total: int) -> None:
        """Shows `done` of `total`, if the last time is long enough ago."""
        now = time.perf_counter()
        if not self._shown or now - self._last < self._every:
            return
        left = (now - self._begin) * (total - done) / max(done, 1)
        line = f"{self._title}  {done} of {total}  {_clock(left)} left"
        show(f"\r{line}\033[K" if self._in_place else line, end="" if self._in_place else "\n")
        self._last, self._open = now, self._in_place

    def finish(self) -> None:
        """Clears the line on a terminal."""
        if self._open:
            show("\r\033[K", end="")
            self._open = False


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def plot_loss(metrics: Path, picture: Path, *, unit: str, scale: float) -> None:
    """Draws the loss of `metrics.jsonl` over the steps, each step and a running mean, as a PNG.

    Args:
        metrics: what `MetricsLog` wrote.
        picture: path of the PNG.
        unit: unit of the plotted losses.
        scale: factor from the losses in nats to `unit`.
    """
    records = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    trained = [(record["step"], record["loss"] * scale) for record in records if "loss" in record]
    heldout = [(record["step"], value) for record in records for name, value in record.items() if HELDOUT in name]
    steps, losses = ([pair[i] for pair in trained] for i in (0, 1))
    decay = 1 - 1 / max(len(losses) // 30, 1)
    smooth: list[float] = []
    total = weight = 0.0  # divided, so that the mean does not begin at the first loss
    for loss in losses:
        total, weight = decay * total + loss, decay * weight + 1
        smooth.append(total / weight)
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    axes.plot(steps, smooth, color="tab:blue", linewidth=2, label="running mean")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), color="tab:orange", marker="o", markersize=3, label="held out")
    axes.set(xlabel="step", ylabel=f"loss, {unit}")
    axes.grid(alpha=0.3)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    write_whole(picture, content.getvalue())
