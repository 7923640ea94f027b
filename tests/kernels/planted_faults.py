"""Faults planted by hand, each with the test that fails on it; the lists of them are in `faults/`.

    python -m tests.kernels.planted_faults             # plants them all and says what was found
    python -m tests.kernels.planted_faults --write     # the same, and writes docs/planted_faults.md
    python -m tests.kernels.planted_faults -k scale    # those with "scale" in their names or files
    python -m tests.kernels.planted_faults --only NAME # that one
    python -m tests.kernels.planted_faults --kept FILE # keeps results there, and takes from there what still holds

Each is a piece of text replaced in a copy of the tree; the test must pass before and fail after. A test that waits
for ever counts as failing: so does a kernel that lacks one of its barriers. Those that nothing here can find stand in
the list too, with the reason, and with a test that passes all the same.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import typing

from tests.kernels.faults import (
    mosaic_gpu_arrays,
    mosaic_gpu_barriers,
    mosaic_gpu_gradients,
    mosaic_gpu_kernel,
    mosaic_tpu,
    schedules,
    xla,
)
from tests.kernels.faults.fault import Fault

ROOT = pathlib.Path(__file__).parents[2]
TABLE = ROOT / "docs" / "planted_faults.md"

SUBJECTS: dict[str, list[Fault]] = {
    "What is read": schedules.FAULTS,
    "XLA's backend and what all share": xla.FAULTS,
    "Barriers, buffers and registers of the Hopper kernel": mosaic_gpu_barriers.FAULTS,
    "What the Hopper kernel computes": mosaic_gpu_kernel.FAULTS,
    "What the Hopper kernel is given": mosaic_gpu_arrays.FAULTS,
    "The gradients' kernels on Hopper": mosaic_gpu_gradients.FAULTS,
    "The TPU kernels": mosaic_tpu.FAULTS,
}
FAULTS = [fault for faults in SUBJECTS.values() for fault in faults]

STILL, PATIENCE = 30, 1200
"""Seconds after which a test hangs: those in which it does not compute, or all in all."""


class Outcome(typing.NamedTuple):
    """How a test ended.

    Attributes:
      result: "passed", "failed", "hung" or "not run".
      reason: pytest's first line on what failed.
    """

    result: str
    seconds: float
    reason: str


def plant(fault: Fault, tree: pathlib.Path) -> None:
    """Raises ValueError unless the text is there, once."""
    path = tree / fault.file
    text = path.read_text()
    times = text.count(fault.old)
    if times != 1:
        raise ValueError(f"{fault.name}: expected once in {fault.file}, got {times} times: {fault.old!r}")
    path.write_text(text.replace(fault.old, fault.new))


@contextlib.contextmanager
def copy_of_the_tree() -> typing.Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder)
        for name in ("pallas_kernels", "s2jax", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        yield tree


def outcome(tree: pathlib.Path, test: str) -> Outcome:
    """Raises RuntimeError where the test did not run, or was skipped."""
    path, _, selection = test.partition("::")
    # By its name's beginning, so that a parametrised test counts with all its cases.
    names = selection.split("::")
    exact = "[" in names[-1]
    where = [test] if exact else [path, "-k", " and ".join(names)]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "", *where]
    start = time.monotonic()
    # A session of its own: what hangs is ended with all that it started.
    process = subprocess.Popen(
        command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(tree)},
    )  # fmt: skip
    busy, computed = start, 0.0
    while True:
        try:
            output, _ = process.communicate(timeout=2)
            break
        except subprocess.TimeoutExpired:
            now, used = time.monotonic(), processor_seconds(process.pid)
            if abs(used - computed) > 0.5:  # less where one has ended
                busy, computed = now, used
            if now - busy > STILL or now - start > PATIENCE:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return Outcome("hung", now - start, f"nothing computed for {now - busy:.0f} s")
    seconds = time.monotonic() - start
    if process.returncode == 0 and " passed" in output:
        return Outcome("passed", seconds, "")
    if process.returncode == 1:
        reasons = [line[1:].strip() for line in output.splitlines() if line.startswith("E ")]
        return Outcome("failed", seconds, next(filter(None, reasons), ""))
    raise RuntimeError(f"{test} did not run: {output}")


def processor_seconds(session: int) -> float:
    """What the processes of a session have used, with all their threads."""
    ticks = 0
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # one that has just ended
            fields = stat.read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12]) if int(fields[3]) == session else 0
    return ticks / os.sysconf("SC_CLK_TCK")


class Runner:
    """Runs tests, and keeps the results in a file where one is given.

    A kept result of a fault holds as long as the fault is the same and so are the file it is planted in, its test, and
    what tests share. That the test passes without it holds as long as every file does that the test may see: all but
    the lists of faults, this one, and other tests.
    """

    def __init__(self, kept: pathlib.Path | None):
        self.path, self.lock = kept, threading.Lock()
        self.kept: dict[str, Outcome] = {}
        if kept is not None and kept.exists():
            self.kept = {key: Outcome(*each) for key, each in json.loads(kept.read_text()).items()}

    def run(self, test: str, fault: Fault | None = None) -> Outcome:
        with copy_of_the_tree() as tree:
            change = None if fault is None else (fault.file, fault.old, fault.new)
            seen = seen_by(test, tree)
            if fault is not None:
                seen = [(name, text) for name, text in seen if name == fault.file or name.startswith("tests/")]
            key = hashlib.sha256(repr((seen, test, change)).encode()).hexdigest()
            if key in self.kept:
                return self.kept[key]
            if fault is not None:
                plant(fault, tree)
            found = outcome(tree, test)
        with self.lock:
            self.kept[key] = found
            if self.path is not None:
                self.path.write_text(json.dumps(self.kept))
        return found


def seen_by(test: str, tree: pathlib.Path) -> list[tuple[str, str]]:
    """The names and contents of the files that a test may see."""
    own = test.partition("::")[0]
    files = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*.py"))
    other = [name for name in files if name.startswith("tests/kernels/faults/") or name.endswith("planted_faults.py")]
    tests = [name for name in files if name.rpartition("/")[2].startswith("test_") and name != own]
    text = (tree / own).read_text()
    other += [name for name in tests if pathlib.PurePath(name).stem not in text]  # one may import another
    return [(name, (tree / name).read_text()) for name in files if name not in other]


def table(outcomes: dict[Fault, Outcome]) -> str:
    """docs/planted_faults.md."""
    found = [fault for fault in outcomes if fault.unseen is None]
    hung = sum(each.result == "hung" for each in outcomes.values())
    lines = [
        "# Faults planted by hand",
        "",
        "What tests are worth shows in what they find. Each of these was planted in a copy of the tree, and the test",
        "beside it, which passes without it, ran: `python -m tests.kernels.planted_faults --write` does it again and",
        f"writes this page. Of {len(outcomes)}, the tests find {len(found)}, {hung} of them by not coming to an end: a",
        f"kernel without one of its barriers waits for ever, and a test that has computed nothing for {STILL} s counts",
        "as failing.",
    ]
    for subject, faults in SUBJECTS.items():
        lines += ["", f"## {subject}", "", "| fault | where | the test | the test then |", "|---|---|---|---|"]
        for fault in faults:
            if fault.unseen is None:
                test = fault.test.removeprefix("tests/").replace("|", "\\|")
                lines.append(f"| {fault.name} | `{fault.file}` | `{test}` | {outcomes[fault].result} |")
    lines += ["", "## What only a GPU can show", "", "These pass every test that a machine without a GPU can run.", ""]
    lines += ["| fault | where | why nothing here finds it |", "|---|---|---|"]
    lines += [f"| {fault.name} | `{fault.file}` | {fault.unseen} |" for fault in outcomes if fault.unseen is not None]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/planted_faults.md")
    parser.add_argument("--kept", type=pathlib.Path, metavar="FILE", help="keep results in this file")
    parser.add_argument("--jobs", type=int, default=1, help="so many tests at a time")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("-k", default="", help="only faults with this in their names or files")
    choice.add_argument("--only", action="append", help="only the fault of this name")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if options.k in fault.name or options.k in fault.file]
    if options.only:
        chosen = [fault for fault in FAULTS if fault.name in options.only]
    if options.write and len(chosen) < len(FAULTS):
        parser.error("the page is written from a run of all faults")
    runner = Runner(options.kept)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        tests = list(dict.fromkeys(fault.test for fault in chosen))
        healthy = dict(zip(tests, pool.map(runner.run, tests), strict=True))
        broken = [test for test in tests if healthy[test].result != "passed"]
        print(f"without a fault: {len(tests)} tests, failing: {broken}", flush=True)

        def tried(fault: Fault) -> Outcome:
            try:
                found = runner.run(fault.test, fault)
            except RuntimeError as error:  # one fault's trouble is not the others'
                found = Outcome("not run", 0, str(error).partition("\n")[0])
            print(f"{found.result:6} {found.seconds:4.0f} s  {fault.name}: {found.reason[:150]}", flush=True)
            return found

        outcomes = dict(zip(chosen, pool.map(tried, chosen), strict=True))
    expected = {fault: ("failed", "hung") if fault.unseen is None else ("passed",) for fault in chosen}
    wrong = [fault.name for fault in chosen if outcomes[fault].result not in expected[fault]]
    print(f"{len(chosen) - len(wrong)} of {len(chosen)} as expected; otherwise: {wrong}; failing without: {broken}")
    if options.write:
        TABLE.write_text(table(outcomes))
    return 1 if wrong or broken else 0


if __name__ == "__main__":
    sys.exit(main())
