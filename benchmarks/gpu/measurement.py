"""One case: its sides are made ready, checked, and timed in turn, pass by pass; what is known is told after each."""

import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

import s2jax
from benchmarks.cases import Case
from benchmarks.gpu import correctness, machine
from benchmarks.gpu.compare import compare, shown
from benchmarks.gpu.device_time import Clock, clocked
from benchmarks.gpu.flex import NAMES as FLEX
from benchmarks.gpu.flex import prepare_flex
from benchmarks.gpu.guard import Job, Teller
from benchmarks.gpu.options import Budget, LeftOuts, Options
from benchmarks.gpu.sides import PASSES, RESULTS, Limits, Prepared, make_arrays, prepare
from benchmarks.schedules import forward_over_ideal, hopper_tiles, ideal_pairs
from s2jax.compiler import forget_schedules
from s2jax.patterns import Pattern


class Measurement:
    """A case while it is measured."""

    def __init__(self, case: Case, options: Options, left_out: LeftOuts, clock: Clock, budget: Budget, teller: Teller):
        self.case, self.options, self.left_out = case, options, left_out
        self.clock, self.budget, self.teller = clock, budget, teller
        self.names = options.sides_at(case)
        self.rows = {name: {"case": case.name, "side": name} for name in self.names}
        self.prepared: dict[str, Prepared] = {}

    def measure(self) -> None:
        print(f"{self.case.name} at {self.budget.spent:.0f} s", flush=True)
        self._doing("", "inputs")
        self.arrays = make_arrays(self.case)
        for name, row in self.rows.items():
            row |= facts_of(self.case, self.options.block_of(name))
        self.make_ready()
        self._tell()
        self.check()
        self._tell()
        for name in PASSES:
            self.time(name)
            self._tell()
        self._finish()

    def make_ready(self) -> None:
        """The sides compiled, JAX's all at once."""
        limits = Limits(self.options.xla_s, free_bytes=machine.free_bytes())
        made: dict[str, Callable[[], Prepared]] = {}
        with ThreadPoolExecutor() as threads:
            for side in self.options.all_sides:
                if side.name in self.names:
                    operations = 4.0 * self.case.head_dim * self.rows[side.name]["pairs"]
                    made[side.name] = threads.submit(
                        prepare, side, self.case, self.arrays, operations, limits,
                        self.left_out.get(side.name), functools.partial(self._compiling, side.name),
                    ).result  # fmt: skip
            # PyTorch's in this thread, which is the one that calls it later.
            for name in FLEX:
                if name in self.names:
                    self._keep(name, functools.partial(
                        prepare_flex, name, self.case, self.arrays, self.options.device, self.left_out.get(name),
                        functools.partial(self._doing, name, limit_s=self.options.compiling_s),
                    ))  # fmt: skip
            self._doing("", "compiling", self.options.compiling_s)
            for name, make in made.items():
                self._keep(name, make)

    def _keep(self, name: str, make: Callable[[], Prepared]) -> None:
        found, reason = self.teller.attempt(make)
        if found is None:
            self.rows[name]["left out"] = reason
        else:
            self.prepared[name] = found
            self.rows[name] |= {f"{what} s": seconds for what, seconds in found.seconds.items()}

    def check(self) -> None:
        """What each side's results are worth: our main side's in many rows, all others' coarsely."""
        groups: dict[tuple[Pattern, int], list[str]] = {}
        for name in self.names:
            if name in self.prepared:
                block = self.options.block_of(name)
                pattern = s2jax.Dense() if name in self._dense() else self.case.pattern(block)
                pairs = self.options.pairs if name == "s2jax" else self.options.pairs >> 4
                groups.setdefault((pattern, pairs), []).append(name)
        for (pattern, pairs), names in groups.items():
            self._doing("", f"the truth of {pattern}", self.options.compiling_s)
            truth, reason = self.teller.attempt(functools.partial(correctness.truth, pattern, self.arrays, pairs))
            if truth is None:
                # Times without a check are still told, as unchecked.
                for name in names:
                    self.rows[name]["check failed"] = reason
                continue
            dout = correctness.only(truth.rows, self.arrays.dout)
            for name in names:
                self._check_side(name, truth, dout)

    def _check_side(self, name: str, truth: correctness.Truth, dout: jax.Array) -> None:
        """Of each pass the very executable that is timed."""
        row, found = self.rows[name], {}
        for each, results in self.prepared[name].results.items():
            self._doing(name, each)

            def checks(results=results, each=each) -> list[correctness.Check]:
                return truth.check(results(dout), RESULTS[each])

            found[each], reason = self.teller.attempt(checks)
            if reason is not None:
                row[f"{each} check failed"] = reason
            else:
                row[f"{each} correct"] = all(check.passed for check in found[each])
        told = {each: [dataclasses.asdict(check) for check in checks] for each, checks in found.items() if checks}
        row |= {"checked rows": len(truth.rows), "errors": told}
        row["correct"] = bool(found) and all(row.get(f"{each} correct", False) for each in found)

    def time(self, name: str) -> None:
        """A pass of all sides in turn. What the clock cannot see is timed by the host's, and compared with no other."""
        timings = {
            side: each.timing(name, functools.partial(self._doing, side, name)) for side, each in self.prepared.items()
        }
        more = {"enough": self.budget.is_over, "tried": self.teller.attempt}
        clocks = clocked(timings, self.clock, self.options.repeats, **more)
        for side, timing in timings.items():
            self.rows[side] |= timing.row(name)
            if timing.samples:
                self.rows[side][f"{name} clock"] = clocks[side]
        compare(self.rows, self.case, name, self._dense())

    def _finish(self) -> None:
        self._doing("", "the state of the machine")
        state = machine.state()
        after = {name: state[name] for name in ("clocks.sm", "power.draw", "temperature.gpu") if name in state}
        for row in self.rows.values():
            row["gpu after"] = after
            print(shown(row), flush=True)
        self._tell()

    def _dense(self) -> set[str]:
        return {side.name for side in self.options.all_sides if side.dense}

    def _doing(self, side: str, what: str, limit_s: float | None = None) -> None:
        self.teller.doing(Job(self.case.name, side, what), limit_s or self.options.stalled_s)

    def _compiling(self, side: str, what: str):
        return self.teller.beside(Job(self.case.name, side, what))

    def _tell(self) -> None:
        self.teller.keep({"rows": list(self.rows.values())})


@functools.lru_cache
def facts_of(case: Case, block: int) -> dict:
    """What a row says of the pattern before anything runs."""
    pattern = case.pattern(block)
    shape = {"num_heads": case.num_heads, "num_kv_heads": case.num_kv_heads}
    forget_schedules()
    start = time.perf_counter()
    schedule = s2jax.compile_schedule(pattern, **shape, query_length=case.tokens, kv_length=case.tokens)
    seconds = time.perf_counter() - start
    heads = np.bincount(schedule.head_index, minlength=schedule.lists.num_unique_heads)
    density = pattern.density(**shape, length=case.tokens)
    tiles = hopper_tiles(schedule, case.head_dim)
    return {
        "block": schedule.block_size,
        "density": density,
        "ideal speedup": 1 / density,
        "pairs": int((ideal_pairs(schedule) * heads).sum()) * case.batch,
        "forward executed/ideal": forward_over_ideal(schedule, case.head_dim),
        "tiles": dataclasses.asdict(tiles),
        "schedule s": seconds,
    }
