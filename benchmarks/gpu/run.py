"""A run: correctness at real sizes, then times, implementations in turn, case by case, saved after every step.

Failures and want of time are entries of a row. Another process measures: when it hangs or dies, its findings are kept,
and a new process goes on without the implementation at fault.
"""

import gc
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence

import jax

from benchmarks.gpu import machine, watchdog
from benchmarks.gpu.clock import choose_clock, matrix_product
from benchmarks.gpu.comparison import Comparison, Options, Session, measure
from benchmarks.gpu.implementations import PASSES
from benchmarks.gpu.speedups import with_speedups
from benchmarks.gpu.watchdog import Reporter
from benchmarks.record import commit, device, table
from pallas_kernels.mosaic_gpu.sm90.config import TUNED_PATH

GRACE_S = 60
"""Seconds that a case may take beyond the budget if it began within."""

COLUMNS = ["implementation", "pass", "correct", "ms", "useful TFLOP/s", "of ideal", "failed", "not run"]


class Record:
    """Findings, kept by the process that does not touch the GPU.

    Args:
      write: saves all rows and the header; called after every change.
      rows: rows of an earlier call.
      done: cases that it finished.
    """

    def __init__(self, write: Callable[[list[dict], dict], None], rows: Iterable[dict] = (), done: Iterable[str] = ()):
        self._write, self.header = write, {"done": list(done)}
        self._rows = {(row["case"], row["implementation"], row["pass"]): row for row in rows}

    @classmethod
    def resume(cls, path: pathlib.Path, write: Callable[[list[dict], dict], None]) -> "Record":
        """The record of an unfinished run, from its results file; the commit must be the same."""
        known = json.loads(path.read_text())
        if known["commit"] != commit():
            raise SystemExit(f"{path} is of another commit, {known['commit']}: measure anew, without --resume")
        return cls(write, known["rows"], known["done"])

    @property
    def rows(self) -> list[dict]:
        """All rows, those of the backward passes included."""
        names = dict.fromkeys(case for case, _, _ in self._rows)
        return [row for name in names for row in with_speedups([r for r in self._rows.values() if r["case"] == name])]

    def keep(self, rows: Iterable[dict] = (), header: dict | None = None, done: str | None = None) -> None:
        """Adds rows, entries of the header and a finished case. A row without a time replaces none that has one."""
        for row in rows:
            key = row["case"], row["implementation"], row["pass"]
            if "ms" in row or "ms" not in self._rows.get(key, {}):
                self._rows[key] = row
        self.header |= header or {}
        if done is not None:
            self.header["done"].append(done)
            print(done, table([row for row in self.rows if row["case"] == done], COLUMNS), sep="\n", flush=True)
        self._write(self.rows, self.header)

    def left(self, comparisons: Iterable[Comparison]) -> list[Comparison]:
        return [each for each in comparisons if each.case.name not in self.header["done"]]

    def close(self, comparisons: Iterable[Comparison], outcome: str, reason: str) -> None:
        """Enters the reason in all rows without a result; `outcome` is "not run" or "failed"."""
        for comparison in comparisons:
            for key, row in comparison.make_rows().items():
                row = self._rows.get((comparison.case.name, *key), row)
                if not {"ms", "failed", "not run"} & row.keys():
                    self.keep([row | {outcome: reason}])

    def failures(self) -> list[str]:
        """Missing and wrong results of our own implementations, a line each."""
        return [
            f"{row['implementation']} at {row['case']}, {row['pass']}: {row.get(key) or 'not correct'}"
            for row in self.rows if row["implementation"].startswith("s2jax")
            for key in ("failed", "check failed", "correct") if row.get(key, key == "correct") is not (key == "correct")
        ]  # fmt: skip


def run(comparisons: Sequence[Comparison], options: Options, record: Record) -> None:
    """Measures the cases that the record has not finished."""
    stop = time.monotonic() + options.budget_s
    left_out: dict[tuple[str, str], str] = {}
    while left := record.left(comparisons):
        ending = watchdog.watch(measure_all, (left, options, left_out, stop), record.keep, stop + GRACE_S)
        if ending is None or ending.too_late:
            record.close(record.left(left), "not run", f"{options.budget_s:g} s were spent")
            return
        print(ending, flush=True)
        reason, cases = str(ending), {job.case for job in ending.jobs}
        guilty = [job for job in ending.jobs if job.implementation]
        for job in guilty:
            left_out |= {(job.implementation, step): reason for step in lost_with(job.step)}
        if not guilty:
            # Without an implementation at fault it would happen again.
            blamed = [each for each in left if not cases or each.case.name in cases]
            record.close(blamed, "failed", reason)
            record.header["done"] += [each.case.name for each in blamed]


def lost_with(step: str) -> tuple[str, ...]:
    """The passes to leave out when this one hangs: itself, and those that contain it."""
    return PASSES[PASSES.index(step) :] if step in PASSES else (step,)


def measure_all(
    reporter: Reporter,
    comparisons: Sequence[Comparison],
    options: Options,
    left_out: dict[tuple[str, str], str],
    stop: float,
) -> None:
    """Measures in this process; nothing is begun after `stop`."""
    clock, evidence = options.clock, {}
    if clock is None:
        if jax.default_backend() == "cpu":
            sys.exit("jax runs on the CPU here; without JAX_PLATFORMS=cpu it should see the GPU")
        clock, evidence = choose_clock(*matrix_product())
    configs = "those that tile_search measured" if TUNED_PATH.exists() else "its defaults, nothing was searched"
    header = {"machine": machine.describe(), "device": device(), "clock": clock.name, "clocks tried": evidence}
    reporter.keep(header=header | {"configurations of s2jax": configs})
    session = Session(options, reporter, clock, left_out, stop)
    for comparison in comparisons:
        if time.monotonic() < stop:
            measure(comparison, session)
            gc.collect()  # of this case's arrays
    reporter.keep(header={"machine after": machine.state()})
