"""Requests to stop: in phases that save, and in those that have nothing to save."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.stopping import Stopped, StopRequest

ROOT = Path(__file__).parents[2]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def heard():
    """The signals are not ignored, as they are by what runs under `nohup`."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS if number != signal.SIGINT}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ask(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_phase_that_saves_goes_on(number, capsys):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        with stop.deferred():
            assert not stop.reached()
            stop.check()
            ask(number)
            assert stop.reached()
        with pytest.raises(Stopped, match=number.name):
            stop.check()
    assert signal.getsignal(number) is before
    assert f"{number.name}: stopping as soon as all is saved" in capsys.readouterr().err


@pytest.mark.parametrize("number", SIGNALS)
def test_other_phases_end_at_once(number):
    with StopRequest(), pytest.raises(Stopped, match=number.name):
        ask(number)


def test_a_second_ctrl_c_interrupts_and_a_second_sigterm_does_not(capsys):
    with StopRequest() as stop, stop.deferred():
        ask(signal.SIGTERM)
        ask(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            ask(signal.SIGINT)


def test_a_signal_that_a_library_swallowed_is_not_lost():
    with StopRequest() as stop:
        with contextlib.suppress(BaseException):  # as finalizers and callbacks of C libraries do
            ask(signal.SIGTERM)
        assert stop.reached()


def in_a_callback(*numbers: signal.Signals) -> None:
    """Python drops what is raised here, as in JAX's callback at garbage collection."""

    def callback(phase, info):
        gc.callbacks.remove(callback)
        for number in numbers:
            ask(number)

    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(5)


@pytest.mark.parametrize(
    "number", [SIGNALS[0], *(pytest.param(number, marks=pytest.mark.slow) for number in SIGNALS[1:])]
)
def test_what_python_drops_is_raised_again_without_a_traceback(number, capsys):
    with StopRequest(), pytest.raises(Stopped, match=number.name):
        in_a_callback(number)
    with StopRequest() as stop, stop.deferred(), pytest.raises(KeyboardInterrupt):
        in_a_callback(number, signal.SIGINT)
    assert "Traceback" not in capsys.readouterr().err


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            ask(signal.SIGHUP)
            assert not stop.reached()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports(number):
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "train.py", "--help"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.rstrip().endswith(" numpy"):
                process.send_signal(number)
                break
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "stopped before anything had begun" in said
    assert "Traceback" not in said
