"""The directory of a run: creation, and protection of other files in it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from pathlib import Path

import jax

from training.config import Config, require

CONFIG = "config.json"
LOCK = "run.lock"  # lies in each directory of a run
_WHOLE = ("metrics.jsonl", "results.json", "loss.png", "model")  # what a run replaces
_MORE = (CONFIG, LOCK, "running.json", "tensorboard", "profile", "wandb")


def run_dir(config: Config) -> Path:
    """The run's directory."""
    return Path(config.run_dir or "")


def is_output(name: str) -> bool:
    """True for a name that a run gives to something in its own directory."""
    return name in (*_WHOLE, *_MORE) or name.partition("-")[0] == "checkpoints"


def with_run_dir(config: Config) -> Config:
    """Makes the run's directory; without --run-dir a new one, named after the model and the time.

    Raises:
        ValueError: it cannot be made, or what it holds is no run's and would be replaced.
    """
    try:
        if config.run_dir is not None:
            run_dir(config).mkdir(parents=True, exist_ok=True)
            _require_no_strangers(run_dir(config))
            return config
        if jax.process_count() > 1:
            raise ValueError("--run-dir: expected a directory that all processes share, got none")
        name = f"runs/{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        for count in itertools.count(1):
            path = Path(name if count == 1 else f"{name}-{count}")
            with contextlib.suppress(FileExistsError):  # of a run that began in the same second
                path.mkdir(parents=True)
                return dataclasses.replace(config, run_dir=str(path))
    except OSError as error:
        raise ValueError(f"--run-dir: expected a directory that can be made, got {error}") from error
    raise AssertionError("unreachable")


def _require_no_strangers(directory: Path) -> None:
    """Refuses a directory that holds no run, but files that this run would overwrite."""
    if jax.process_index() == 0 and not (directory / CONFIG).exists():
        taken = [name for name in _WHOLE if (directory / name).exists() or (directory / name).is_symlink()]
        expected = f"a run's directory, or one without {', '.join(_WHOLE)}, which a run would replace"
        require(not taken, "--run-dir", expected, f"{directory} with {' and '.join(taken)}, but no {CONFIG} of a run")
