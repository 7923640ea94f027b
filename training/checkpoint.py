"""Checkpoints: written in the background, the last N kept, one that was torn passed over; and being told to stop.

All of Orbax is here: its v1 interface lies under an experimental path still, and may move.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

# What Orbax raises for a checkpoint whose files are missing or cut short. An error of the device or of memory is none
# of these, and passes through.
_TORN = (OSError, LookupError, ValueError)


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held."""

    step: int
    state: Any
    position: dict[str, Any]  # of the data, as given to `save`


class Checkpoints:
    """The checkpoints of a run, a folder `<step>` each.

    Args:
        directory: where they lie; made if missing.
        keep: how many of the newest are kept.
        say: is told, in a line, of a checkpoint that cannot be read.
    """

    def __init__(self, directory: Path, *, keep: int, say: Callable[[str], None] = print):
        self.directory = directory.resolve()
        self._say = say
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file
        newest: Any = ocp.training.preservation_policies.LatestN(keep)  # its annotation is not the one asked for
        self._checkpointer = ocp.training.Checkpointer(
            str(self.directory),
            preservation_policy=newest,
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, whole or torn, oldest first."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Begins to write; the arrays are copied before this returns, so the caller may donate them at once.

        Args:
            step: optimizer steps done.
            state: pytree of arrays.
            position: where the data stands, plain JSON; not empty.
        """
        self._checkpointer.save_async(step, state, force=True, overwrite=True, custom_metadata=position)

    def restore(self, like: Any) -> Restored | None:
        """The newest checkpoint that can be read, or None if there is none.

        Those that cannot be read are moved aside, named, once an older one has been read, so that they are neither
        counted among those to keep nor taken for the newest again.

        Args:
            like: pytree of `jax.ShapeDtypeStruct` with shardings: what is expected.

        Raises:
            ValueError: a checkpoint holds arrays of other shapes, or there are some and none can be read.
        """
        torn: list[int] = []
        for step in reversed(self.steps):
            metadata = self._attempt(step, self._whole_metadata)
            if metadata is not None:
                _check_shapes(self.directory / str(step), metadata.metadata, like)
                state = self._attempt(step, lambda step: self._checkpointer.load(step, like))
                if state is not None:
                    self._set_aside(torn)
                    return Restored(step, state, dict(metadata.custom_metadata))
            torn.append(step)
        if torn:
            raise ValueError(f"expected a whole checkpoint in {self.directory}, got {len(torn)} that cannot be read")
        return None

    def _whole_metadata(self, step: int) -> Any:
        metadata = self._checkpointer.metadata(step)
        if not metadata.custom_metadata:
            raise FileNotFoundError("its commit marker is missing")
        if not metadata.metadata:
            raise FileNotFoundError("its arrays are missing or cut short")
        return metadata

    def _attempt(self, step: int, read: Callable[[int], Any]) -> Any:
        """What `read(step)` returns, or None, with a line said, if the checkpoint is torn."""
        reason = None
        with _quietly():
            try:
                return read(step)
            except _TORN as error:
                reason = " ".join(str(error.__cause__ or error).split())[:120]
            gc.collect()  # what the failed load left behind, while nobody listens to it
        self._say(f"checkpoint {step} is torn, going back to the one before ({reason})")
        return None

    def _set_aside(self, torn: list[int]) -> None:
        if not torn:
            return
        if jax.process_index() == 0:
            for step in torn:
                target = self.directory.with_name(f"{self.directory.name}-torn-{step}")
                count = 1
                while target.exists():
                    count += 1
                    target = self.directory.with_name(f"{self.directory.name}-torn-{step}-{count}")
                (self.directory / str(step)).rename(target)
                self._say(f"checkpoint {step} was moved to {target}")
        multihost_utils.sync_global_devices("torn checkpoints set aside")
        self._checkpointer.reload()

    def wait(self) -> None:
        """Returns when all that was saved is on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        self._checkpointer.close()


def _check_shapes(path: Path, stored: Any, like: Any) -> None:
    """Raises where a checkpoint's tree of array metadata is not the one expected."""

    def shapes(tree: Any) -> dict[str, str]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {
            jax.tree_util.keystr(key, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
            for key, leaf in leaves
        }

    got, expected = shapes(stored), shapes(like)
    for name in sorted(got.keys() | expected.keys()):
        if got.get(name) != expected.get(name):
            raise ValueError(
                f"expected a checkpoint with {name} {expected.get(name, 'absent')} in {path}, got "
                f"{got.get(name, 'none')}; the model or optimizer is another one: choose another --run-dir"
            )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silences what Orbax leaves behind where a load fails: log records, unawaited coroutines, a closed event loop."""
    level, hook = logging.root.manager.disable, sys.unraisablehook
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.unraisablehook = hook
        logging.disable(level)


class StopRequest:
    """Whether the run was told to stop, by SIGTERM (preemption) or Ctrl-C; a second Ctrl-C ends it at once.

    In a cluster only SIGTERM counts: one to any process stops all of them after the same step, on which JAX's
    preemption service agrees.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        signals = [] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        self._before = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        print(f"\n{self.signal.name}: stopping after this step", file=sys.stderr, flush=True)

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`; every process must ask after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signal is not None
