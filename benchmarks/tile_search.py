"""Measures all tiles of the Hopper kernel that fit, and keeps the best for each head dim, block size and group.

    python -m benchmarks.tile_search        # on a Hopper GPU, in 3 minutes

The result goes to pallas_kernels/mosaic_gpu/sm90/tuned.json, which the kernel reads. What one configuration takes is
decided by all cases that have it: the geometric mean of times over those of the tiles taken without a file.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax

import s2jax
from benchmarks.cases import Case
from benchmarks.gpu import correctness, guard, machine
from benchmarks.gpu.device_time import Clock, Timing, choose_clock, in_turn, matrix_product
from benchmarks.gpu.guard import Job, Teller
from benchmarks.gpu.record import device
from benchmarks.gpu.sides import Arrays, make_arrays
from benchmarks.record import parser, save
from pallas_kernels.mosaic_gpu.sm90.config import (
    SHARED_BYTES,
    TUNED_PATH,
    HopperConfig,
    Key,
    choose_heads,
    default_config,
)

SEARCHED = (
    (Case("strided", 1, 16, 16, 128, 8, 16, 32 << 10), (64, 32, 16)),
    (Case("dense d128", 1, 16, 16, 128, 0, 0, 16 << 10), (64,)),
    (Case("strided group", 2, 32, 8, 128, 16, 8, 8 << 10), (64, 32, 16)),
    (Case("dense d64", 1, 32, 32, 64, 0, 0, 16 << 10), (64,)),
    (Case("strided d64", 1, 32, 32, 64, 8, 16, 16 << 10), (64,)),
)
"""Cases and the block sizes of their patterns."""

Cases = list[tuple[Case, int]]
"""Each with the block size of its pattern."""

HANGS_S, COMPILES_S = 60, 150
"""A call, and compiling all tiles of a case, take less."""

KEYS = (32, 64, 128, 256)
MARGIN = 0.98
"""Tiles that are not faster than the usual ones by this much are not taken: it may be noise."""


@dataclasses.dataclass
class Candidate:
    """Tiles, and the milliseconds that they take at each case."""

    config: HopperConfig
    milliseconds: dict[str, float] = dataclasses.field(default_factory=dict)
    failed: str | None = None

    def score(self, usual: "Candidate") -> float:
        """The geometric mean of times over the usual tiles'; infinite where something is missing."""
        ratios = [self.milliseconds.get(name, math.inf) / value for name, value in usual.milliseconds.items()]
        return statistics.geometric_mean(ratios) if ratios and all(map(math.isfinite, ratios)) else math.inf


def key_of(case: Case, block: int) -> tuple[Key, tuple[int, ...]]:
    """What the file knows a case by, and the heads that a tile can have."""
    schedule = s2jax.compile_schedule(
        case.pattern(block), num_heads=case.num_heads, num_kv_heads=case.num_kv_heads,
        query_length=case.tokens, kv_length=case.tokens,
    )  # fmt: skip
    heads = choose_heads(schedule, None, case.num_heads, case.num_kv_heads)
    return (case.head_dim, case.head_dim, schedule.block_size, heads[-1]), heads


def fitting(key: Key, heads: tuple[int, ...]) -> Iterator[HopperConfig]:
    """Tiles whose buffers fit; of accumulators beyond 64 × 256 the compiler could keep nothing in registers."""
    head_dim, value_dim, block_size, _ = key
    for number, keys, stages in itertools.product(heads, KEYS, (2, 3, 4)):
        tiles = HopperConfig(number, keys, stages)
        fits = tiles.shared_bytes(head_dim, value_dim, block_size, 3) <= SHARED_BYTES
        if fits and keys + value_dim <= 320 and keys >= min(block_size, 64):
            yield tiles


def search(key: Key, cases: Cases, clock: Clock, teller: Teller, implementation: str = "mosaic_gpu") -> dict:
    """The row of one configuration: cases are those that have it."""
    heads = key_of(*cases[0])[1]
    usual = Candidate(default_config(*key[:3], cases[0][0].tokens, key[3]))
    others = [Candidate(tiles) for tiles in fitting(key, heads) if tiles != usual.config]
    candidates = [usual, *others]
    for case, block in cases:
        # What failed once is not taken, however well it does elsewhere.
        measure(case, block, [each for each in candidates if each.failed is None], clock, teller, implementation)
        if usual.failed is not None:
            raise RuntimeError(f"{usual.config} at {case.name}: {usual.failed}")
    best = min(candidates, key=lambda each: each.score(usual))
    if best.score(usual) > MARGIN:
        best = usual
    head_dim, value_dim, block_size, most_heads = key
    return {
        "head_dim": head_dim, "value_dim": value_dim, "block_size": block_size, "most_heads": most_heads,
        "config": dataclasses.asdict(best.config), "usual": dataclasses.asdict(usual.config),
        "of usual": best.score(usual),
        "tried": [dataclasses.asdict(each) for each in candidates],
    }  # fmt: skip


