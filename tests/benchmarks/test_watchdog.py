"""Processes that hang, crash or spoil the GPU's context: what they found is kept, and the job at fault is named."""

import os
import subprocess
import time

import pytest

from benchmarks.gpu import machine, watchdog
from benchmarks.gpu.errors import LeftOut
from benchmarks.gpu.watchdog import Ending, Job, Reporter, watch

HANGS = Job("case", "implementation", "forward")


def finishes(reporter):
    reporter.keep(rows=[1])


def hangs(reporter):
    reporter.keep(rows=[1])
    reporter.doing([HANGS, Job("case", "other", "forward")], 60)
    reporter.doing([HANGS], 1.0)
    time.sleep(600)


def crashes(reporter):
    reporter.doing([HANGS])
    os._exit(7)


def spoils_the_context(reporter, reason):
    watchdog.lost_context = lambda: reason
    reporter.doing([HANGS])
    assert reporter.attempt({}, lambda: 1) == 1
    reporter.attempt({}, lambda: int("one"))


def raises_an_unexpected_error(reporter):
    reporter.doing([HANGS])
    reporter.attempt({}, lambda: 1 / 0)


@pytest.mark.parametrize(
    ("work", "arguments", "reason"),
    [
        (hangs, (), "no answer for 1 s"),
        (crashes, (), "its process ended with 7"),
        (raises_an_unexpected_error, (), "its process ended with 1"),
        (spoils_the_context, ("lost",), "lost, after ValueError: invalid literal for int() with base 10: 'one'"),
    ],
)
def test_the_job_at_fault_is_named_and_findings_are_kept(work, arguments, reason):
    kept = []
    keep = lambda rows: kept.append(rows)  # noqa: E731
    assert watch(work, arguments, keep, time.monotonic() + 100) == Ending(reason, (HANGS,))
    assert kept == ([[1]] if work is hangs else [])


def test_a_process_that_finishes():
    kept = []
    assert watch(finishes, (), lambda rows: kept.append(rows), time.monotonic() + 100) is None
    assert kept == [[1]]
    ending = watch(finishes, (), lambda rows: None, time.monotonic())
    assert ending == Ending("the time was up", (), too_late=True)


def test_a_failure_that_spoils_nothing_is_an_entry_of_the_row():
    reporter, row = Reporter(lambda message: None), {}

    def left_out():
        raise LeftOut("not installed")

    assert reporter.attempt(row, lambda: int("one"), "check failed") is None
    assert reporter.attempt(row, left_out) is None
    reason = "ValueError: invalid literal for int() with base 10: 'one'"
    assert row == {"check failed": reason, "not run": "not installed"}


def test_a_machine_that_does_not_answer_is_not_waited_for(monkeypatch):
    def never(command, *, timeout, **more):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(machine.subprocess, "run", never)
    assert machine.state() == {}


def test_the_context_is_not_lost_here():
    assert watchdog.lost_context() is None
