"""Kernels that hang, crash or refuse spoil no more than themselves."""

import json
import sys
import threading

import pytest
from gpu import guard, smoke

CASES = [{"point": point.name, "block": block, "passed": True, "difference": 0.0} for point, block in smoke.cases()]


def process(lines: list[dict], then: str = "") -> list[str]:
    told = "\n".join(map(json.dumps, lines))
    return [sys.executable, "-c", f"import sys, time\nprint({told!r}, flush=True)\n{then}"]


def test_all_block_sizes_are_tried():
    assert {block for _, block in smoke.cases()} == {64, 32, 16}
    assert guard.tried_first(process(CASES)) == (CASES, {})


def test_one_that_hangs():
    found, reasons = guard.tried_first(process(CASES[:-2], "time.sleep(60)"), timeout_s=3)
    assert len(found) == len(CASES) - 2
    assert set(reasons) == {16}
    assert "did not end in 3 s" in reasons[16]


def test_one_that_crashes():
    _, reasons = guard.tried_first(process(CASES[:1], "sys.exit('illegal address')"))
    assert set(reasons) == {64, 32, 16}
    assert "ended with 1: illegal address" in reasons[64]


def test_one_that_refuses():
    cases = [case | ({"error": "ValueError: no", "passed": False} if case["block"] == 32 else {}) for case in CASES]
    assert set(guard.tried_first(process(cases))[1]) == {32}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")
def test_a_small_call(capsys):
    smoke.main(smoke.cases()[:1], implementation="reference")
    smoke.main(smoke.cases()[:1], implementation="nothing")
    right, wrong = map(json.loads, capsys.readouterr().out.splitlines())
    assert right["passed"]
    assert right["difference"] == 0
    assert "implementation must be among" in wrong["error"]


def test_a_hanging_call_ends_the_run_and_what_there_is_is_kept():
    ended, told = threading.Event(), []
    watch = guard.Watch(0.2, told.append, lambda code: ended.set())
    watch("s2jax, forward")
    assert ended.wait(10)
    assert "s2jax, forward" in told[0]


def test_a_run_that_is_over_is_not_watched():
    ended = threading.Event()
    guard.Watch(0.1, lambda reason: None, lambda code: ended.set()).over()
    assert not ended.wait(0.5)


def test_nothing_is_lost_here():
    assert guard.lost() is None
