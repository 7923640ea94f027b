"""All of it in one run: correctness at real sizes, then times, sides in turn, point by point, saved after each.

What a side cannot do is a line of its row. What there was no time for is a row that says so.
"""

import dataclasses
import functools
import gc
import pathlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from points import DENSE_POINTS, POINTS, Point, save
from schedules import forward_over_ideal, hopper_tiles, ideal_pairs

import s2jax
from gpu import correctness, machine
from gpu.attempt import attempt
from gpu.device_time import Clock, Queued, choose_clock, in_turn
from gpu.flex import NAMES as FLEX
from gpu.flex import prepare_flex
from gpu.guard import Watch, tried_first
from gpu.guard import lost as guard_lost
from gpu.sides import PASSES, SIDES, Arrays, Limits, Prepared, Side, backward_by_xla, make_arrays, prepare
from s2jax.patterns import Pattern

FIRST = ("dkernel-32k", "phi3-8k", "dense-16k-d128", "s2-7b-128k", "phi3-128k", "s2-1.3b-128k", "s2-70b-128k")
"""In this order, then the rest: what a short run should have."""

GPU_POINTS = tuple(sorted(
    POINTS + DENSE_POINTS, key=lambda point: FIRST.index(point.name) if point.name in FIRST else len(FIRST)
))  # fmt: skip
SIDE_NAMES = (*(side.name for side in SIDES), *FLEX)
OPERATIONS = {"forward": 4.0, "backward": 10.0, "forward + backward": 14.0}
"""Floating-point operations of a token pair and feature."""

MOST_PER_SECOND = 1.0e15
"""More bfloat16 operations a second than a Hopper GPU has."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and how long it may take.

    Attributes:
      pairs: logits held at once when our side is checked, a sixteenth of it for others; more are more rows.
      folder: where the file goes; None for nowhere.
      all_sides: among which `sides` chooses, besides PyTorch's.
      try_first: small calls in a process of its own decide which of our block sizes are left out.
      left_out: our block sizes that are, and why.
      stalled_s: after so long without an answer the run is ended.
      xla_s: passes by XLA's loops are left out that are estimated to take longer.
    """

    points: tuple[Point, ...] = GPU_POINTS
    sides: tuple[str, ...] = SIDE_NAMES
    repeats: int = 5
    budget_s: float = 480
    folder: pathlib.Path | None = None
    pairs: int = correctness.PAIRS
    all_sides: tuple[Side, ...] = SIDES
    flex_device: str = "cuda"
    try_first: bool = True
    left_out: dict[int, str] = dataclasses.field(default_factory=dict)
    stalled_s: float = 150
    xla_s: float = Limits.seconds


class Budget:
    """The time of the run, and how long points have taken so far."""

    def __init__(self, seconds: float):
        self._start, self._seconds, self._longest = time.perf_counter(), seconds, 0.0

    @property
    def spent(self) -> float:
        return time.perf_counter() - self._start

    def is_over(self) -> bool:
        return self.spent > self._seconds

    def skips(self) -> str | None:
        """Why a further point is not begun."""
        if self.spent + 0.6 * self._longest <= self._seconds:
            return None
        return f"time budget: {self.spent:.0f} s of {self._seconds:g} s were spent"

    def took(self, seconds: float) -> None:
        self._longest = max(self._longest, seconds)


def run(options: Options, clock: Clock | None = None) -> list[dict]:
    """Measures all points; the rows, as saved."""
    budget, rows = Budget(options.budget_s), []
    small_calls, untried = tried_first() if options.try_first else ([], {})
    options = dataclasses.replace(options, left_out=untried)
    header: dict = {"machine": machine.describe(), "backward of s2jax by": "xla" if backward_by_xla() else "mosaic_gpu"}
    if clock is None:
        clock, header["clocks tried"] = choose_clock(*matrix_product(), MOST_PER_SECOND)
    header |= {"clock": clock.name, "small calls": small_calls}
    print({name: value for name, value in header.items() if name != "machine"}, flush=True)

    def keep(more: list[dict]) -> None:
        rows.extend(more)
        header.update({"seconds": budget.spent, "machine after": machine.state()})
        if options.folder is not None:
            save("attention_gpu", rows, options.folder, **header)

    point, lost = options.points[0], None
    watch = Watch(options.stalled_s, lambda reason: keep(skipped(point, reason)))
    for point in options.points:
        reason = lost or budget.skips()
        start = time.perf_counter()
        keep(measured(point, options, clock, budget, watch) if reason is None else skipped(point, reason))
        gc.collect()  # of this point's arrays
        budget.took(time.perf_counter() - start)
        lost = lost or guard_lost()
    watch.over()
    return rows


