"""The record of a run while it goes: metrics, progress, held-out scores, and the end of a run that diverges."""

from __future__ import annotations

import math
from pathlib import Path

import jax

import models
from training.cluster import agreeing
from training.config import Config
from training.metrics import HELDOUT, MetricsLog, Progress, mfu
from training.step import Metrics, Trainer
from training.trackers import Trackers


class Diverged(Exception):
    """Error of a run whose loss, gradient or state is no longer finite.

    Attributes:
        step: the first that is known to be spoiled.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Recorder:
    """Collects the metrics of steps without waiting for them, and writes them out now and then.

    Args:
        config: of the run, whose directory exists.
        trainer: of the run.
        byte_level: names the unit of the scores.
        from_step: the step that the run goes on from.

    Raises:
        ValueError: a tracker's package is missing.
        OSError: metrics.jsonl cannot be written.
    """

    def __init__(self, config: Config, trainer: Trainer, *, byte_level: bool, from_step: int):
        first = jax.process_index() == 0
        self._flops = models.flops_per_token(trainer.model_config, config.input.seq_len)
        self._unit = "byte" if byte_level else "token"
        self._pending: list[tuple[int, Metrics]] = []
        self._log = self._trackers = None
        with agreeing(ValueError, OSError):
            if first:
                self._log = MetricsLog(Path(config.run_dir or "", "metrics.jsonl"), from_step=from_step)
                self._trackers = Trackers(config, from_step=from_step)
        tokens = config.input.batch_size * config.input.seq_len
        self.progress = Progress(step=from_step, steps=config.steps, tokens_per_step=tokens, shown=first)

    def add(self, step: int, metrics: Metrics) -> None:
        """Keeps the arrays; the device may still be computing them."""
        self._pending.append((step, metrics))

    def flush(self) -> None:
        """Waits for the steps so far, writes them down and shows the last.

        Raises:
            Diverged: a loss or a gradient's norm is no finite number; the steps before are written.
            OSError: metrics.jsonl cannot be written; on other processes `Failed`.
        """
        if not self._pending:
            return
        records = [
            (step, float(metrics.loss), float(metrics.grad_norm), float(metrics.learning_rate))
            for step, metrics in jax.device_get(self._pending)
        ]
        self._pending.clear()
        good = _count_before_gap(records)
        speed = self.progress.advance(records[-1][0], records[-1][1])
        with agreeing(OSError):
            for step, loss, grad_norm, rate in records[:good]:
                self._write(
                    step,
                    loss=loss,
                    **{f"bits_per_{self._unit}": loss / math.log(2)},
                    learning_rate=rate,
                    grad_norm=grad_norm,
                    tokens_per_second=speed,
                    mfu=mfu(speed, self._flops),
                )
            if self._log is not None:
                self._log.check()
            if self._trackers is not None:
                self._trackers.flush()
        if good < len(records):
            step, loss, grad_norm, _ = records[good]
            raise Diverged(f"the loss is {loss} and the gradient's norm {grad_norm} at step {step}", step)

    def heldout(self, step: int, bits: float) -> None:
        """Writes a held-out score down, and shows it.

        Raises:
            Diverged: the score is no finite number.
            OSError: see `flush`.
        """
        require_finite(bits, step)
        with agreeing(OSError):
            self._write(step, **{f"{HELDOUT}{self._unit}": bits})
        self.progress.note(f"step {step}  held out {bits:.4f} bits per {self._unit}")

    def _write(self, step: int, **values: float | None) -> None:
        if self._log is not None:
            self._log.write(step=step, **values)
        if self._trackers is not None:
            self._trackers.write(step, values)

    def close(self) -> None:
        """Ends the line of progress and the files; once."""
        self.progress.finish()
        if self._log is not None:
            self._log.close()
        if self._trackers is not None:
            self._trackers.close()
            self._trackers = None


def require_finite(bits: float, step: int, model: Path | None = None) -> None:
    """Raises `Diverged` where a state of finite numbers gives the held-out text no finite bits.

    Args:
        bits: of the text.
        step: that the state is of.
        model: where it is written already, if it is, as nobody should take it for a good one.
    """
    if not math.isfinite(bits):
        written = "" if model is None else f", which is written to {model},"
        raise Diverged(f"the model of step {step}{written} scores {bits} bits on the held-out text", step + 1)


def _count_before_gap(records: list[tuple[int, float, float, float]]) -> int:
    """Records before the first whose loss or gradient is no finite number."""
    return next((i for i, record in enumerate(records) if not all(map(math.isfinite, record[1:3]))), len(records))
