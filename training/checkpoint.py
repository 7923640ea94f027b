"""Checkpoints: written in the background, the last N kept, one that was torn passed over.

All of Orbax is here: its v1 interface lies under an experimental path still, and may move.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import os
import re
import shutil
import sys
import tempfile
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
# And for one that cannot be written: TensorStore raises ValueError.
_UNWRITABLE = (OSError, ValueError)
# Paths that Orbax takes as they are. Others hold what it reads as a glob pattern ([...], *, ?) or a URL (x:/), or what
# TensorStore refuses: a backslash, bytes that are no UTF-8.
_PLAIN = re.compile(r"(?!.*:/)[^\\\[\]*?\udc80-\udcff]+", re.DOTALL)


class SaveFailed(Exception):
    """A checkpoint could not be written; the older ones are as they were."""


@dataclass(frozen=True)
class Restored:
    """The contents of a checkpoint."""

    step: int
    state: Any
    position: dict[str, Any]  # of the data, as given to `save`


class Checkpoints:
    """The checkpoints of a run, a folder `<step>` each.

    Args:
        directory: where they lie; made if missing.
        keep: how many of the newest are kept.
        say: is told, in a line, of a checkpoint that cannot be read.
        ended_by: is called in a cluster, on a thread of its own, where this process alone may have failed to write: it
            has to end the process, as Orbax would wait for it on all others, and it for them, for up to 20 minutes.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        say: Callable[[str], None] = print,
        ended_by: Callable[[SaveFailed], Any] | None = None,
    ):
        self.directory = directory.resolve()
        self._say, self._saving = say, 0
        self._held = contextlib.ExitStack()
        self._held.enter_context(_orphans_unheard())
        self._held.enter_context(_orbax_records(None if ended_by is None else lambda e: ended_by(self._failed(e))))
        self._remove_unfinished()
        self._alias = None if _PLAIN.fullmatch(str(self.directory)) else _alias_of(self.directory)
        newest: Any = ocp.training.preservation_policies.LatestN(keep)  # its annotation is not the one asked for
        self._checkpointer = ocp.training.Checkpointer(
            str(self._alias or self.directory),
            preservation_policy=newest,
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, whole or torn, oldest first."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    @property
    def written(self) -> list[int]:
        """Steps whose checkpoint is on the disk to its last file, oldest first."""
        return written_steps(self.directory)

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Begins to write; the arrays are copied before this returns, so the caller may donate them at once.

        Args:
            step: optimizer steps done.
            state: pytree of arrays.
            position: where the data stands, plain JSON; not empty.

        Raises:
            SaveFailed: it cannot be written, or the one before could not.
        """
        with self._writing():
            self._checkpointer.wait()
            self._saving = step
            self._checkpointer.save_async(step, state, force=True, overwrite=True, custom_metadata=position)

    def wait(self) -> None:
        """Returns when all that was saved is on disk.

        Raises:
            SaveFailed: it could not be written.
        """
        with self._writing():
            self._checkpointer.wait()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except _UNWRITABLE as error:
            self._remove_unfinished()  # it takes room that the next attempt needs
            raise self._failed(error) from error

    def _failed(self, error: BaseException) -> SaveFailed:
        reason = re.sub(r".*?: (?=Failed to |No space)", "", _one_line(error))
        return SaveFailed(f"checkpoint {self._saving} could not be written to {self.directory} ({reason})")

    def _remove_unfinished(self) -> None:
        """Removes what a run that was killed, or a full disk, left of a checkpoint that never came to be."""
        if jax.process_index() == 0 and self.directory.is_dir():
            for entry in os.scandir(self.directory):
                if ".orbax-checkpoint-tmp" in entry.name:
                    shutil.rmtree(entry.path, ignore_errors=True)

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
                    self._set_aside(torn, "torn")
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
        """The result of `read(step)`, or None, with a line said, if the checkpoint is torn."""
        reason = None
        with _quietly():
            try:
                return read(step)
            except _TORN as error:
                reason = _one_line(error)[:120]
            gc.collect()  # what the failed load left behind, while nobody listens to it
        self._say(f"checkpoint {step} is torn, going back to the one before ({reason})")
        return None

    def _set_aside(self, steps: list[int], why: str) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                target = self.directory.with_name(f"{self.directory.name}-{why}-{step}")
                count = 1
                while target.exists():
                    count += 1
                    target = self.directory.with_name(f"{self.directory.name}-{why}-{step}-{count}")
                (self.directory / str(step)).rename(target)
                self._say(f"checkpoint {step} was moved to {target}")
        multihost_utils.sync_global_devices("checkpoints set aside")
        self._checkpointer.reload()

    def discard(self, steps: list[int], why: str) -> None:
        """Moves checkpoints aside that the run had better not go on from; every process must call this.

        Args:
            steps: of the checkpoints.
            why: goes into the new name, `checkpoints-<why>-<step>`.
        """
        self._set_aside(steps, why)

    def close(self) -> None:
        """Waits for what is being written, and lets go of the directory; never raises what `wait` would have."""
        try:
            with contextlib.suppress(*_UNWRITABLE):
                self._checkpointer.close()
        finally:
            # In a cluster other processes of this machine may still be using it.
            if self._alias is not None and jax.process_count() == 1:
                self._alias.unlink(missing_ok=True)
            self._held.close()


def written_steps(directory: Path) -> list[int]:
    """Steps whose checkpoint is on the disk to its last file, oldest first."""
    with contextlib.suppress(OSError):
        names = [entry.name for entry in directory.iterdir() if (entry / "_CHECKPOINT_METADATA").exists()]
        return sorted(int(name) for name in names if name.isdecimal())
    return []


def _alias_of(directory: Path) -> Path:
    """A symbolic link to a directory, under a path that Orbax takes as it is; the same one on all processes."""
    directory.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:24]
    folder = Path(tempfile.gettempdir(), f"s2jax-{getattr(os, 'getuid', int)()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    link = folder / name
    with contextlib.suppress(FileExistsError):
        link.symlink_to(directory, target_is_directory=True)
    if not link.samefile(directory):
        raise ValueError(f"expected a symbolic link to {directory} at {link}, got one to another place; remove it")
    return link


def _one_line(error: BaseException) -> str:
    return " ".join(str(error.__cause__ or error).split())[:300]


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
def _orbax_records(failed: Callable[[BaseException], Any] | None) -> Iterator[None]:
    """Silences Orbax, which tells of every file, and raises its errors, too.

    Args:
        failed: is called in a cluster with the error of a save in the background, before Orbax waits for the others.
    """
    logger = logging.getLogger("absl")

    def heard(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if (
            failed
            and jax.process_count() > 1
            and isinstance(error, _UNWRITABLE)
            and "background save" in str(record.msg)
        ):
            failed(error)
        return False

    logger.setLevel(logging.ERROR)
    logger.addFilter(heard)
    try:
        yield
    finally:
        logger.removeFilter(heard)
        logger.setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _orphans_unheard() -> Iterator[None]:
    """Drops reports of writes that end after Orbax gave up their checkpoint, as on a full disk: its loop is closed."""
    hook = sys.unraisablehook

    def drop(unraisable: Any) -> None:
        if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
            hook(unraisable)

    sys.unraisablehook = drop
    try:
        yield
    finally:
        if sys.unraisablehook is drop:
            sys.unraisablehook = hook


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