def failures(rows: list[dict]) -> list[str]:
    """What of our own is missing or wrong, a line each: our sides are to run everywhere, and to be right."""
    told = []
    for row in rows:
        if not row["side"].startswith("s2jax"):
            continue
        reasons = [row[name] for name in ("left out", "check failed") if name in row]
        reasons += [f"{name}: {row[f'{name} failed']}" for name in PASSES if f"{name} failed" in row]
        if row.get("correct") is False:
            reasons.append("not correct")
        told += [f"{row['side']} at {row['point']}: {reason}" for reason in reasons]
    return told


def skipped(point: Point, reason: str) -> list[dict]:
    print(f"{point.name}: {reason}", flush=True)
    return [{"point": point.name, "side": "all", "left out": reason}]


def matrix_product(size: int = 8192) -> tuple[Callable, Callable, float]:
    """A known computation to try clocks with: its call, how to wait for it, and its operations."""
    first, second = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    return lambda: product(first, second), jax.block_until_ready, 2.0 * size**3


def measured(point: Point, options: Options, clock: Clock, budget: Budget, watch: Callable[[str], None]) -> list[dict]:
    """The rows of a point, one for each side; `watch` is told what is going on."""
    print(f"{point.name} at {budget.spent:.0f} s", flush=True)
    watch("compiling")
    arrays = make_arrays(point)
    facts = {side.block: facts_of(point, side.block) for side in options.all_sides if side.name in options.sides}
    facts.setdefault(64, facts_of(point, 64))
    prepared, reasons = ready(point, options, arrays, facts)
    rows = {name: {"point": point.name, "side": name} for name in options.sides}
    for name, reason in reasons.items():
        rows[name]["left out"] = reason
    for name, row in rows.items():
        row |= facts[block_of(name, options)]
    for name, checks in checked(point, options, arrays, prepared, watch).items():
        rows[name] |= checks
    for name in PASSES:
        timings = {
            side: each.timing(name, functools.partial(watch, f"{side}, {name}")) for side, each in prepared.items()
        }
        in_turn(timings, clock, options.repeats, enough=budget.is_over)
        unread = {side: timing for side, timing in timings.items() if timing.failed is None and not timing.samples}
        if unread and clock.name != Queued.name:
            in_turn(unread, Queued(), options.repeats, enough=budget.is_over)
            for side in unread:
                rows[side][f"{name} clock"] = Queued.name
        for side, timing in timings.items():
            rows[side] |= timing.row(name)
    for name, each in prepared.items():
        rows[name] |= {f"{what} s": seconds for what, seconds in each.seconds.items()}
    compare(rows, point, options)
    state = machine.state()
    after = {name: state[name] for name in ("clocks.sm", "power.draw", "temperature.gpu") if name in state}
    for row in rows.values():
        row["gpu after"] = after
        print(shown(row), flush=True)
    return list(rows.values())


def block_of(name: str, options: Options) -> int:
    return next((side.block for side in options.all_sides if side.name == name), 64)


@functools.lru_cache
def facts_of(point: Point, block: int) -> dict:
    """What a row says of the pattern before anything runs."""
    pattern = point.pattern(block)
    shape = {"num_heads": point.num_heads, "num_kv_heads": point.num_kv_heads}
    s2jax.compile_schedule.cache_clear()
    start = time.perf_counter()
    schedule = s2jax.compile_schedule(pattern, **shape, query_length=point.tokens, kv_length=point.tokens)
    seconds = time.perf_counter() - start
    heads = np.bincount(schedule.head_index, minlength=schedule.lists.num_walkers)
    density = pattern.density(**shape, length=point.tokens)
    tiles = hopper_tiles(schedule, point.head_dim)
    return {
        "block": schedule.block_size,
        "density": density,
        "ideal speedup": 1 / density,
        "pairs": int((ideal_pairs(schedule) * heads).sum()) * point.batch,
        "forward executed/ideal": forward_over_ideal(schedule, point.head_dim),
        "tiles": dataclasses.asdict(tiles),
        "schedule s": seconds,
    }


def dense_pairs(point: Point) -> int:
    return point.batch * point.num_heads * point.tokens * (point.tokens + 1) // 2


def ready(point: Point, options: Options, arrays: Arrays, facts: dict[int, dict]):
    """The sides compiled, all at once, and why others are not there."""
    prepared: dict[str, Prepared] = {}
    reasons: dict[str, str] = {}
    limits = Limits(options.xla_s, free_bytes=machine.free_bytes())
    with ThreadPoolExecutor() as threads:
        jobs = {}
        for side in options.all_sides:
            if side.block in options.left_out and side.name.startswith("s2jax"):
                reasons[side.name] = options.left_out[side.block]
            elif side.name in options.sides:
                operations = 4.0 * point.head_dim * facts[side.block]["pairs"]
                jobs[side.name] = threads.submit(prepare, side, point, arrays, operations, limits)
        # PyTorch's in this thread, which is the one that calls it later.
        for name in FLEX:
            if name in options.sides:
                _keep(name, lambda name=name: prepare_flex(name, point, arrays, options.flex_device), prepared, reasons)
        for name, job in jobs.items():
            _keep(name, job.result, prepared, reasons)
    return {name: prepared[name] for name in options.sides if name in prepared}, reasons


