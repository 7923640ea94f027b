"""What was found so far, kept by the process that touches no GPU."""

import contextlib
import dataclasses
import platform
import typing
from collections.abc import Iterable

import jax

from benchmarks.gpu.guard import Job
from benchmarks.gpu.options import Left, Options, TrainStep
from benchmarks.gpu.sides import PASSES
from benchmarks.record import save

TIMED = (*PASSES, "train step")


def nobodys(case: str, key: str, reason: str) -> dict:
    """The row of a case without sides: `key` is "not run" for want of time, "left out" where something is wrong."""
    return {"case": case, "side": "all", key: reason}


def device() -> str:
    return f"{jax.devices()[0].device_kind} ({platform.machine()}, {jax.device_count()} device)"


class Record:
    """The rows by case and side, and the header of the file."""

    def __init__(self, options: Options):
        self.header: dict = {}
        self._options, self._rows, self._done = options, {}, set()
        self._longest_s = 0.0

    @property
    def rows(self) -> list[dict]:
        return list(self._rows.values())

    def keep(self, message: dict) -> None:
        """Rows, parts of the header, or a case that is done; what a second process says anew stands."""
        self.header |= message.get("header", {})
        for row in message.get("rows", ()):
            key = row["case"], row["side"]
            anew = {name for name in TIMED if f"{name} ms" in row}
            before = {name: value for name, value in self._rows.get(key, {}).items() if _timed(name) not in anew}
            self._rows[key] = before | row
        if "done" in message:
            self._done.add(message["done"])
            self._longest_s = message["longest s"]
        self.save()

    def save(self) -> None:
        if self._options.folder is not None:
            # It says where it writes, each time.
            with contextlib.redirect_stdout(None):
                save("attention_gpu", self.rows, self._options.folder, **self.header)

    def what_is_left(self, left: Left) -> Left:
        cases = tuple(case for case in left.cases if case.name not in self._done)
        return dataclasses.replace(left, cases=cases, longest_s=max(left.longest_s, self._longest_s))

    def cut_short(self, jobs: Iterable[Job], reason: str) -> None:
        """Rows of the case at which a process ended, for whatever has no result yet."""
        jobs = tuple(jobs)
        cases = [case for case in self._options.cases if case.name in {job.case for job in jobs}]
        rows = [self._cut_row(case, side, jobs, reason) for case in cases for side in self._options.sides_at(case)]
        self.keep({"rows": [row for row in rows if row is not None]})

    def _cut_row(self, case: typing.Any, side: str, jobs: tuple[Job, ...], reason: str) -> dict | None:
        row = {"case": case.name, "side": side} | self._rows.get((case.name, side), {})
        if "left out" in row:
            return None
        for name in ("train step",) if isinstance(case, TrainStep) else PASSES:
            if f"{name} ms" not in row and f"{name} failed" not in row:
                guilty = any((job.side, job.what) == (side, name) for job in jobs)
                row[f"{name} failed"] = reason if guilty else f"not run, because {reason}"
        return row

    def skip(self, left: Left, key: str, reason: str) -> None:
        """All that is left, but for the case that has rows already."""
        known = {case for case, _ in self._rows}
        self.keep({"rows": [nobodys(case.name, key, reason) for case in left.cases if case.name not in known]})

    def skip_one(self, left: Left, name: str, reason: str) -> Left | None:
        """Goes on after a case; None if it was the last."""
        self.keep({"rows": [nobodys(name, "left out", reason)], "done": name, "longest s": left.longest_s})
        left = self.what_is_left(left)
        return left if left.cases else None

    def failures(self) -> list[str]:
        """What of our own is missing or wrong, a line each: our sides are to run everywhere, and to be right."""
        told = [
            f"small call {call['case']}, block {call['block']}, {call['pass']}: {call.get('error') or _wrong(call)}"
            for call in self.header.get("small calls", ())
            if not call["passed"]
        ]
        for row in self.rows:
            told += [f"{row['side']} at {row['case']}: {reason}" for reason in _failed(row)]
        return told


def _failed(row: dict) -> list[str]:
    if row["side"] == "all" or not row["side"].startswith("s2jax"):
        return [row["left out"]] if row["side"] == "all" and "left out" in row else []
    reasons = [row[name] for name in ("left out", "check failed") if name in row]
    reasons += [f"{name}: {row[f'{name} failed']}" for name in TIMED if f"{name} failed" in row]
    reasons += [f"{name} check: {row[f'{name} check failed']}" for name in PASSES if f"{name} check failed" in row]
    wrong = [name for name in PASSES if row.get(f"{name} correct") is False]
    if row.get("correct") is False and (wrong or not reasons):
        reasons.append(" and ".join(["not correct", *wrong]) if not wrong else f"not correct: {', '.join(wrong)}")
    return reasons


def _wrong(call: dict) -> str:
    return f"wrong by {call['difference']:.3g}"


def _timed(key: str) -> str | None:
    """Of which timed call a row's key tells."""
    return next((name for name in sorted(TIMED, key=len, reverse=True) if key.startswith(f"{name} ")), None)
