"""Plants every fault of the catalogue and runs the test that must fail on it.

    python -m tests.faults                # all of them, after their tests without a fault
    python -m tests.faults --write        # the same, and writes docs/planted_faults.md
    python -m tests.faults -k offset      # those with "offset" in their invariant, place, change or test
    python -m tests.faults --plant-only   # changes the syntax trees and runs nothing: seconds

A test that does not end counts as failing: a kernel without one of its barriers waits forever.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import importlib.metadata
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
import typing

from tests.faults.catalogue import CATALOGUE, FAULTS
from tests.faults.fault import ROOT, Fault

PAGE = ROOT / "docs" / "planted_faults.md"
IDLE_LIMIT, TIME_LIMIT = 30, 3600
"""Seconds after which a test hangs: without use of a processor, and in all."""


class Outcome(typing.NamedTuple):
    """The end of a run: "passed", "failed", "hung" or "broken", which is any other end; and pytest's first reason."""

    result: str
    seconds: float
    reason: str = ""


def run(*arguments: str) -> Outcome:
    """Runs pytest in a session of its own, which ends with all processes that it started."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *arguments]
    start = busy = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    used, output = 0.0, None
    while output is None:
        try:
            output, _ = process.communicate(timeout=2)
        except subprocess.TimeoutExpired:
            now, before, used = time.monotonic(), used, processor_seconds(process.pid)
            busy = now if abs(used - before) > 0.05 else busy
            if now - busy > IDLE_LIMIT or now - start > TIME_LIMIT:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return Outcome("hung", now - start)
    reasons = [line for line in output.splitlines() if line.startswith(("E ", "ERROR", "Exit:"))]
    result = {0: "passed", 1: "failed"}.get(process.returncode, "broken")
    return Outcome(result, time.monotonic() - start, "" if result == "passed" else (reasons or [output[-300:]])[0])


def processor_seconds(session: int) -> float:
    """Seconds that the living processes of a session have used, with all their threads."""
    ticks = 0
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # one that has just ended
            fields = stat.read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12]) if int(fields[3]) == session else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def trouble_of(fault: Fault) -> str | None:
    """The reason that a fault cannot be planted."""
    try:
        fault.plant()
    except ValueError as error:
        return str(error)


def page(outcomes: dict[Fault, Outcome]) -> str:
    """docs/planted_faults.md."""
    seen = [fault for fault in outcomes if fault.unseen is None]
    caught = [fault for fault in seen if outcomes[fault].result in ("failed", "hung")]
    hung = sum(each.result == "hung" for each in outcomes.values())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "numpy", "flax", "pytest"))
    text = f"""# Planted faults

One fault for each invariant of the library, planted in the syntax tree as the package is imported, and the one test
that fails on it and passes without it. `python -m tests.faults --write` plants them all again and writes this page.

Of {len(seen)} faults the tests found {len(caught)}, {hung} of them by not coming to an end within {IDLE_LIMIT} s \
without use of a processor.
Run on {datetime.date.today()} with Python {platform.python_version()}, {versions}, in \
{sum(each.seconds for each in outcomes.values()) / 60:.0f} minutes.
"""

    def cell(entry: str) -> str:
        return entry.replace("|", "\\|")

    for subject, faults in CATALOGUE.items():
        text += f"\n## {subject}\n\n| invariant | where | fault | test | result |\n|---|---|---|---|---|\n"
        for fault in faults:
            if fault.unseen is None:
                cells = fault.invariant, f"`{fault.where}`", fault.how.text, f"`{fault.test}`", outcomes[fault].result
                text += "| " + " | ".join(map(cell, cells)) + " |\n"
    text += "\n## Only a GPU could show\n\n| invariant | where | fault | why no test here fails |\n|---|---|---|---|\n"
    for fault in outcomes:
        if fault.unseen is not None:
            cells = fault.invariant, f"`{fault.where}`", fault.how.text, fault.unseen
            text += "| " + " | ".join(map(cell, cells)) + " |\n"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", help="only faults with this in their invariant, place, change or test")
    parser.add_argument("--jobs", type=int, default=1, help="number of tests that run at a time")
    parser.add_argument("--write", action="store_true", help="write docs/planted_faults.md")
    parser.add_argument("--plant-only", action="store_true", help="run no test")
    options = parser.parse_args()
    chosen = [each for each in FAULTS if options.k in f"{each.invariant} {each.where} {each.how.text} {each.test}"]
    if options.write and chosen != FAULTS:
        parser.error("the page is written from a run of all faults")
    troubles = [trouble for trouble in map(trouble_of, chosen) if trouble]
    print(f"{len(chosen) - len(troubles)} of {len(chosen)} faults can be planted", *troubles, sep="\n", flush=True)
    if troubles or options.plant_only:
        return len(troubles)
    sound = run("-rf", *dict.fromkeys(f"tests/{fault.test}" for fault in chosen))
    print(f"{sound.result} {sound.seconds:.0f} s without a fault {sound.reason}", flush=True)

    def try_out(fault: Fault) -> Outcome:
        found = run("-x", "-p", "tests.faults.plugin", "--fault", fault.invariant, f"tests/{fault.test}")
        print(f"{found.result:6} {found.seconds:4.0f} s  {fault.invariant}: {found.reason[:150]}", flush=True)
        return found

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        outcomes = dict(zip(chosen, pool.map(try_out, chosen), strict=True))
    expected = {fault: ("failed", "hung") if fault.unseen is None else ("passed",) for fault in chosen}
    wrong = [fault.invariant for fault in chosen if outcomes[fault].result not in expected[fault]]
    print(f"{len(chosen) - len(wrong)} of {len(chosen)} as expected; otherwise: {wrong}")
    if options.write:
        PAGE.write_text(page(outcomes))
    return int(bool(wrong) or sound.result != "passed")


if __name__ == "__main__":
    sys.exit(main())
