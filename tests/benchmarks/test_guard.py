"""Kernels that hang, crash or refuse spoil no more than themselves."""

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import guard, machine, smoke
from benchmarks.gpu.guard import Job, Teller
from benchmarks.gpu.sides import PASSES

ANSWERS = [
    {"case": case.name, "block": block, "pass": what, "passed": True, "difference": 0.0}
    for case, block, what in smoke.calls()
]


def process(lines: list[dict], then: str = "") -> list[str]:
    told = "\n".join(map(json.dumps, lines))
    return [sys.executable, "-c", f"import sys, time\nprint({told!r}, flush=True)\n{then}"]


def test_all_block_sizes_are_tried():
    assert {block for _, block, _ in smoke.calls()} == {64, 32, 16}
    assert guard.tried_first(process(ANSWERS)) == (ANSWERS, {})


def test_one_that_hangs_backward_costs_no_forward_pass():
    found, lost = guard.tried_first(process(ANSWERS[:-2], "time.sleep(60)"), timeout_s=3)
    assert len(found) == len(ANSWERS) - 2
    assert {block: set(passes) for block, passes in lost.items()} == {16: {"backward", "forward + backward"}}
    assert "did not end in 3 s" in lost[16]["backward"]


def test_one_that_crashes():
    _, lost = guard.tried_first(process(ANSWERS[:1], "sys.exit('illegal address')"))
    assert set(lost) == {64, 32, 16}
    assert set(lost[64]) == set(PASSES)
    assert "ended with 1: illegal address" in lost[64]["forward"]


def test_one_that_refuses():
    answers = [
        answer | ({"error": "ValueError: no", "passed": False} if answer["block"] == 32 else {}) for answer in ANSWERS
    ]
    assert set(guard.tried_first(process(answers))[1]) == {32}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")
def test_a_small_call(capsys):
    smoke.main([smoke.calls()[-1]], implementation="reference")
    smoke.main(smoke.calls()[:1], implementation="nothing")
    right, wrong = map(json.loads, capsys.readouterr().out.splitlines())
    assert right["pass"] == "backward"
    assert right["passed"]
    assert right["difference"] == 0
    assert "implementation must be among" in wrong["error"]


HANGS = Job("case", "side", "forward")


def comes_to_its_end(teller):
    teller.keep({"rows": [1]})


def hangs(teller):
    """Another thread compiles and is done, this one never."""
    teller.keep({"rows": [1]})
    with teller.beside(Job("case", "other", "forward")):
        teller.doing(HANGS, 1.0)
    while True:
        time.sleep(60)


def crashes(teller):
    teller.doing(HANGS, 60)
    os._exit(7)


def spoils_the_context(teller, broken):
    guard.lost = lambda: broken
    teller.doing(HANGS, 60)
    assert teller.attempt(lambda: 1) == (1, None)
    teller.attempt(lambda: int("one"))


def raises_what_nobody_foresaw(teller):
    teller.doing(HANGS, 60)
    teller.attempt(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("work", "arguments", "reason"),
    [
        (hangs, (), "no answer for 1 s"),
        (crashes, (), "its process ended with 7"),
        (raises_what_nobody_foresaw, (), "its process ended with 1"),
        (spoils_the_context, ("lost",), "lost, after ValueError: invalid literal for int() with base 10: 'one'"),
    ],
)
def test_whoever_hangs_or_dies_is_named_and_what_there_is_is_kept(work, arguments, reason):
    kept = []
    assert guard.watched(work, arguments, kept.append, time.monotonic() + 100) == guard.Ending(reason, (HANGS,))
    assert kept == ([{"rows": [1]}] if work is hangs else [])


def test_what_comes_to_its_end():
    kept = []
    assert guard.watched(comes_to_its_end, (), kept.append, time.monotonic() + 100) is None
    assert kept == [{"rows": [1]}]
    ending = guard.watched(comes_to_its_end, (), kept.append, time.monotonic())
    assert ending == guard.Ending("the time was up", (), too_late=True)


def test_a_failure_that_spoils_nothing_goes_on():
    assert (
        Teller(lambda message: None).attempt(lambda: int("one"))[1]
        == "ValueError: invalid literal for int() with base 10: 'one'"
    )


def test_a_machine_that_does_not_answer_is_not_waited_for(monkeypatch):
    def never(command, *, timeout, **more):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(machine.shutil, "which", lambda name: name)
    monkeypatch.setattr(machine.subprocess, "run", never)
    assert machine.state() == {}


def test_nothing_is_lost_here():
    assert guard.lost() is None
