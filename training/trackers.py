"""Scalars for those who watch runs elsewhere than in metrics.jsonl: TensorBoard, Weights & Biases."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.config import Config, require


class Trackers:
    """The trackers that a run's flags ask for; none by default.

    Args:
        config: of the run, whose directory exists.
        from_step: the step that the run goes on from; what is beyond it is dropped.

    Raises:
        ValueError: a package is missing.
    """

    def __init__(self, config: Config, *, from_step: int):
        self._tensorboard: Any = None
        self._wandb: Any = None
        run_dir = Path(config.run_dir or "")
        if config.output.tensorboard:
            _require_package("tensorboardX", "--tensorboard")
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=from_step + 1, flush_secs=10)
        if config.output.wandb is not None:
            _require_package("wandb", "--wandb")
            import wandb  # pyright: ignore[reportMissingImports]

            self._wandb = wandb.init(
                project=config.output.wandb,
                name=run_dir.name,
                id=run_dir.name,
                resume="allow",
                dir=run_dir,
                config=dataclasses.asdict(config),
            )

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Adds the scalars of a step; None is left out."""
        shown = {name: value for name, value in values.items() if value is not None}
        if self._tensorboard is not None:
            for name, value in shown.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(shown, step=step)

    def close(self) -> None:
        """Waits until all is written."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_packages(config: Config) -> None:
    """Raises a ValueError, before any work, if a package that the flags need is missing."""
    if config.output.tensorboard:
        _require_package("tensorboardX", "--tensorboard")
    if config.output.wandb is not None:
        _require_package("wandb", "--wandb")


def _require_package(name: str, flag: str) -> None:
    found = importlib.util.find_spec(name) is not None
    require(found, flag, f"the package {name} to be installed (pip install {name})", "none")
