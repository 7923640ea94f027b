"""The lock of a run's directory: one run at a time, on one machine or on several that share a file system.

A kernel lock (`filelock`) keeps a second run out and is gone with its process, however that ends. Some network file
systems keep such locks to one machine. There the file `running.json` names the run, and its time stamp, renewed every
few seconds, shows that the run still lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

from training.run_dir import LOCK

_BEAT = 4.0  # seconds between renewals of the time stamp
_PATIENCE = 3 * _BEAT  # without a renewal, a run on another machine counts as dead


class RunLock:
    """Holds a run's directory from when it is made until `release`.

    Args:
        run_dir: exists.
        say: receives a line before a wait.
        machine: identity of this machine until it is restarted.

    Raises:
        ValueError: another run holds the directory.
        OSError: the directory cannot be written.
    """

    def __init__(self, run_dir: Path, *, say: Callable[[str], None] = print, machine: str | None = None):
        self._path, self._token = run_dir / "running.json", uuid.uuid4().hex
        machine = machine or _this_machine()
        self._lock = filelock.FileLock(run_dir / LOCK, timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise ValueError(_in_use(run_dir, self._read())) from None
        try:
            other = self._read()
            if other and other.get("machine") != machine:
                self._wait_for_a_sign_of_life(run_dir, other, say)
            self._path.unlink(missing_ok=True)
            self._create(
                {
                    "machine": machine,
                    "host": platform.node(),
                    "pid": os.getpid(),
                    "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                    "token": self._token,
                },
                run_dir,
            )
        except BaseException:
            self._lock.release()
            raise
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._heart.start()

    def release(self) -> None:
        """Lets the next run in, without a wait."""
        self._over.set()
        self._heart.join()
        if (self._read() or {}).get("token") == self._token:
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._lock.release()

    def _create(self, content: dict[str, Any], run_dir: Path) -> None:
        try:  # the one step that is atomic on every shared file system
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            raise ValueError(_in_use(run_dir, self._read())) from None
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file)
        except OSError as error:  # that of a full disk names no file
            error.filename = str(self._path)
            with contextlib.suppress(OSError):
                self._path.unlink()
            raise

    def _read(self) -> dict[str, Any] | None:
        """The record of the run that holds the directory, {} if it is torn, None if there is none."""
        try:
            content = json.loads(self._path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _wait_for_a_sign_of_life(self, run_dir: Path, other: dict[str, Any], say: Callable[[str], None]) -> None:
        before = self._time_stamp()
        say(
            f"{run_dir} was in use on {other.get('host')}; "
            f"waiting up to {_PATIENCE:.0f} s for a sign of life of that run"
        )
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            time.sleep(0.5)
            now = self._time_stamp()
            if now is None:  # that run has ended
                return
            if now != before:
                raise ValueError(_in_use(run_dir, other))

    def _time_stamp(self) -> int | None:
        try:
            with self._path.open() as file:  # opened, as network file systems look at the server then
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None

    def _beat(self) -> None:
        while not self._over.wait(_BEAT):
            with contextlib.suppress(OSError):  # a full disk or a removed directory is the run's to report
                os.utime(self._path)


def _in_use(run_dir: Path, holder: dict[str, Any] | None) -> str:
    holder = holder or {}
    who = (
        f"process {holder['pid']} on {holder.get('host')} since {holder.get('since')}" if "pid" in holder else "another"
    )
    return f"--run-dir: expected a directory that no other run is using, got {run_dir}, in use by {who}"


def _this_machine() -> str:
    """Host name and, where the system has one, an id that changes with each start of the machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return f"{platform.node()} {boot.read_text('ascii').strip()}"
    except OSError:
        return f"{platform.node()} {uuid.getnode():x}"
