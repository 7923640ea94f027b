"""Costs of patterns before any kernel runs: density, executed over ideal pairs, time and memory to compile.

    python -m benchmarks.schedules

Ideal pairs are the token pairs that the pattern lets through. Executed pairs are those that the Hopper kernels multiply
with their default configurations, masked and padded pairs included.
"""

import math
import time
import tracemalloc

import numpy as np

import s2jax
from benchmarks.cases import CASES
from benchmarks.record import parser, save, table
from pallas_kernels.mosaic_gpu.sm90.config import (
    ROWS,
    HopperConfig,
    allowed_heads_per_tile,
    choose_config,
    choose_kv_grad_config,
)
from pallas_kernels.mosaic_gpu.sm90.inputs import kv_tables
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.tiling import group_consecutive_rows, merge
from s2jax.compiler import forget_schedules


def ideal_pairs(schedule: BlockSchedule) -> int:
    """Token pairs that the pattern lets through, all heads together. Lengths must be whole blocks."""
    lists, sizes = schedule.lists, schedule.token_masks.sum((1, 2))
    entries = (lists.entries(unique_head)[1] for unique_head in range(lists.num_unique_heads))
    pairs = np.array([sizes[lists.mask_ids[positions]].sum() for positions in entries])
    return int(pairs[schedule.head_index].sum())


def hopper_config(schedule: BlockSchedule, head_dim: int) -> HopperConfig:
    """The configuration that the Hopper kernels choose."""
    heads = allowed_heads_per_tile(schedule, schedule.num_heads, schedule.num_kv_heads)
    return choose_config(head_dim, head_dim, schedule.block_size, schedule.kv_length, heads[-1], heads)


def forward_over_ideal(schedule: BlockSchedule, head_dim: int) -> float:
    """Executed over ideal pairs of the Hopper forward kernel, all heads together.

    Full blocks that do not fill a step join the masked steps.
    """
    config = hopper_config(schedule, head_dim)
    lists, size = schedule.lists, schedule.block_size
    rows = config.block_q // size
    merged = merge(lists, group_consecutive_rows(lists.num_unique_heads, lists.num_rows, rows)).lists
    steps = -(-merged.counts().sum(-1, dtype=np.int64) * size // config.block_kv)
    return float(steps.sum(-1)[schedule.head_index].sum() * config.block_kv * rows * size / ideal_pairs(schedule))


def backward_over_ideal(schedule: BlockSchedule, head_dim: int) -> float:
    """Executed over ideal pairs of the Hopper dk/dv kernel, all heads together."""
    size, group = schedule.block_size, schedule.num_heads // schedule.num_kv_heads
    config = choose_kv_grad_config(head_dim, head_dim, size, schedule.query_length)
    tables = kv_tables(schedule, config.bits_per_word(size))
    lengths = (tables.ranges[..., 1] - tables.ranges[..., 0]).astype(np.int64)
    turns = group // lengths.shape[3]
    full, masked = (
        turns * lengths[..., parts].sum(-1) * size // min(size, config.block_kv)
        for parts in (slice(0, tables.num_full_ranges), slice(tables.num_full_ranges, None))
    )
    slots = config.block_kv // min(size, config.block_kv)
    # Full blocks that do not fill a step join the masked steps.
    steps = full // slots + -(-(full % slots + masked) // slots)
    return float(steps.sum() * config.block_kv * ROWS / ideal_pairs(schedule))


def compiled(pattern, **shapes) -> tuple[BlockSchedule, float, float]:
    """The schedule, the least processor time of five compilations in seconds, and the peak memory in MB."""
    seconds = math.inf
    for _ in range(5):
        forget_schedules()
        start = time.process_time()
        s2jax.compile_schedule(pattern, **shapes)
        seconds = min(seconds, time.process_time() - start)
    forget_schedules()
    tracemalloc.start()
    schedule = s2jax.compile_schedule(pattern, **shapes)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return schedule, seconds, peak


def main() -> None:
    given = parser(__doc__.splitlines()[0]).parse_args()
    rows = []
    for case in CASES:
        for block_size in (64, 16):
            pattern = case.pattern(block_size)
            shapes = {"num_heads": case.num_heads, "num_kv_heads": case.num_kv_heads}
            lengths = {"query_length": case.tokens, "kv_length": case.tokens}
            schedule, seconds, peak = compiled(pattern, **shapes, **lengths)
            forward, backward = (
                forward_over_ideal(schedule, case.head_dim),
                backward_over_ideal(schedule, case.head_dim),
            )
            density = pattern.density(case.num_heads, case.num_kv_heads, case.tokens)
            rows.append({
                "case": case.name, "block": block_size, "density": density, "ideal speedup": 1 / density,
                "forward executed/ideal": forward, "backward executed/ideal": backward,
                "compile s": seconds, "peak MB": peak, "schedule MB": schedule.nbytes / 2**20,
            })  # fmt: skip
    million = {"num_heads": 64, "num_kv_heads": 64, "query_length": 1 << 20, "kv_length": 1 << 20}
    for name, pattern in (("phi3 at 1M", s2jax.LocalStride()), ("s2-70b at 1M", s2jax.LocalStride(64, 1, 64))):
        schedule, seconds, peak = compiled(pattern, **million)
        density = pattern.density(64, 64, 1 << 20)
        rows.append({
            "case": name, "block": 64, "density": density, "ideal speedup": 1 / density,
            "compile s": seconds, "peak MB": peak, "schedule MB": schedule.nbytes / 2**20,
        })  # fmt: skip
    print(table(rows, list(rows[0])))
    save("schedules", rows, given.folder)


if __name__ == "__main__":
    main()
