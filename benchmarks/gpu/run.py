"""All of it in one run: correctness at real sizes, then times, sides in turn, case by case, saved after each pass.

What a side cannot do is a line of its row. What there was no time for is a row that says so. The measuring is done in
another process: when that hangs or dies, what it found is kept, and a new one goes on without the side that did it.
"""

import functools
import gc
import sys
import time
from collections.abc import Callable

import jax

from benchmarks.cases import Case
from benchmarks.gpu import guard, machine, record, train_step
from benchmarks.gpu.device_time import choose_clock, matrix_product
from benchmarks.gpu.guard import Ending, Teller
from benchmarks.gpu.measurement import Measurement
from benchmarks.gpu.options import Budget, Left, Options, TrainStep
from benchmarks.gpu.record import Record
from pallas_kernels.mosaic_gpu.sm90.config import TUNED_PATH


def run(options: Options) -> Record:
    """Measures all cases; what was found, as saved."""
    start = time.monotonic()
    found = Record(options)
    small_calls, untried = guard.tried_first() if options.try_first else ([], {})
    found.keep({"header": {"small calls": small_calls}})
    left_out = {
        side.name: untried[side.block]
        for side in options.all_sides
        if side.name.startswith("s2jax") and side.block in untried
    }
    left = Left(options.cases, left_out)
    while True:
        ending = guard.watched(measure_all, (options, left, start), found.keep, start + options.limit_s)
        left = found.what_is_left(left)
        if ending is None:
            return found
        print(ending, flush=True)
        follows = after(ending, left, found)
        if follows is None:
            return found
        left = follows


def after(ending: Ending, left: Left, found: Record) -> Left | None:
    """What is done when the process did not come to its end; None where nothing can be. The rows say why."""
    reason = str(ending)
    found.cut_short(ending.jobs, reason)
    if ending.too_late or not ending.jobs:
        found.skip(left, "not run" if ending.too_late else "left out", reason)
        return None
    guilty = [job for job in ending.jobs if job.side]
    for job in guilty:
        # What hangs in a training step may do well alone.
        side = f"{job.side} {job.what}" if job.what == train_step.NAME else job.side
        left = left.without(side, job.what, reason)
    # What is no side's fault would happen again.
    return left if guilty else found.skip_one(left, ending.jobs[0].case, reason)


def measure_all(teller: Teller, options: Options, left: Left, start: float) -> None:
    """What is left, in this process."""
    if options.device == "cuda" and jax.default_backend() == "cpu":
        sys.exit("jax runs on the CPU here; without JAX_PLATFORMS=cpu it should see the GPU")
    clock, header = options.clock, {"machine": machine.describe(), "device": record.device()}
    if clock is None:
        clock, header["clocks tried"] = choose_clock(*matrix_product(), machine.MOST_PER_SECOND)
    tiles = "those that tile_search.py measured" if TUNED_PATH.exists() else "its usual ones, nothing was searched"
    header |= {"clock": clock.name, "tiles of s2jax": tiles}
    print({name: value for name, value in header.items() if name != "machine"}, flush=True)
    teller.keep({"header": header})
    budget = Budget(options.budget_s, start, left.longest_s)

    def timed(name: str, measure: Callable[[], None]) -> None:
        begun = time.perf_counter()
        if reason := budget.skips():
            print(f"{name}: {reason}", flush=True)
            teller.keep({"rows": [record.nobodys(name, "not run", reason)]})
        else:
            measure()
        gc.collect()  # of this case's arrays
        budget.took(time.perf_counter() - begun)
        state = {"seconds": budget.spent, "machine after": machine.state()}
        teller.keep({"done": name, "longest s": budget.longest_s, "header": state})

    for case in left.cases:
        timed(case.name, functools.partial(_measure, case, options, left.left_out, clock, budget, teller))


def _measure(case: Case, *rest) -> None:
    if isinstance(case, TrainStep):
        train_step.measure(case, *rest)
    else:
        Measurement(case, *rest).measure()
