"""The end of a run: its exit code, and one line with the reason and what is left to go on from."""

from __future__ import annotations

import contextlib
import os
import time

import jax

from training.checkpoint import Checkpoints, SaveFailed, written_steps
from training.cluster import Failed, Lost, lost_peer, say
from training.config import Config
from training.output import warn
from training.pretrained import exported
from training.recorder import Diverged
from training.report import resume_command
from training.run_dir import run_dir
from training.stopping import Stopped


def ended_by(error: BaseException, config: Config | None, checkpoints: Checkpoints | None) -> int:
    """Says in one line why a run ended, and what is left to go on from.

    Args:
        error: raised by the run; one that is no end of a run is raised again.
        config: of the run; None if its flags were wrong.
        checkpoints: of the run; None if it was still being prepared.

    Returns:
        The exit code.
    """
    if isinstance(error, Stopped):
        if config is None or checkpoints is None:
            warn(f"train.py: {error}: stopped before the first step")
        else:
            say(_left_by_stopping(config, checkpoints))
        return 0
    if isinstance(error, KeyboardInterrupt):
        warn("train.py: ended at once; the same --run-dir goes on from the last checkpoint")
        return 130
    if jax.process_count() > 1:
        error = lost_peer(error) or error
    more = ""
    if isinstance(error, Diverged) and config is not None and checkpoints is not None:
        more = _good_before(error.step, config, checkpoints)
    elif isinstance(error, (OSError, SaveFailed, Lost)) and config is not None and config.run_dir is not None:
        more = _good_in(config) if checkpoints or written_steps(run_dir(config) / "checkpoints") else ""
    elif not isinstance(error, (OSError, Failed) if checkpoints else (OSError, Failed, ValueError)):
        raise error
    warn(f"train.py: {' '.join(str(error).split())}{more}")
    begun = checkpoints is not None or isinstance(error, Lost)
    if begun and jax.process_count() > 1 and not isinstance(error, Diverged):
        # Letting go would wait within Orbax for a checkpoint that not all processes can write.
        time.sleep(2 if jax.process_index() == 0 else 0)  # the coordinator leaves last
        os._exit(1)
    return 1 if begun else 2


def _left_by_stopping(config: Config, checkpoints: Checkpoints) -> str:
    return (
        f"Stopped after the last step; checkpoint {checkpoints.written[-1]} and {exported(config)} are "
        f"written. The report comes with\n  {resume_command(config)}"
    )


def _good_in(config: Config, how: str = "") -> str:
    """The last good checkpoint of a run that ended, and the command that goes on from it."""
    directory = run_dir(config) / "checkpoints"
    if not (steps := written_steps(directory)):
        return "; stopped. There is no good checkpoint"
    return f"; stopped. Checkpoint {steps[-1]} in {directory} is good; go on{how} by: {resume_command(config)}"


def _good_before(spoiled: int, config: Config, checkpoints: Checkpoints) -> str:
    """The same for a run that diverged; moves aside what it had better not go on from.

    Args:
        spoiled: the first step whose loss, gradient or state is no number; the state before it gave that.
        config: of the run.
        checkpoints: of the run.
    """
    with contextlib.suppress(SaveFailed):
        checkpoints.wait()
    steps = checkpoints.written
    bad = [step for step in steps if step >= spoiled - 1]
    if bad == steps:
        return "; stopped. There is no good checkpoint"
    checkpoints.discard(bad, "diverged")
    return _good_in(config, " with lower rates (--learning-rate, --rest-learning-rate)")
