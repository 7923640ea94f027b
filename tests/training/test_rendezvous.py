"""The meeting before a cluster: who is missing, who does not belong, ports in use."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from training import rendezvous
from training.rendezvous import meet


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(rendezvous, "_RETRY", 0.05)
    monkeypatch.setattr(rendezvous, "_REMIND", 0.3)


class Meeting:
    """Processes that meet at a port, each a thread."""

    def __init__(self, port: int):
        self.port, self.lines, self.pool = port, [], ThreadPoolExecutor(8)

    def join(self, process: int, count: int = 3, run: str = "a", timeout: float = 20.0):
        address = f"127.0.0.1:{self.port}"
        return self.pool.submit(meet, address, count, process, run, timeout=timeout, say=self.lines.append)

    def told(self, words: str) -> None:
        """Waits until a line with these words was said."""
        end = time.monotonic() + 20
        while not any(words in line for line in self.lines):
            assert time.monotonic() < end, self.lines
            time.sleep(0.02)


@pytest.fixture
def meeting(port):
    meeting = Meeting(port)
    yield meeting
    meeting.pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_meet_in_any_order(meeting, order):
    guests = []
    for process in order:
        guests.append(meeting.join(process))
        time.sleep(0.1)
    assert [guest.result(20) for guest in guests] == [None] * 3


def test_the_missing_are_named_while_waiting_and_at_the_end(meeting):
    host, guest = meeting.join(0, timeout=1.5), meeting.join(2, timeout=3)
    with pytest.raises(ValueError, match="--distributed: process 1 of 3 did not come within 2 s"):
        host.result(20)
    assert any("Still waiting for process 1 of 3; giving up in" in line for line in meeting.lines)
    with pytest.raises(ValueError, match="--coordinator: no process 0 at"):
        guest.result(20)


def test_no_process_0(meeting):
    with pytest.raises(
        ValueError, match=r"--coordinator: no process 0 at 127.0.0.1:\d+ within 1 s \(Connection refused"
    ):
        meeting.join(1, timeout=1).result(20)
    assert any("giving up in" in line for line in meeting.lines)


@pytest.mark.parametrize(
    ("stranger", "message"),
    [
        ({"run": "b"}, "process 1 belongs to another run, or was given other flags"),
        ({"count": 2}, "process 1 was told --num-processes 2, process 0 3"),
    ],
)
def test_a_process_of_another_run_is_refused_and_the_run_goes_on(meeting, stranger, message):
    host = meeting.join(0)
    with pytest.raises(ValueError, match=message):
        meeting.join(1, **stranger).result(20)
    for guest in [meeting.join(1), meeting.join(2), host]:
        guest.result(20)


def test_a_number_twice(meeting):
    host, first = meeting.join(0), meeting.join(1)
    meeting.told("Process 1 is at")
    with pytest.raises(ValueError, match="there is a process 1 already"):
        meeting.join(1).result(20)
    meeting.join(2).result(20)
    assert (host.result(20), first.result(20)) == (None, None)


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 5000, b'{"process": 1}\n', b"[]\n"])
def test_strangers_are_no_trouble(meeting, port, noise):
    host = meeting.join(0)
    meeting.told("Waiting for 2 more")
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(noise)
    for guest in [meeting.join(1), meeting.join(2), host]:
        guest.result(20)


def test_a_process_that_leaves_may_come_again(meeting, port):
    host = meeting.join(0)
    meeting.told("Waiting for 2 more")
    with socket.create_connection(("127.0.0.1", port)) as leaving:
        hello = {"cluster": rendezvous._MAGIC, "process": 1, "count": 3, "run": "a"}
        leaving.sendall(json.dumps(hello).encode() + b"\n")
        time.sleep(0.3)
    time.sleep(0.3)
    for guest in [meeting.join(1), meeting.join(2), host]:
        guest.result(20)


def test_a_second_job_on_the_port_leaves_the_first_alone(meeting, port):
    with socket.create_server(("127.0.0.1", port)) as other:  # a service of another program, that answers in its way

        def answer():
            with other.accept()[0] as guest:
                guest.sendall(b"HTTP/1.1 400\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ValueError, match="--coordinator: expected a port that is free on this machine, got"):
            meeting.join(0).result(20)
        with pytest.raises(ValueError, match=r"no process 0 at .* another job or program uses the port|timed out"):
            meeting.join(1, timeout=1).result(20)


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:0", "host:70000", "host:x"])
def test_addresses(address):
    with pytest.raises(ValueError, match="--coordinator: expected host:port, got"):
        meet(address, 2, 1, "a", timeout=1)
