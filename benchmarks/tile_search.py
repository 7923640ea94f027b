"""Measures all tiles of the Hopper kernel that fit, and keeps the best for each head dim, block size and group.

    python benchmarks/tile_search.py        # on a Hopper GPU, in 3 minutes

The result goes to pallas_kernels/mosaic_gpu/tuned.json, which the kernel reads. What one configuration takes is decided
by all points that have it: the geometric mean of times over those of the tiles taken without a file.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from gpu import machine
from gpu.attempt import attempt
from gpu.device_time import Clock, Timing, choose_clock, in_turn
from gpu.run import MOST_PER_SECOND, matrix_product
from gpu.sides import Arrays, make_arrays
from points import Point, parser, save

import s2jax
from pallas_kernels.mosaic_gpu.tiles import SHARED_BYTES, HopperTiles, choose_heads, usual_tiles
from pallas_kernels.mosaic_gpu.tuned import PATH, Key

SEARCHED = (
    (Point("strided", 1, 16, 16, 128, 8, 16, 32 << 10), (64, 32, 16)),
    (Point("dense d128", 1, 16, 16, 128, 0, 0, 16 << 10), (64,)),
    (Point("strided group", 2, 32, 8, 128, 16, 8, 8 << 10), (64, 32, 16)),
    (Point("dense d64", 1, 32, 32, 64, 0, 0, 16 << 10), (64,)),
    (Point("strided d64", 1, 32, 32, 64, 8, 16, 16 << 10), (64,)),
)
"""Points and the block sizes of their patterns."""

KEYS = (32, 64, 128, 256)
MARGIN = 0.98
"""Tiles that are not faster than the usual ones by this much are not taken: it may be noise."""


@dataclasses.dataclass
class Candidate:
    """Tiles, and the milliseconds that they take at each point."""

    tiles: HopperTiles
    milliseconds: dict[str, float] = dataclasses.field(default_factory=dict)
    failed: str | None = None

    def score(self, usual: "Candidate") -> float:
        """The geometric mean of times over the usual tiles'; infinite where something is missing."""
        ratios = [self.milliseconds.get(name, math.inf) / value for name, value in usual.milliseconds.items()]
        return statistics.geometric_mean(ratios) if ratios and all(map(math.isfinite, ratios)) else math.inf


def key_of(point: Point, block: int) -> tuple[Key, tuple[int, ...]]:
    """What the file knows a point by, and the heads that a tile can have."""
    schedule = s2jax.compile_schedule(
        point.pattern(block), num_heads=point.num_heads, num_kv_heads=point.num_kv_heads,
        query_length=point.tokens, kv_length=point.tokens,
    )  # fmt: skip
    heads = choose_heads(schedule, None, point.num_heads, point.num_kv_heads)
    return (point.head_dim, point.head_dim, schedule.block_size, heads[-1]), heads


def fitting(key: Key, heads: tuple[int, ...]) -> Iterator[HopperTiles]:
    """Tiles whose buffers fit; of accumulators beyond 64 × 256 the compiler could keep nothing in registers."""
    head_dim, value_dim, block_size, _ = key
    for number, keys, stages in itertools.product(heads, KEYS, (2, 3, 4)):
        tiles = HopperTiles(number, keys, stages)
        fits = tiles.shared_bytes(head_dim, value_dim, block_size, 3) <= SHARED_BYTES
        if fits and keys + value_dim <= 320 and keys >= min(block_size, 64):
            yield tiles


def search(key: Key, points: list[tuple[Point, int]], clock: Clock, implementation: str = "mosaic_gpu") -> dict:
    """The row of one configuration: points are those that have it."""
    heads = key_of(*points[0])[1]
    usual = Candidate(usual_tiles(*key[:3], points[0][0].tokens, key[3]))
    others = [Candidate(tiles) for tiles in fitting(key, heads) if tiles != usual.tiles]
    candidates = [usual, *others]
    for point, block in points:
        measure(point, block, candidates, clock, implementation)
    if usual.failed is not None:
        raise RuntimeError(f"{usual.tiles}: {usual.failed}")
    best = min(candidates, key=lambda each: each.score(usual))
    if best.score(usual) > MARGIN:
        best = usual
    head_dim, value_dim, block_size, most_heads = key
    return {
        "head_dim": head_dim, "value_dim": value_dim, "block_size": block_size, "most_heads": most_heads,
        "tiles": dataclasses.asdict(best.tiles), "usual": dataclasses.asdict(usual.tiles),
        "of usual": best.score(usual),
        "tried": [dataclasses.asdict(each) for each in candidates],
    }  # fmt: skip


