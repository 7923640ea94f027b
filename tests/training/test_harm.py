"""Runs that come to harm at random moments of all phases: the next start goes on, and ends as if nothing had been."""

import collections
import json
import random
import re
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.training.programs import TINY, cluster, ends, losses, running, train, write_text

pytestmark = pytest.mark.slow
STEPS = 60
FLAGS = [*TINY, "--steps", STEPS, "--checkpoint-every", 4, "--log-every", 2, "--eval-every", 15]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without harm: the data, its directory, and the seconds that it took once all was compiled."""
    folder = tmp_path_factory.mktemp("straight")
    text = write_text(folder / "text.txt")
    for name in ("first", "second"):
        began = time.perf_counter()
        train(*FLAGS, "--data", text, "--run-dir", folder / name)
    return text, folder / "first", time.perf_counter() - began


def phase(said: str) -> str:
    """The phase that a run was in when it had said so much."""
    steps = re.findall(r"^step +(\d+)/", said, re.MULTILINE)
    marks = [
        ("over", "Held out, never trained on"),
        ("evaluation", "Model written"),
        ("last checkpoint and export", f"step {STEPS}/"),
        *([("training", "step")] if steps else []),
        ("first steps", "Compiled"),
        ("state and compilation", "parameters, "),
        ("data", "process(es)"),
    ]
    return next((name for name, mark in marks if mark in said), "start")


def check_same_end(run_dir: Path, expected: Path) -> None:
    results, others = (json.loads((d / "results.json").read_text()) for d in (run_dir, expected))
    assert losses(run_dir) == losses(expected)
    assert results["heldout_bits_per_byte"] == others["heldout_bits_per_byte"]
    assert (run_dir / "model" / "model.safetensors").read_bytes() == (
        expected / "model" / "model.safetensors"
    ).read_bytes()
    leftovers = [path.name for path in run_dir.rglob("*") if re.search(r"\.tmp$|\.new$|\.old$|-tmp", path.name)]
    assert leftovers == []


def fill_disk(process: subprocess.Popen) -> None:
    """Makes every further write of a process to a file fail, as on a full disk."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


HARMS = {
    "SIGKILL": (lambda process: process.send_signal(signal.SIGKILL), {-9, 0}),
    "SIGTERM": (lambda process: process.send_signal(signal.SIGTERM), {0}),
    "SIGINT": (lambda process: process.send_signal(signal.SIGINT), {0}),
    "full disk": (fill_disk, {0, 1, 2}),
}


@pytest.mark.parametrize("harm", HARMS)
def test_one_process(straight, tmp_path, harm, record_property):
    text, expected, seconds = straight
    do, codes = HARMS[harm]
    draw, met, finished = random.Random(harm), collections.Counter(), 0
    for moment in range(12):
        run_dir = tmp_path / f"run-{finished}"
        with running(*FLAGS, "--data", text, "--run-dir", run_dir) as process:
            time.sleep(draw.uniform(0.3, 1.0) * seconds)
            do(process)
            [code], [said] = ends([process])
        met[phase(said)] += 1
        assert code in codes, f"moment {moment}: {code}\n{said}"
        assert "Traceback" not in said, said
        if code in (1, 2):
            assert len(re.findall(r"^train\.py: ", said, re.MULTILINE)) == 1, said
        if (run_dir / "results.json").exists() and code == 0 and "Results " in said:
            train("--run-dir", run_dir)
            check_same_end(run_dir, expected)
            finished += 1
    train(*FLAGS, "--data", text, "--run-dir", tmp_path / f"run-{finished}")
    check_same_end(tmp_path / f"run-{finished}", expected)
    record_property("phases", dict(met))
    print(harm, dict(met))


@pytest.mark.parametrize("harm", ["SIGKILL", "SIGTERM", "full disk"])
@pytest.mark.parametrize("count", [2, 3])
def test_one_of_several_processes(straight, tmp_path, harm, count, record_property):
    text, _, seconds = straight
    do, codes = HARMS[harm]
    draw, met, run_dir = random.Random(f"{harm} {count}"), collections.Counter(), tmp_path / "run"
    flags = [*FLAGS, "--data", text, "--run-dir", run_dir, "--mesh", count, 1, 1, "--join-timeout", 60]
    for moment in range(5):
        with cluster(count, *flags) as processes:
            time.sleep(draw.uniform(0.3, 1.0) * seconds * count)
            hit = draw.randrange(count)
            do(processes[hit])
            returned, outputs = ends(processes)
        met[phase(outputs[0])] += 1
        assert returned[hit] in codes, f"moment {moment}: {returned}\n" + "\n".join(outputs)
        assert "Traceback" not in "".join(outputs), outputs
        if harm == "SIGTERM" and phase(outputs[0]) not in ("start",):
            assert set(returned) == {0}, outputs
    with cluster(count, *flags) as processes:
        returned, outputs = ends(processes)
    assert returned == [0] * count, outputs
    assert [step for step, _ in losses(run_dir)] == list(range(1, STEPS + 1))
    assert json.loads((run_dir / "results.json").read_text())["step"] == STEPS
    record_property("phases", dict(met))
    print(harm, count, dict(met))
