"""What patterns cost before any kernel runs: density, executed over ideal pairs, time and memory to compile.

    python benchmarks/schedules.py

Ideal pairs are the token pairs that the pattern lets through. Executed pairs are those of 128-query tiles that walk
128 keys at a time (forward), and of 128-key packs that walk 64 queries at a time (backward), masks and rounding
included: what a kernel of these tiles multiplies.
"""

import time
import tracemalloc

import numpy as np
from points import POINTS, parser, save, table

import s2jax
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.tiles import alike, merge, neighbours


def ideal_pairs(schedule: BlockSchedule) -> np.ndarray:
    """Token pairs of every distinct head; lengths are whole blocks."""
    lists, sizes = schedule.lists, schedule.token_masks.sum((1, 2))
    return np.array([sizes[lists.masks[lists.entries(walker)[1]]].sum() for walker in range(lists.num_walkers)])


def executed_over_ideal(schedule: BlockSchedule, tile: int = 128, step: int = 64) -> tuple[float, float]:
    """Of the forward and the backward pass, all heads together."""
    size, lists, readers = schedule.block_size, schedule.lists, schedule.transposed
    heads = np.bincount(schedule.head_index, minlength=lists.num_walkers)
    forward = merge(lists, neighbours(lists.num_walkers, lists.num_rows, tile // size)).executed_blocks(tile // size)
    backward = merge(readers, alike(readers, tile // size)).executed_blocks(step // size)
    ideal = (ideal_pairs(schedule) * heads).sum()
    return tuple(float((blocks * heads).sum() * size**2 / ideal) for blocks in (forward, backward))


def compiled(pattern, **shapes) -> tuple[BlockSchedule, float, float]:
    """The schedule, the seconds to compile it, and the megabytes it took at most."""
    start = time.perf_counter()
    s2jax.compile_schedule(pattern, **shapes)
    seconds = time.perf_counter() - start
    s2jax.compile_schedule.cache_clear()
    tracemalloc.start()
    schedule = s2jax.compile_schedule(pattern, **shapes)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return schedule, seconds, peak


def main() -> None:
    parser(__doc__.splitlines()[0]).parse_args()
    rows = []
    for point in POINTS:
        for block_size in (64, 16):
            pattern = point.pattern(block_size)
            shapes = {"num_heads": point.num_heads, "num_kv_heads": point.num_kv_heads}
            lengths = {"query_length": point.tokens, "kv_length": point.tokens}
            schedule, seconds, peak = compiled(pattern, **shapes, **lengths)
            forward, backward = executed_over_ideal(schedule)
            density = pattern.density(point.num_heads, point.num_kv_heads, point.tokens)
            rows.append({
                "point": point.name, "block": block_size, "density": density, "ideal speedup": 1 / density,
                "forward executed/ideal": forward, "backward executed/ideal": backward,
                "compile s": seconds, "peak MB": peak, "schedule MB": schedule.nbytes / 2**20,
            })  # fmt: skip
    million = {"num_heads": 64, "num_kv_heads": 64, "query_length": 1 << 20, "kv_length": 1 << 20}
    for name, pattern in (("phi3 at 1M", s2jax.LocalStride()), ("s2-70b at 1M", s2jax.LocalStride(64, 1, 64))):
        schedule, seconds, peak = compiled(pattern, **million)
        density = pattern.density(64, 64, 1 << 20)
        rows.append({
            "point": name, "block": 64, "density": density, "ideal speedup": 1 / density,
            "compile s": seconds, "peak MB": peak, "schedule MB": schedule.nbytes / 2**20,
        })  # fmt: skip
    print(table(rows, list(rows[0])))
    save("schedules", rows)


if __name__ == "__main__":
    main()