def measure(point: Point, block: int, candidates: list[Candidate], clock: Clock, implementation: str) -> None:
    """Times all candidates at a point, in turn; one that computes anything else than the first fails."""
    arrays, pattern = make_arrays(point), point.pattern(block)
    name = f"{point.name}, block {block}"
    with ThreadPoolExecutor() as threads:
        jobs = [threads.submit(_compiled, pattern, arrays, each.tiles, implementation) for each in candidates]
    inputs = arrays.query, arrays.key, arrays.value
    first, timings = None, {}
    for each, job in zip(candidates, jobs, strict=True):
        tried, each.failed = attempt(lambda job=job, first=first: _agreeing(job.result(), inputs, first))
        if tried is None:
            continue
        compiled, out = tried
        first = out if first is None else first
        timings[each.tiles] = Timing(functools.partial(compiled, *inputs), jax.block_until_ready)
    in_turn(timings, clock, repeats=3, burst_ms=10, pause_s=0.005)
    for each in candidates:
        timing = timings.get(each.tiles)
        if timing is not None and timing.samples:
            each.milliseconds[name] = statistics.median(sample.device_ms for sample in timing.samples)
        elif timing is not None:
            each.failed = timing.failed or "; ".join(timing.rejected)


def _agreeing(compiled: jax.stages.Compiled, inputs: tuple, first: jax.Array | None):
    """It and its output, which is that of the first tiles but for rounding."""
    out = compiled(*inputs)
    if first is not None:
        difference = float(jnp.abs(out.astype(jnp.float32) - first.astype(jnp.float32)).max())
        if not difference <= 2**-6:
            raise ValueError(f"differs by {difference:.3g} from the first tiles")
    return compiled, out


def _compiled(pattern, arrays: Arrays, tiles: HopperTiles, implementation: str) -> jax.stages.Compiled:
    def attention(query, key, value):
        options = {"tiles": tiles} if implementation == "mosaic_gpu" else {}
        return s2jax.attention(query, key, value, pattern, implementation=implementation, **options)

    return jax.jit(attention).lower(arrays.query, arrays.key, arrays.value).compile()


def main() -> None:
    if not machine.has_gpu():
        sys.exit("tiles are measured on a Hopper GPU, and here is none")
    machine.set_environment()
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--folder", type=pathlib.Path, default=PATH.parent, help="where tuned.json goes")
    options.add_argument("--budget-s", type=float, default=180, help="seconds after which nothing more is begun")
    chosen = options.parse_args()
    start, entries, failed, header = time.perf_counter(), [], [], {"machine": machine.describe()}
    clock, header["clocks tried"] = choose_clock(*matrix_product(), MOST_PER_SECOND)
    groups: dict[Key, list[tuple[Point, int]]] = {}
    for point, blocks in SEARCHED:
        for block in blocks:
            groups.setdefault(key_of(point, block)[0], []).append((point, block))
    for key, points in groups.items():
        if time.perf_counter() - start > chosen.budget_s:
            print(f"{key}: no time left", flush=True)
            continue
        entry, reason = attempt(lambda key=key, points=points: search(key, points, clock))
        if entry is None:
            failed.append(f"{key}: {reason}")
            print(failed[-1], flush=True)
            continue
        entries.append(entry)
        print(f"{key}: {entry['tiles']}, {entry['of usual']:.3f} of the time with {entry['usual']}", flush=True)
        save("tuned", entries, chosen.folder, clock=clock.name, **header)
    if failed:
        sys.exit("\n".join(["what was found is kept, but not everything was:", *failed]))


if __name__ == "__main__":
    main()
