"""Scalars for those who watch runs elsewhere than in metrics.jsonl: TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import time
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
        OSError: the run's directory cannot be written.
    """

    def __init__(self, config: Config, *, from_step: int):
        check_packages(config)
        run_dir = Path(config.run_dir or "")
        self._events = _EventFile(run_dir / "tensorboard", from_step) if config.output.tensorboard else None
        self._wandb: Any = None
        if config.output.wandb is not None:
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
        if self._events is not None:
            self._events.write(step, shown)
        if self._wandb is not None:
            self._wandb.log(shown, step=step)

    def flush(self) -> None:
        """Puts what was added on the disk.

        Raises:
            OSError: it cannot be written.
        """
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Lets go of the files, and waits until all is sent."""
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


class _EventFile:
    """An event file of TensorBoard, written in this thread: that of tensorboardX dies, and then blocks, on a full disk.

    Args:
        directory: made if missing; the file gets a new name in it.
        from_step: TensorBoard drops what older files have beyond it.
    """

    def __init__(self, directory: Path, from_step: int):
        from tensorboardX.event_file_writer import EventsWriter

        proto: Any = importlib.import_module("tensorboardX.proto.event_pb2")  # its names come at run time
        directory.mkdir(exist_ok=True)
        self._event, self._writer = proto.Event, EventsWriter(str(directory / "events"), f".{os.getpid()}.{from_step}")
        start = proto.SessionLog(status=proto.SessionLog.START)
        self._writer.write_event(self._event(wall_time=time.time(), step=from_step + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=scalar(name, value)))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # `flush` has told
            self._writer.close()


def check_packages(config: Config) -> None:
    """Raises a ValueError, before any work, if a package that the flags need is missing."""
    if config.output.tensorboard:
        _require_package("tensorboardX", "--tensorboard")
    if config.output.wandb is not None:
        _require_package("wandb", "--wandb")


def _require_package(name: str, flag: str) -> None:
    found = importlib.util.find_spec(name) is not None
    require(found, flag, f"the package {name} to be installed (pip install {name})", "none")