def _keep(name: str, make: Callable[[], Prepared], prepared: dict, reasons: dict) -> None:
    found, reason = attempt(make)
    if found is None:
        reasons[name] = reason
    else:
        prepared[name] = found


def checked(
    point: Point, options: Options, arrays: Arrays, prepared: dict[str, Prepared], watch: Callable[[str], None]
) -> dict[str, dict]:
    """What each side's results are worth: our main side's in many rows, all others' coarsely."""
    found: dict[str, dict] = {}
    groups: dict[tuple[Pattern, int], list[str]] = {}
    for name in prepared:
        dense = any(side.dense for side in options.all_sides if side.name == name)
        pattern = s2jax.Dense() if dense else point.pattern(block_of(name, options))
        groups.setdefault((pattern, options.pairs if name == "s2jax" else options.pairs >> 4), []).append(name)
    for (pattern, pairs), names in groups.items():
        watch(f"the truth of {pattern}")
        truth, reason = attempt(functools.partial(correctness.truth, pattern, arrays, pairs))
        if truth is None:
            # Times without a check are still told, as unchecked.
            found |= {name: {"check failed": reason} for name in names}
            continue
        dout = correctness.only(truth.rows, arrays.dout)
        for name in names:
            watch(f"checking {name}")
            found[name] = _check(prepared[name], truth, dout)
    return found


def _check(prepared: Prepared, truth: correctness.Truth, dout: jax.Array) -> dict:
    results = prepared.results
    if results is None:
        return {"check failed": "gives no results"}
    checks, reason = attempt(lambda: truth.check(results(dout)))
    if checks is None:
        return {"check failed": reason}
    return {
        "checked rows": len(truth.rows),
        "correct": all(check.passed for check in checks),
        "errors": {check.name: dataclasses.asdict(check) for check in checks},
    }


def compare(rows: dict[str, dict], point: Point, options: Options) -> None:
    """Adds useful TFLOP/s, and speedups over dense attention and over FlexAttention, to the rows."""
    dense = {side.name for side in options.all_sides if side.dense}
    for name, row in rows.items():
        pairs = dense_pairs(point) if name in dense else row["pairs"]
        for each in PASSES:
            milliseconds = row.get(f"{each} ms")
            if milliseconds is None:
                continue
            rate = OPERATIONS[each] * point.head_dim * pairs / milliseconds * 1e3
            row[f"{each} useful TFLOP/s"] = rate / 1e12
            if rate > MOST_PER_SECOND:
                row[f"{each} suspect"] = "more operations a second than this GPU has"
            row |= _speedups(rows, row, name, each, dense)


def _speedups(rows: dict[str, dict], row: dict, name: str, each: str, dense: set[str]) -> dict:
    milliseconds, found = row[f"{each} ms"], {}
    others = {other: rows[other].get(f"{each} ms") for other in rows if other != name}
    cudnn, best = others.get("cudnn"), _least(others[other] for other in dense & set(others))
    flex = _least(others[other] for other in FLEX if other in others)
    if cudnn is not None:
        found[f"{each} over cudnn"] = cudnn / milliseconds
    if best is not None and name not in dense:
        found[f"{each} over best dense"] = best / milliseconds
    # The goals: forward over cuDNN, backward over the best there is.
    over = cudnn if each == "forward" else best
    if over is not None and name not in dense:
        found[f"{each} of ideal"] = over / milliseconds * row["density"]
    if flex is not None and name not in FLEX and name not in dense:
        found[f"{each} over flex"] = flex / milliseconds
    return found


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def shown(row: dict) -> str:
    """A row in one line, for whoever watches."""
    if "left out" in row:
        return f"  {row['side']}: {row['left out']}"
    parts = [f"  {row['side']}: {'correct' if row.get('correct') else 'NOT SHOWN CORRECT'}"]
    parts += [f"check failed: {row['check failed']}"] if "check failed" in row else []
    if row.get("correct") is False:
        parts.append(str({name: (each["error"], each["allowed"]) for name, each in row["errors"].items()}))
    for each in PASSES:
        if f"{each} ms" in row:
            of_ideal = row.get(f"{each} of ideal")
            told = f"{each} {row[f'{each} ms']:.3f} ms, {row[f'{each} useful TFLOP/s']:.0f} TFLOP/s"
            parts.append(told + (f", {of_ideal:.0%} of ideal" if of_ideal is not None else ""))
        else:
            parts.append(f"{each}: {row.get(f'{each} failed')}")
    return "; ".join(parts)
