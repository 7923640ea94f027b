"""What the TPU compiler schedules for attention kernels: bundles, which are cycles, of every step and of a whole call.

    python benchmarks/tpu_schedule.py                       # needs `make compilers`, no TPU; about half an hour
    python benchmarks/tpu_schedule.py --chips v5e --points dense

Ours against JAX's splash attention, and tokamax's where it is installed; bfloat16, head dim 128. Nothing is timed: waits
for copies are in no schedule. A step is the innermost region that uses the matrix units, so many queries by so many
keys. Our total is that of all kernels of a pass for all heads of one sequence, with every bundle of the kernels that is
in no step counted once for every tile. The total of others is that of their steps alone, for the tiles that hold
something to read, at the best of several tile sizes: what they spend between steps is left out, to be fair beyond doubt.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from bundles import DUMP, TpuKernel, kernels_in
from deviceless import compile_for, missing
from points import POINTS, Point, parser, save, table
from tpu_peers import PEERS, steps_of

import s2jax
from pallas_kernels.mosaic_tpu.tables import Tables, key_tables, schedule_tables
from pallas_kernels.mosaic_tpu.tiles import choose_key_tiles, choose_tiles
from pallas_kernels.mosaic_tpu.walk import AT_ONCE

CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
COMPILED_TOKENS = 8 << 10
"""The code does not depend on the length."""

DENSE = Point("dense", 1, 16, 16, 128, 0, 0, 16 << 10)
CASES = {point.name: point for point in (DENSE, *POINTS) if point.name in ("dense", "dkernel-32k", "phi3-128k")}
KERNELS = {"s2jax_forward": "forward", "s2jax_query_gradient": "dq", "s2jax_key_gradients": "dk, dv"}
SIDES = ("ours", *PEERS)


@dataclasses.dataclass(frozen=True)
class Walk:
    """How many steps all tiles of a pass walk, for all heads: by twos without a mask, by twos with one, and alone."""

    tiles: int
    plain: int
    masked: int
    alone: int


def compile_ours(chip: str, point: Point, block_size: int) -> None:
    """Forward and backward."""
    pattern = point.pattern(block_size)

    def function(query, key, value, dout):
        def attend(*arrays):
            return s2jax.attention(*arrays, pattern, implementation="mosaic_tpu")

        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(dout)

    shapes = [
        jax.ShapeDtypeStruct((1, COMPILED_TOKENS, heads, point.head_dim), jnp.bfloat16)
        for heads in (point.num_heads, point.num_kv_heads, point.num_kv_heads, point.num_heads)
    ]
    compile_for(CHIPS[chip], function, *shapes)


def scheduled(*arguments: str) -> list[TpuKernel]:
    """Compiled in a process of its own, for libtpu reads where to write when it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LIBTPU_INIT_ARGS": DUMP.format(folder=folder)}
        command = [sys.executable, __file__, "--compile", *arguments]
        subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
        return kernels_in(pathlib.Path(folder))


def walks(point: Point, block_size: int) -> dict[str, Walk]:
    """Of every pass of ours."""
    heads, lengths = (point.num_heads, point.num_kv_heads), (point.tokens, point.tokens)
    schedule = s2jax.compile_schedule(
        point.pattern(block_size), num_heads=heads[0], num_kv_heads=heads[1], query_length=lengths[0],
        kv_length=lengths[1],
    )  # fmt: skip
    tiles = choose_tiles(schedule, None, *heads, *lengths)
    over_keys = _walk(schedule_tables(schedule, tiles), tiles.keys // min(block_size, tiles.keys))
    keys = choose_key_tiles(schedule, None, *heads, *lengths)
    slots = keys.step // (keys.heads * min(block_size, keys.step // keys.heads))
    over_queries = _walk(key_tables(schedule, keys.rows).walked, slots, heads[0] // heads[1] // keys.heads)
    return {"forward": over_keys, "dq": over_keys, "dk, dv": over_queries}


def _walk(tables: Tables, slots: int, rounds: int = 1) -> Walk:
    lengths = (tables.slices[..., 1] - tables.slices[..., 0]).astype(np.int64)
    full, total = lengths[..., : tables.num_full].sum(-1), lengths.sum(-1)
    steps, plain = np.maximum(-(-total // slots), 1), full // (AT_ONCE * slots)
    whole = steps // AT_ONCE
    return Walk(full.size, *(rounds * int(each.sum()) for each in (plain, whole - plain, steps % AT_ONCE)))


def our_rows(chip: str, point: Point, block_size: int) -> list[dict]:
    kernels = scheduled(chip, "ours", point.name, str(block_size))
    walked, rows = walks(point, block_size), []
    for kernel in kernels:
        way = KERNELS.get(kernel.name.partition(".")[0])
        if way is None:
            continue
        plain, *_, masked, alone = kernel.innermost("MXU")
        around = kernel.bundles - sum(region.bundles for region in kernel.innermost("MXU"))
        walk = walked[way]
        rounds = max(1, (walk.plain + walk.masked + walk.alone) // walk.tiles) and 1
        total = walk.tiles * rounds * around + walk.plain * plain.bundles
        total += walk.masked * masked.bundles + walk.alone * alone.bundles
        rows.append({
            "chip": chip, "point": point.name, "kernel": "ours" if block_size == 64 else f"ours, block {block_size}",
            "pass": way, "tile": _tile(point, block_size, way), "full tile": plain.bundles / AT_ONCE,
            "partial tile": masked.bundles / AT_ONCE, "partial alone": alone.bundles, "around a row": around,
            "MXU slots": plain.slots["MXU"] // AT_ONCE, "of": kernel.capacity["MXU"],
            "spills": (plain.slots["VSTORE:SPILL"] + plain.slots["VLOAD:FILL"]) // AT_ONCE,
            "KB copied": _step(point, way) * 2 * point.head_dim * 2 / 1024, "total M": total / 1e6,
        })  # fmt: skip
    return rows


def _schedule_tiles(point: Point, block_size: int):
    heads, lengths = (point.num_heads, point.num_kv_heads), (point.tokens, point.tokens)
    schedule = s2jax.compile_schedule(
        point.pattern(block_size), num_heads=heads[0], num_kv_heads=heads[1], query_length=lengths[0],
        kv_length=lengths[1],
    )  # fmt: skip
    return choose_tiles(schedule, None, *heads, *lengths), choose_key_tiles(schedule, None, *heads, *lengths)
