"""The meeting of a cluster's processes before JAX's coordination service begins.

That service takes whoever connects for one of its own: a second job on its port, or one process too many, ends the
first job. So the processes meet on the same port beforehand. Process 0 checks each one's number and run, and answers.
Once all are there the port is JAX's; who knocks later gets no such answer, and leaves without touching the cluster.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

_MAGIC, _LONGEST = "s2jax cluster", 4096
_RETRY, _REMIND = 0.5, 10.0  # seconds between attempts to connect, and between reminders of who is missing


def meet(
    address: str, count: int, process: int, run: str, *, timeout: float, say: Callable[[str], None] = print
) -> None:
    """Returns once all processes of a cluster are there.

    Args:
        address: host:port of process 0.
        count: processes in the cluster.
        process: which of them this is.
        run: identity of the run; all processes must have the same.
        timeout: seconds after which a process gives up.
        say: receives lines on who is waited for.

    Raises:
        ValueError: in one line: not all came in time, the port is in use, or another run holds it.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator: expected host:port, got {address}")
    host = host.strip("[]")
    if process == 0:
        _receive(host, int(port), count, run, timeout, say)
    else:
        _knock(host, int(port), count, process, run, timeout, say)


def _receive(host: str, port: int, count: int, run: str, timeout: float, say: Callable[[str], None]) -> None:
    """Waits for the other processes, as process 0."""
    try:
        # Without SO_REUSEPORT, which the coordination service sets: two of them on a port would not notice.
        door = socket.create_server(("", port), family=_family(host), dualstack_ipv6=False, backlog=128)
    except OSError as error:
        raise ValueError(
            f"--coordinator: expected a port that is free on this machine, got {port} ({error.strerror}); another job "
            f"uses it: choose another port"
        ) from error
    arrived: dict[int, socket.socket] = {}
    say(f"Waiting for {count - 1} more process(es) at port {port}; giving up after {timeout:.0f} s")
    with door, selectors.DefaultSelector() as ready, contextlib.ExitStack() as open_sockets:
        ready.register(door, selectors.EVENT_READ)
        end, remind = time.monotonic() + timeout, time.monotonic() + _REMIND
        while len(arrived) < count - 1:
            if time.monotonic() > end:
                raise ValueError(f"--distributed: {_missing(arrived, count)} did not come within {timeout:.0f} s")
            if time.monotonic() > remind:
                remind += _REMIND
                say(f"Still waiting for {_missing(arrived, count)}; giving up in {end - time.monotonic():.0f} s")
            for key, _ in ready.select(0.5):
                if key.fileobj is door:
                    guest = open_sockets.enter_context(door.accept()[0])
                    guest.settimeout(2.0)
                    ready.register(guest, selectors.EVENT_READ)
                    continue
                guest = key.fileobj
                assert isinstance(guest, socket.socket)
                ready.unregister(guest)
                hello = _hear(guest)
                number = _number(hello, count)
                if number is None:  # no process of this program, or one that left
                    for known in [known for known, other in arrived.items() if other is guest]:
                        del arrived[known]
                    guest.close()
                    continue
                refusal = _refusal(hello or {}, number, count, run, arrived)
                if refusal:
                    _tell(guest, {"refused": refusal})
                    guest.close()
                    say(f"Refused a process at port {port}: {refusal}")
                else:
                    arrived[number] = guest
                    ready.register(guest, selectors.EVENT_READ)  # readable again means that it left
        door.close()
        for guest in arrived.values():
            _tell(guest, {"welcome": True})


def _refusal(hello: dict[str, Any], number: int, count: int, run: str, arrived: dict[int, socket.socket]) -> str:
    if hello.get("run") != run:
        return f"process {number} belongs to another run, or was given other flags"
    if hello.get("count") != count:
        return f"process {number} was told --num-processes {hello.get('count')}, process 0 {count}"
    if number in arrived or number == 0:
        return f"there is a process {number} already"
    return ""


def _knock(
    host: str, port: int, count: int, process: int, run: str, timeout: float, say: Callable[[str], None]
) -> None:
    """Asks process 0 to be let in, as another process."""
    end, told = time.monotonic() + timeout, 0.0
    while True:
        left = end - time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=min(5.0, max(left, 0.1))) as door:
                _tell(door, {"cluster": _MAGIC, "process": process, "count": count, "run": run})
                door.settimeout(max(end - time.monotonic(), 0.1))
                if told == 0.0:
                    say(f"Process {process} is at {host}:{port} and waits for the others for up to {timeout:.0f} s")
                answer = _hear(door)
        except OSError as error:
            problem = error.strerror or str(error)
        else:
            if answer is not None and answer.get("welcome"):
                return
            if answer is not None and "refused" in answer:
                raise ValueError(f"--coordinator: process 0 at {host}:{port} refused this process: {answer['refused']}")
            # Process 0 that ends says nothing either: it may be started again.
            problem = "what answers there is no process 0 that waits for others: another job or program uses the port"
        if time.monotonic() > end:
            raise ValueError(f"--coordinator: no process 0 at {host}:{port} within {timeout:.0f} s ({problem})")
        if time.monotonic() - told > _REMIND:
            told = time.monotonic()
            say(f"Process {process}: no process 0 at {host}:{port} yet ({problem}); giving up in {max(left, 0):.0f} s")
        time.sleep(_RETRY)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _missing(arrived: dict[int, socket.socket], count: int) -> str:
    missing = [str(number) for number in range(1, count) if number not in arrived]
    shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return f"process {shown} of {count}"


def _tell(guest: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        guest.sendall(json.dumps(message).encode() + b"\n")


def _hear(guest: socket.socket) -> dict[str, Any] | None:
    """The message of one line from the other side; None if it is none, or does not come in time."""
    heard = b""
    with contextlib.suppress(OSError):
        while not heard.endswith(b"\n") and len(heard) < _LONGEST:
            part = guest.recv(_LONGEST)
            if not part:
                break
            heard += part
    try:
        message = json.loads(heard)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _number(hello: dict[str, Any] | None, count: int) -> int | None:
    """The process number of a greeting; None if it is no greeting."""
    if hello is None or hello.get("cluster") != _MAGIC or type(hello.get("process")) is not int:
        return None
    return hello["process"]
