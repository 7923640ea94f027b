"""Measures all configurations of the Hopper forward kernel that fit, and keeps the fastest for each kind of call.

    python -m benchmarks.tile_search        # on a Hopper GPU, in 4 minutes

The result goes to pallas_kernels/mosaic_gpu/sm90/tuned.json, which the kernel reads. A kind of call is a head dim, a
block size and a group. Its cases decide together, by the geometric mean of times over the default configuration's.
"""

import dataclasses
import functools
import itertools
import math
import signal
import statistics
import sys
from collections.abc import Iterable, Iterator

import s2jax
from benchmarks.cases import Case
from benchmarks.gpu import machine
from benchmarks.gpu.comparison import Comparison, Options
from benchmarks.gpu.implementations import HOPPER, Implementation
from benchmarks.gpu.run import GRACE_S, Record, run
from benchmarks.record import parser, save
from pallas_kernels.mosaic_gpu.sm90.config import (
    SHARED_BYTES,
    TUNED_PATH,
    HopperConfig,
    Key,
    allowed_heads_per_tile,
    default_config,
)

SEARCHED = tuple(
    (Case(f"{name}, block {block}", *shape), block)
    for name, shape, blocks in (
        ("strided", (1, 16, 16, 128, 8, 16, 32 << 10), (64, 32, 16)),
        ("dense d128", (1, 16, 16, 128, 0, 0, 16 << 10), (64,)),
        ("strided group", (2, 32, 8, 128, 16, 8, 8 << 10), (64, 32, 16)),
        ("dense d64", (1, 32, 32, 64, 0, 0, 16 << 10), (64,)),
        ("strided d64", (1, 32, 32, 64, 8, 16, 16 << 10), (64,)),
    )
    for block in blocks
)
"""Cases and the block sizes of their patterns."""

BLOCK_KV = (32, 64, 128, 256)
MARGIN = 0.98
"""A configuration must take less than this share of the default's time; smaller gains may be noise."""


def key_of(case: Case, block: int) -> tuple[Key, tuple[int, ...]]:
    """The kind of call, and the possible numbers of heads in a tile."""
    schedule = s2jax.compile_schedule(
        case.pattern(block), num_heads=case.num_heads, num_kv_heads=case.num_kv_heads,
        query_length=case.tokens, kv_length=case.tokens,
    )  # fmt: skip
    heads = allowed_heads_per_tile(schedule, case.num_heads, case.num_kv_heads)
    return (case.head_dim, case.head_dim, schedule.block_size, heads[-1]), heads


def fitting(key: Key, heads: tuple[int, ...]) -> Iterator[HopperConfig]:
    """Yields configurations whose buffers fit. Accumulators beyond 64 × 256 would not stay in registers."""
    head_dim, value_dim, block_size, _ = key
    for number, block_kv, stages in itertools.product(heads, BLOCK_KV, (2, 3, 4)):
        config = HopperConfig(number, block_kv, stages)
        fits = config.shared_bytes(head_dim, value_dim, block_size, 3) <= SHARED_BYTES
        if fits and block_kv + value_dim <= 320 and block_kv >= min(block_size, 64):
            yield config


def candidates(case: Case, block: int) -> tuple[HopperConfig, ...]:
    """The default configuration, then all others that fit."""
    key, heads = key_of(case, block)
    return tuple(dict.fromkeys((default_config(*key[:3], case.tokens, key[3]), *fitting(key, heads))))


def compare(case: Case, block: int) -> Comparison:
    attentions = {config: functools.partial(HOPPER, config=config) for config in candidates(case, block)}
    named = (Implementation(str(config), make, block=block) for config, make in attentions.items())
    return Comparison(case, tuple(named), ("forward",))


def best_configs(rows: list[dict], searched: Iterable[tuple[Case, int]] = SEARCHED) -> list[dict]:
    """Rows of tuned.json for the kinds of call whose cases are all measured."""
    times = {(row["case"], row["implementation"]): row["ms"] for row in rows if row.get("correct") and "ms" in row}
    by_key: dict[Key, list[tuple[Case, int]]] = {}
    for case, block in searched:
        by_key.setdefault(key_of(case, block)[0], []).append((case, block))
    best = []
    for key, cases in by_key.items():
        default, *others = candidates(*cases[0])
        scores = {default: 1.0} | {
            config: statistics.geometric_mean(
                times.get((case.name, str(config)), math.inf) / times.get((case.name, str(default)), 1.0)
                for case, _ in cases
            )
            for config in others
        }
        fastest = min(scores, key=scores.__getitem__)
        config = fastest if scores[fastest] <= MARGIN else default
        if all((case.name, str(default)) in times for case, _ in cases):
            names = ("head_dim", "value_dim", "block_size", "most_heads")
            row = dict(zip(names, key, strict=True)) | {"config": dataclasses.asdict(config)}
            best.append(row | {"default": dataclasses.asdict(default), "over default": scores[config]})
    return best


def main() -> None:
    if not machine.has_gpu():
        sys.exit("configurations are measured on a Hopper GPU, and here is none")
    machine.set_environment()
    arguments = parser(__doc__.splitlines()[0])
    arguments.set_defaults(folder=TUNED_PATH.parent)
    arguments.add_argument("--budget-s", type=float, default=240, help="seconds; nothing is begun later")
    given = arguments.parse_args()
    machine.leave_alone()
    signal.alarm(int(given.budget_s) + 2 * GRACE_S)  # in case this process hangs at its end

    def write(rows: list[dict], header: dict) -> None:
        save("tuned", best_configs(rows), given.folder, measured=rows, **header)

    comparisons, record = tuple(compare(*each) for each in SEARCHED), Record(write)
    run(comparisons, Options(repeats=3, budget_s=given.budget_s), record)
    if missing := [each.case.name for each in record.left(comparisons)]:
        sys.exit(f"what was found is kept, but these cases were not measured: {', '.join(missing)}")


if __name__ == "__main__":
    main()
