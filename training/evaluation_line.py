"""Evaluation beside its line of progress, ended by a request to stop."""

from __future__ import annotations

from typing import Any

import jax

from training.documents import Corpus
from training.evaluate import Tick, heldout_bits
from training.metrics import Countdown
from training.recorder import Recorder
from training.step import Trainer
from training.stopping import Stopped, StopRequest


def watched(title: str, stop: StopRequest) -> tuple[Countdown, Tick]:
    """A countdown on the screen, and what an evaluation calls after each batch: it shows, or raises `Stopped`."""
    line = Countdown(title, shown=jax.process_index() == 0)

    def tick(done: int, total: int) -> None:
        stop.check()
        line(done, total)

    return line, tick


def score_heldout(
    trainer: Trainer, params: Any, heldout: Corpus, recorder: Recorder, stop: StopRequest, *, step: int
) -> bool:
    """Records the held-out bits at a step.

    Returns:
        True if it was broken off by a request to stop; nothing is recorded then.
    """
    recorder.progress.finish()
    line, tick = watched("Scoring the held-out text", stop)
    try:
        bits = heldout_bits(trainer, params, heldout, overlap=trainer.config.input.seq_len // 2, tick=tick)
    except Stopped:
        return True
    finally:
        line.finish()
        recorder.progress.restart_clock()
    recorder.heldout(step, bits)
    return False
