"""The lock of a run's directory: two runs at once, runs that were killed, runs on other machines."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from training import run_lock
from training.run_lock import RunLock

ROOT = Path(__file__).parents[2]
HOLD = """
import pathlib, sys, time
from training.run_lock import RunLock
RunLock(pathlib.Path(sys.argv[1]))
print(1, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick_heart(monkeypatch):
    monkeypatch.setattr(run_lock, "_BEAT", 0.2)
    monkeypatch.setattr(run_lock, "_PATIENCE", 1.2)


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path):
    first = RunLock(tmp_path)
    with pytest.raises(
        ValueError, match=f"--run-dir: expected a directory that no other run .* process {os.getpid()} on"
    ):
        RunLock(tmp_path)
    first.release()
    RunLock(tmp_path).release()
    assert not (tmp_path / "running.json").exists()


def test_a_killed_run_does_not_block_the_next(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ValueError, match=f"process {process.pid} on"):
            RunLock(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "running.json").exists()
    lines = []
    RunLock(tmp_path, say=lines.append).release()
    assert lines == []  # without a wait


def other_machine(run_dir: Path, monkeypatch) -> RunLock:
    """A run whose kernel lock is not seen, as on file systems that keep those to one machine."""
    held = RunLock(run_dir, machine="elsewhere")
    held._lock.release()
    return held


def test_a_living_run_on_another_machine_is_respected(tmp_path, monkeypatch):
    other = other_machine(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="in use by process"):
        RunLock(tmp_path, say=lambda _: None)
    other.release()
    RunLock(tmp_path).release()


def test_a_dead_run_on_another_machine_is_not(tmp_path, monkeypatch):
    other = other_machine(tmp_path, monkeypatch)
    other._over.set()
    other._heart.join()
    lines = []
    lock = RunLock(tmp_path, say=lines.append)
    assert "waiting up to" in lines[0]
    other.release()  # it lives after all: its end does not take the new run's record away
    assert json.loads((tmp_path / "running.json").read_text())["token"] == lock._token
    lock.release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_a_torn_record_does_not_block(tmp_path, content):
    (tmp_path / "running.json").write_text(content)
    RunLock(tmp_path, say=lambda _: None).release()


def test_a_full_disk_is_named_and_leaves_no_record(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match=r"running\.json") as raised:
            RunLock(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG
    assert not (tmp_path / "running.json").exists()
    lines = []
    RunLock(tmp_path, say=lines.append).release()
    assert lines == []  # without a wait


def _try(run_dir, start, results):
    start.wait()
    try:
        lock = RunLock(run_dir)
    except ValueError:
        results.put(0)
    else:
        results.put(1)
        start.wait()
        lock.release()


def test_of_runs_that_begin_at_once_one_gets_the_directory(tmp_path):
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(3), context.Queue()
    others = [context.Process(target=_try, args=(tmp_path, start, results)) for _ in range(3)]
    for other in others:
        other.start()
    winners = sum(results.get(timeout=60) for _ in range(3))
    for other in others:
        other.kill()
        other.join()
    assert winners == 1
