"""Runs that come to harm at random moments of all phases: the next start goes on, and ends as if nothing had been."""

import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.training.programs import TINY, cluster, losses, running, train, write_text

pytestmark = pytest.mark.slow
STEPS, DISK_BYTES = 40, 8 << 20
FLAGS = [*TINY, "--steps", STEPS, "--checkpoint-every", 4, "--log-every", 2, "--eval-every", 10]
# Phases of a run: what it says where each begins, and the seconds after it within which the harm is done.
LATE = {
    "last checkpoint and export": (rf"^step {STEPS}/|checkpoint {STEPS} in [\s\S]*^Compiled", 0.7),
    "evaluation": (r"^Model written", 1.0),
    "sample, results and plot": (r"^Model written", 3.0),
}
PHASES = {
    "start": (None, 10.0),
    "data and state": (r"; \d process(es)?$", 0.6),
    "compilation": (r"parameters, ", 2.0),
    "training": (r"^step ", 0.5),
    "evaluation within the loop": (r"^step [123]0/", 0.2),
    **LATE,
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Path, Path]:
    """The data, and the directory of a run without harm."""
    folder = tmp_path_factory.mktemp("straight")
    text = write_text(folder / "text.txt")
    train(*FLAGS, "--data", text, "--run-dir", folder / "run")
    return text, folder / "run"


@dataclass
class Listener:
    """Collects the output of a process as it comes."""

    process: subprocess.Popen
    said: str = ""
    _heard: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self):
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        for line in self.process.stdout or ():
            with self._heard:
                self.said += line
                self._heard.notify_all()

    def wait_for(self, mark: str) -> None:
        """Returns once a line holds the mark; the phase must come, else a program of other words goes unharmed."""
        with self._heard:
            while not re.search(mark, self.said, re.MULTILINE):
                assert self._thread.is_alive(), f"no line matches {mark}\n{self.said}"
                self._heard.wait(0.2)

    def end(self, timeout: float) -> int:
        code = self.process.wait(timeout)
        self._thread.join()
        return code


@dataclass
class Disk:
    """Where runs write; can be filled and emptied.

    Attributes:
        path: a small file system of its own, or, where none can be mounted, a directory.
        mounted: which of them.
    """

    path: Path
    mounted: bool

    def fill(self, process: subprocess.Popen) -> None:
        """Makes all further writes of a process fail."""
        if not self.mounted:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            return
        with contextlib.suppress(OSError), (self.path / "filler").open("ab", buffering=0) as file:
            for _ in range(2 * DISK_BYTES // 4096):  # bounded, so that it fills no other disk if this one is gone
                file.write(bytes(4096))

    def empty(self) -> None:
        (self.path / "filler").unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path)]
    mounted = os.name == "posix" and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield Disk(path, mounted)
    if mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


Harm = Callable[[subprocess.Popen], None]


def sends(number: signal.Signals) -> Harm:
    return lambda process: process.send_signal(number)