def measure(
    case: Case, block: int, candidates: list[Candidate], clock: Clock, teller: Teller, implementation: str
) -> None:
    """Times all candidates at a case, in turn; one that computes anything else than the pattern's attention fails."""
    arrays, pattern = make_arrays(case), case.pattern(block)
    name = f"{case.name}, block {block}"
    inputs = arrays.query, arrays.key, arrays.value

    def job_of(each: Candidate) -> Job:
        return Job(name, str(each.config))

    def doing(each: Candidate) -> None:
        teller.doing(job_of(each), HANGS_S)

    teller.doing(Job(name, "", "compiling"), COMPILES_S)
    with ThreadPoolExecutor() as threads:
        jobs = [
            threads.submit(_compiled, pattern, arrays, each.config, implementation, teller.beside(job_of(each)))
            for each in candidates
        ]
        truth = correctness.truth(pattern, arrays)
    first, timings = None, {}
    for each, job in zip(candidates, jobs, strict=True):
        doing(each)
        tried, each.failed = teller.attempt(lambda job=job, first=first: agreeing(job.result(), inputs, truth, first))
        if tried is None:
            continue
        compiled, out = tried
        first = out if first is None else first
        timings[each.config] = Timing(
            functools.partial(compiled, *inputs), jax.block_until_ready, functools.partial(doing, each)
        )
    in_turn(timings, clock, repeats=3, burst_ms=10, pause_s=0.005, tried=teller.attempt)
    for each in candidates:
        timing = timings.get(each.config)
        if timing is not None and timing.samples:
            each.milliseconds[name] = statistics.median(sample.device_ms for sample in timing.samples)
        elif timing is not None:
            each.failed = timing.failed or "; ".join(timing.rejected)


def agreeing(compiled: Callable, inputs: tuple, truth: correctness.Truth, first: jax.Array | None):
    """It and its output, which is right in the sampled rows, and in all others that of the first tiles."""
    out = compiled(*inputs)
    checks = truth.check((out,)) + ([] if first is None else [truth.alike(first, out)])
    for check in checks:
        if not check.passed:
            raise ValueError(f"wrong by {check.error:.3g} of {check.allowed:.3g} allowed, at positions {check.band}")
    return compiled, out


def _compiled(pattern, arrays: Arrays, config: HopperConfig, implementation: str, compiling) -> jax.stages.Compiled:
    def attention(query, key, value):
        options = {"config": config} if implementation == "mosaic_gpu" else {}
        return s2jax.attention(query, key, value, pattern, implementation=implementation, **options)

    with compiling:
        return jax.jit(attention).lower(arrays.query, arrays.key, arrays.value).compile()


def groups() -> dict[Key, Cases]:
    """All cases that are searched, by configuration."""
    found: dict[Key, Cases] = {}
    for case, blocks in SEARCHED:
        for block in blocks:
            found.setdefault(key_of(case, block)[0], []).append((case, block))
    return found


def search_all(teller: Teller, left: dict[Key, Cases], stop: float) -> None:
    """Searches what is left, in a process that is watched; nothing is begun after `stop`."""
    header: dict = {"machine": machine.describe(), "device": device()}
    clock, header["clocks tried"] = choose_clock(*matrix_product(), machine.MOST_PER_SECOND)
    teller.keep({"header": header | {"clock": clock.name}})
    for key, cases in left.items():
        if time.monotonic() > stop:
            print(f"{key}: no time left", flush=True)
            continue
        entry, reason = teller.attempt(lambda key=key, cases=cases: search(key, cases, clock, teller))
        teller.keep({"key": key, "entry": entry, "reason": reason})


class Found:
    """What was found so far, by the process that touches no GPU."""

    def __init__(self, folder: pathlib.Path, left: dict[Key, Cases]):
        self.folder, self.left = folder, left
        self.entries, self.failed, self.header = [], [], {}

    def keep(self, message: dict) -> None:
        self.header |= message.get("header", {})
        if "key" not in message:
            return
        key, entry = message["key"], message["entry"]
        self.left.pop(key)
        if entry is None:
            self.failed.append(f"{key}: {message['reason']}")
            print(self.failed[-1], flush=True)
            return
        self.entries.append(entry)
        print(f"{key}: {entry['config']}, {entry['of usual']:.3f} of the time with {entry['usual']}", flush=True)
        save("tuned", self.entries, self.folder, **self.header)

    def ended(self, ending: guard.Ending) -> bool:
        """Keeps why the process ended; whether another can go on, without the configuration that did it."""
        reason = str(ending)
        if ending.too_late or not ending.jobs:
            self.failed.append(reason)
            return False
        self.keep({"key": next(iter(self.left)), "entry": None, "reason": reason})
        return bool(self.left)


def main() -> None:
    if not machine.has_gpu():
        sys.exit("tiles are measured on a Hopper GPU, and here is none")
    machine.set_environment()
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--folder", type=pathlib.Path, default=TUNED_PATH.parent, help="where tuned.json goes")
    options.add_argument("--budget-s", type=float, default=180, help="seconds after which nothing more is begun")
    chosen = options.parse_args()
    machine.leave_alone()
    stop = time.monotonic() + chosen.budget_s
    signal.alarm(int(chosen.budget_s) + COMPILES_S + 30)  # should the end of this process hang
    found = Found(chosen.folder, groups())
    while ending := guard.watched(search_all, (found.left, stop), found.keep, stop + COMPILES_S):
        if not found.ended(ending):
            break
    if found.failed:
        sys.exit("\n".join(["what was found is kept, but not everything was:", *found.failed]))


if __name__ == "__main__":
    main()
