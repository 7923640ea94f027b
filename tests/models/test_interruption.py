"""Ctrl-C in the programs: taken once, never lost, and handlers that are put back."""

import gc
import os
import signal
import sys
import threading

import pytest

from models.interruption import none_lost, noted


@pytest.fixture(autouse=True)
def handler():
    """The handler that is there before and after."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hook = sys.unraisablehook
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    assert sys.unraisablehook is hook


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_what_is_dropped_just_before_the_end_is_not_lost():
    def callback(phase, info):
        gc.callbacks.remove(callback)
        ctrl_c()

    def collect():
        gc.callbacks.append(callback)
        gc.collect()

    with pytest.raises(KeyboardInterrupt), none_lost():
        collect()


def test_a_second_ctrl_c_is_raised_at_once():
    notes = noted()
    check = notes.__enter__()
    try:
        ctrl_c()
        for again in (ctrl_c, check):
            with pytest.raises(KeyboardInterrupt):
                again()
    finally:
        with pytest.raises(KeyboardInterrupt):
            notes.__exit__(None, None, None)


def test_handlers_are_put_back_after_an_error():
    with pytest.raises(ValueError, match="of the body"), none_lost(), noted():
        raise ValueError("of the body")


def test_threads_set_no_handler():
    found = []

    def body():
        with noted() as check:
            check()
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_a_handler_of_another_language_stays(monkeypatch):
    """Python knows it as None, which `signal.signal` refuses."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with noted() as check:
        check()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