def files_end(process: subprocess.Popen) -> None:
    """Makes every further write of a process to a file fail."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


HARMS: dict[str, tuple[Harm, set[int]]] = {
    "SIGKILL": (sends(signal.SIGKILL), {-9, 0}),
    "SIGTERM": (sends(signal.SIGTERM), {0}),
    "SIGINT": (sends(signal.SIGINT), {0}),
    "no more files": (files_end, {0, 1, 2}),
}


def come_to_harm(
    processes: list[subprocess.Popen], hit: int, do: Harm, phase: str, draw: random.Random
) -> tuple[list[int], list[str]]:
    """Does the harm to a process in a phase of the run; exit codes and outputs of all, once they have ended."""
    listeners = [Listener(process) for process in processes]
    mark, spread = PHASES[phase]
    if mark is not None:
        listeners[0].wait_for(mark)
    time.sleep(draw.uniform(0, spread))
    do(processes[hit])
    codes = [listener.end(300) for listener in listeners]
    return codes, [listener.said for listener in listeners]


def check_said(harm: str, code: int, said: str) -> None:
    assert code in HARMS[harm][1], f"{code}\n{said}"
    assert "Traceback" not in said, said
    if code in (1, 2):
        assert len(re.findall(r"^train\.py: ", said, re.MULTILINE)) == 1, said


def check_same_end(run_dir: Path, expected: Path) -> None:
    """Checks that a run ended as the one without harm did, to the bit, and left nothing half-written."""
    results, others = (json.loads((d / "results.json").read_text()) for d in (run_dir, expected))
    assert losses(run_dir) == losses(expected)
    for name in ("heldout_bits_per_byte", "far_context", "sample"):
        assert results[name] == others[name]
    weights = [directory / "model" / "model.safetensors" for directory in (run_dir, expected)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    check_whole(run_dir)


def check_whole(run_dir: Path) -> None:
    assert json.loads((run_dir / "results.json").read_text())["step"] == STEPS
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    leftovers = [path.name for path in run_dir.rglob("*") if re.search(r"\.tmp$|\.new$|\.old$|-tmp", path.name)]
    assert leftovers == []


def report(harm: str, count: int, phase: str, codes: list[int], outputs: list[str]) -> None:
    lines = [line for line in outputs[0].splitlines() if not line.startswith("  ")] or [""]
    last = next((line for line in reversed(lines) if line.startswith("train.py: ")), lines[-1])
    print(f"{count} process(es) | {harm} | {phase} | {codes} | {last[:110]}", flush=True)


@pytest.mark.parametrize("harm", HARMS)
def test_one_process(straight, tmp_path, harm):
    text, expected = straight
    draw, run_dir = random.Random(harm), tmp_path / "run"
    for phase in PHASES:
        with running(*FLAGS, "--data", text, "--run-dir", run_dir) as process:
            codes, outputs = come_to_harm([process], 0, HARMS[harm][0], phase, draw)
        report(harm, 1, phase, codes, outputs)
        check_said(harm, codes[0], outputs[0])
    train("--run-dir", run_dir)
    check_same_end(run_dir, expected)


def test_killed_after_the_last_step(straight, tmp_path):
    text, expected = straight
    draw, run_dir = random.Random("late"), tmp_path / "run"
    for phase in [*LATE] * 3:
        with running(*FLAGS, "--data", text, "--run-dir", run_dir) as process:
            codes, outputs = come_to_harm([process], 0, HARMS["SIGKILL"][0], phase, draw)
        report("SIGKILL", 1, phase, codes, outputs)
        check_said("SIGKILL", codes[0], outputs[0])
    train("--run-dir", run_dir)
    check_same_end(run_dir, expected)


def test_a_small_disk_that_fills(straight, disk):
    text, expected = straight
    draw, run_dir = random.Random("disk"), disk.path / "run"
    for phase in PHASES:
        with running(*FLAGS, "--data", text, "--run-dir", run_dir) as process:
            codes, outputs = come_to_harm([process], 0, disk.fill, phase, draw)
        disk.empty()
        report("full disk" if disk.mounted else "no more files", 1, phase, codes, outputs)
        check_said("no more files", codes[0], outputs[0])
    train("--run-dir", run_dir)
    check_same_end(run_dir, expected)


@pytest.mark.parametrize("harm", ["SIGKILL", "SIGTERM", "no more files"])
@pytest.mark.parametrize("count", [2, 3])
def test_one_of_several_processes(straight, tmp_path, harm, count):
    text, expected = straight
    draw, run_dir = random.Random(f"{harm} {count}"), tmp_path / "run"
    flags = [*FLAGS, "--data", text, "--run-dir", run_dir, "--mesh", count, 1, 1, "--join-timeout", 30]
    for phase in [*PHASES] if count == 2 else draw.sample([*PHASES], 4):
        hit = draw.randrange(count)
        with cluster(count, *flags) as processes:
            codes, outputs = come_to_harm(processes, hit, HARMS[harm][0], phase, draw)
        report(f"{harm} of {hit}", count, phase, codes, outputs)
        check_said(harm, codes[hit], outputs[hit])
        assert "Traceback" not in "".join(outputs), "\n".join(outputs)
        if harm == "SIGTERM" and phase != "start":
            assert set(codes) == {0}, "\n".join(outputs)
    with cluster(count, *flags) as processes:
        listeners = [Listener(process) for process in processes]
        assert [listener.end(300) for listener in listeners] == [0] * count, [one.said for one in listeners]
    assert [step for step, _ in losses(run_dir)] == list(range(1, STEPS + 1))
    for (step, loss), (_, other) in zip(losses(run_dir), losses(expected), strict=True):
        assert loss == pytest.approx(other, abs=2e-4), step
    check_whole(run_dir)
