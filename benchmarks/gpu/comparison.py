"""A case: its implementations are compiled, checked, and timed in turn, pass by pass."""

import dataclasses
import functools
import itertools
import time
import typing
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import jax

import s2jax
from benchmarks.cases import Case
from benchmarks.gpu import machine
from benchmarks.gpu.clock import Clock, Timing
from benchmarks.gpu.correctness import PAIRS, Check, Truth, compute_truth, mask_rows
from benchmarks.gpu.flex import Flex, to_tensors
from benchmarks.gpu.implementations import FUNCTIONS, PASSES, Arrays, Executable, Implementation, make_arrays
from benchmarks.gpu.watchdog import COMPILING_S, HANGING_S, Job, Reporter
from benchmarks.schedules import ideal_pairs
from s2jax.patterns import Pattern

Executables = dict[tuple[str, str], Executable]
Rows = dict[tuple[str, str], dict]
"""Results rows by implementation and pass."""

PAUSE_S = 0.03


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of a run.

    Attributes:
      pairs: logits of a head held at once when results are checked; more are more rows.
      clock: chosen where the process runs, if None.
    """

    repeats: int = 5
    budget_s: float = 400
    pairs: int = PAIRS
    hanging_s: float = HANGING_S
    clock: Clock | None = None


class Session(typing.NamedTuple):
    """State of the process in which cases are measured.

    Attributes:
      left_out: reasons why passes of implementations are not tried again.
      stop: `time.monotonic()` after which nothing is begun.
    """

    options: Options
    reporter: Reporter
    clock: Clock
    left_out: dict[tuple[str, str], str]
    stop: float

    def doing(self, *job: str) -> None:
        self.reporter.doing([Job(*job)], self.options.hanging_s)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A case, and the implementations that take turns at it."""

    case: Case
    implementations: tuple[Implementation | Flex, ...]
    passes: tuple[str, ...] = PASSES

    def make_rows(self) -> Rows:
        """Results rows with the known facts; `pairs` counts the token pairs that the pattern lets through."""
        case, rows = self.case, {}
        heads = {"num_heads": case.num_heads, "num_kv_heads": case.num_kv_heads}
        for each in self.implementations:
            pattern = each.pattern(case)
            schedule = s2jax.compile_schedule(pattern, **heads, query_length=case.tokens, kv_length=case.tokens)
            row = {"case": case.name, "implementation": each.name, "dense": each.dense, "head_dim": case.head_dim}
            row |= {"density": pattern.density(**heads, length=case.tokens)}
            row |= {"pairs": ideal_pairs(schedule) * case.batch}
            rows |= {(each.name, step): row | {"pass": step} for step in self.passes}
        return rows

    def make_inputs(self) -> typing.Any:
        return make_arrays(self.case)

    def function(self, name: str) -> Callable:
        """Makes a pass, a function of the inputs, from an attention."""
        return FUNCTIONS[name]

    def check(self, rows: Rows, executables: Executables, inputs: typing.Any, session: Session) -> None:
        """Compares results with float32 in sampled rows, and outputs of one pattern with each other in all rows."""
        by_pattern: dict[Pattern, list[str]] = {}
        for each in self.implementations:
            by_pattern.setdefault(each.pattern(self.case), []).append(each.name)
        for pattern, names in by_pattern.items():
            session.reporter.doing([Job(self.case.name, "", f"truth of {pattern}")], COMPILING_S)
            make_truth = functools.partial(compute_truth, pattern, inputs, session.options.pairs)
            failed: dict = {}
            truth, first = session.reporter.attempt(failed, make_truth, "check failed"), None
            for key in itertools.product(names, self.passes):
                rows[key] |= failed
                if truth and (executable := executables.get(key)):
                    session.doing(self.case.name, *key)
                    action = functools.partial(check_pass, truth, executable, inputs, first)
                    checks, out = session.reporter.attempt(rows[key], action, "check failed") or ([], None)
                    correct = bool(checks) and all(check.passed for check in checks)
                    first = out if correct and first is None else first
                    errors = [dataclasses.asdict(check) for check in checks]
                    rows[key] |= {"checked rows": len(truth.rows), "correct": correct, "errors": errors}


def check_pass(
    truth: Truth, executable: Executable, inputs: Arrays, first: jax.Array | None
) -> tuple[list[Check], jax.Array]:
    """The checks of a pass's results, and its output."""
    masked = dataclasses.replace(inputs, dout=mask_rows(truth.rows, inputs.dout))
    results = executable.results(masked)
    return truth.check(results, first), results[0]


def measure(comparison: Comparison, session: Session) -> None:
    """Measures a case, and keeps its rows after every step."""
    case, keep = comparison.case.name, session.reporter.keep
    session.doing(case, "", "inputs")
    rows, inputs = comparison.make_rows(), comparison.make_inputs()
    executables = compile_all(comparison, rows, inputs, session)
    keep(rows.values())
    comparison.check(rows, executables, inputs, session)
    for step in comparison.passes:
        keep(rows.values())
        time_in_turn(case, step, rows, executables, session)
    to_tensors.cache_clear()
    session.doing(case, "", "state of the machine")
    keep(rows.values(), header={f"gpu after {case}": machine.state()}, done=case)


def compile_all(comparison: Comparison, rows: Rows, inputs: typing.Any, session: Session) -> Executables:
    """The passes that compile; those of JAX are compiled in parallel."""
    executables: Executables = {}
    compiling: dict[Future, Job] = {}
    attempt, doing = session.reporter.attempt, session.reporter.doing
    with ThreadPoolExecutor() as threads:
        for each, step in itertools.product(comparison.implementations, comparison.passes):
            job, row = Job(comparison.case.name, each.name, step), rows[each.name, step]
            doing([job, *(other for future, other in compiling.items() if not future.done())], COMPILING_S)
            if reason := session.left_out.get((each.name, step)):
                row["failed"] = reason
                continue
            prepare = functools.partial(each.prepare, comparison.case, step, comparison.function(step), inputs)
            if compile_pass := attempt(row, prepare):
                compiling[threads.submit(compile_pass)] = job
        waiting = set(compiling)
        while waiting:
            doing((compiling[future] for future in waiting), COMPILING_S)
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ready:
                key = compiling[future][1:]
                if executable := attempt(rows[key], future.result):
                    executables[key] = executable
                    rows[key] |= executable.facts
    return executables


def time_in_turn(case: str, step: str, rows: Rows, executables: Executables, session: Session) -> None:
    """Samples a pass of all implementations in turn, one round at least. Implementations that fail drop out."""
    timings = {key: Timing(each.call, each.wait) for key, each in executables.items() if key[1] == step}

    def attempt(key: tuple[str, str], action: Callable[[], None]) -> None:
        if not {"failed", "not run"} & rows[key].keys():
            session.doing(case, *key)
            session.reporter.attempt(rows[key], action)

    for key, timing in timings.items():
        attempt(key, timing.warm_up)
    for _ in range(session.options.repeats):
        for key, timing in timings.items():
            time.sleep(PAUSE_S)
            attempt(key, functools.partial(timing.sample, session.clock))
        if time.monotonic() > session.stop:
            break
    for key, timing in timings.items():
        attempt(key, lambda key=key, timing=timing: rows[key].update(timing.figures()))
