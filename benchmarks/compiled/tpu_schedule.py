"""Bundles (cycles) that the TPU compiler schedules for attention kernels, per step and per call.

    python -m benchmarks.compiled.tpu_schedule                       # needs `make compilers`, no TPU; about 20 minutes
    python -m benchmarks.compiled.tpu_schedule --chips v5e --cases dense

Our kernels are compared with JAX's splash attention, and with tokamax's where it is installed: bfloat16, head dim 128,
causal. Nothing is timed, and waits for copies are not counted. A step is the innermost region that uses the matrix
units; it computes one tile of queries by keys. Our regions hold two steps, and half of a region counts.

The total is for one sequence and all heads. Ours counts every bundle outside of the steps once per row of tiles. The
peers' counts their steps alone, for the tiles in which something is read, at the best of several tile sizes. Bundles
between their steps and on empty tiles are left out.
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

import s2jax
from benchmarks.cases import CASES, Case
from benchmarks.compiled.deviceless import compile_for, missing
from benchmarks.compiled.tpu_bundles import DUMP, TpuKernel, kernels_in
from benchmarks.compiled.tpu_peers import KERNELS, TILES, Tile, gradients_of, has_tokamax, tiles_read
from benchmarks.record import parser, save, table
from pallas_kernels.mosaic_tpu.config import STEPS_PER_GROUP, choose_config, choose_kv_grad_config
from pallas_kernels.mosaic_tpu.entries import EntryLists, kv_tables, q_tables
from pallas_kernels.schedule import BlockSchedule

ROOT = pathlib.Path(__file__).parents[2]
CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
DENSE = Case("dense", 1, 16, 16, 128, 0, 0, 32 << 10)
TPU_CASES = {each.name: each for each in (DENSE, *CASES) if each.name in ("dense", "dkernel-32k", "phi3-128k")}
OURS = {"s2jax_forward": "forward", "s2jax_query_gradient": "dq", "s2jax_key_gradients": "dk, dv"}
BACKWARD = ("dq", "dk, dv", "dq, dk, dv")


@dataclasses.dataclass(frozen=True)
class StepCounts:
    """Numbers of rows of tiles and of step groups: full pairs, masked pairs, and single steps."""

    rows: int
    plain: int
    masked: int
    alone: int


@dataclasses.dataclass(frozen=True)
class Pass:
    """The tile and the step counts of one of our passes."""

    tile: Tile
    steps: StepCounts


def compile_ours(chip: str, case: Case, block_size: int) -> None:
    """Compiles our forward and backward passes at the real length, on which the KV tiles depend."""
    pattern = case.pattern(block_size)

    def function(query, key, value, dout):
        def attend(*arrays):
            return s2jax.attention(*arrays, pattern, implementation="mosaic_tpu")

        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(dout)

    heads = case.num_heads, case.num_kv_heads, case.num_kv_heads, case.num_heads
    shapes = [jax.ShapeDtypeStruct((1, case.tokens, each, case.head_dim), jnp.bfloat16) for each in heads]
    compile_for(CHIPS[chip], function, *shapes)


def compile_peer(chip: str, name: str, tile: Tile) -> None:
    function, shapes = gradients_of(name, tile)
    compile_for(CHIPS[chip], function, *shapes)


def scheduled(*arguments) -> list[TpuKernel]:
    """Kernels compiled in a process of their own, as libtpu reads its output folder when it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LIBTPU_INIT_ARGS": DUMP.format(folder=folder)}
        command = [sys.executable, "-m", "benchmarks.compiled.tpu_schedule", "--compile", *map(str, arguments)]
        found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if found.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{found.stderr[-2000:]}")
        return kernels_in(pathlib.Path(folder))


def schedule_of(case: Case, block_size: int) -> BlockSchedule:
    return s2jax.compile_schedule(
        case.pattern(block_size), num_heads=case.num_heads, num_kv_heads=case.num_kv_heads,
        query_length=case.tokens, kv_length=case.tokens,
    )  # fmt: skip


def our_passes(schedule: BlockSchedule) -> dict[str, Pass]:
    """Our passes, counted from the kernels' own tables."""
    size = schedule.block_size
    shapes = schedule, schedule.num_heads, schedule.num_kv_heads, schedule.query_length, schedule.kv_length
    config, kv_config = choose_config(*shapes), choose_kv_grad_config(*shapes)
    over_keys = _count_steps(q_tables(schedule, config), config.block_kv // min(size, config.block_kv), 1)
    heads, queries = kv_config.heads_per_step, kv_config.step_size // kv_config.heads_per_step
    head_passes = schedule.num_heads // schedule.num_kv_heads // heads if schedule.shares_groups else 1
    over_queries = _count_steps(kv_tables(schedule, kv_config).queries, queries // min(size, queries), head_passes)
    forward = Pass(Tile(config.rows, config.block_kv), over_keys)
    backward = Pass(Tile(kv_config.step_size, kv_config.block_kv), over_queries)
    return {"forward": forward, "dq": forward, "dk, dv": backward}


def _count_steps(tables: EntryLists, slots: int, head_passes: int) -> StepCounts:
    lengths = (tables.ranges[..., 1] - tables.ranges[..., 0]).astype(np.int64)
    full, total = lengths[..., : tables.num_full_ranges].sum(-1), lengths.sum(-1)
    steps, plain = np.maximum(-(-total // slots), 1), full // (STEPS_PER_GROUP * slots)
    counts = full.size, plain.sum(), (steps // STEPS_PER_GROUP - plain).sum(), (steps % STEPS_PER_GROUP).sum()
    return StepCounts(*(head_passes * int(each) for each in counts))


def our_rows(chip: str, case: Case, block_size: int) -> list[dict]:
    passes, rows = our_passes(schedule_of(case, block_size)), []
    for kernel in scheduled(chip, "ours", case.name, block_size):
        way = OURS.get(kernel.name.partition(".")[0])
        if way is None:
            continue
        steps = kernel.innermost("MXU")
        # The compiler may emit the masked region twice, for one iteration and for several.
        plain, masked, alone = steps[0], steps[-2], steps[-1]
        if masked.bundles < 0.8 * plain.bundles:
            print(
                f"{chip}, {case.name}, {way}: its steps are cut into several regions, which are not put together here"
            )
            continue
        around = kernel.bundles - sum(step.bundles for step in steps)
        tile, counts = passes[way].tile, passes[way].steps
        total = counts.rows * around + counts.plain * plain.bundles + counts.masked * masked.bundles
        rows.append({
            "chip": chip, "case": case.name, "kernel": "ours" if block_size == 64 else f"ours, block {block_size}",
            "pass": way, "tile": str(tile), **_of_step(kernel, plain, STEPS_PER_GROUP),
            "partial tile": masked.bundles / STEPS_PER_GROUP, "alone": alone.bundles, "around a row": around,
            "total M": (total + counts.alone * alone.bundles) / 1e6,
        })  # fmt: skip
        rows[-1]["KB a tile"] = (tile.keys if way != "dk, dv" else tile.queries) * 2 * case.head_dim * 2 / 1024
    return rows


def _of_step(kernel: TpuKernel, step, number: int) -> dict:
    return {
        "full tile": step.bundles / number, "MXU slots": step.slots["MXU"] / number, "of": kernel.capacity["MXU"],
        "spills": (step.slots["VSTORE:SPILL"] + step.slots["VLOAD:FILL"]) / number,
    }  # fmt: skip


def peer_steps(chip: str, name: str) -> list[dict]:
    """Bundles of a peer's steps at all tile sizes."""
    rows = []
    for tile in TILES:
        for kernel in scheduled(chip, name, tile.queries, tile.keys):
            ways = [way for begins, way in KERNELS[name].items() if kernel.name.startswith(begins)]
            if ways:
                step = max(kernel.innermost("MXU"), key=lambda step: step.bundles)
                walked = tile.queries if ways[0].endswith("dv") else tile.keys
                rows.append({
                    "chip": chip, "kernel": name, "pass": ways[0], "tile": str(tile), **_of_step(kernel, step, 1),
                    "KB a tile": walked * 2 * 128 * 2 / 1024, "size": (tile.queries, tile.keys),
                })  # fmt: skip
    return rows


def peer_rows(steps: list[dict], case: Case) -> list[dict]:
    """The row of each pass at the tile size with the least total; for a dense pattern also 512×512."""
    schedule, rows = schedule_of(case, 64), []
    for way in dict.fromkeys(step["pass"] for step in steps):
        mine = []
        for step in steps:
            if step["pass"] == way:
                total = step["full tile"] * tiles_read(schedule, Tile(*step["size"])) / 1e6
                mine.append({**step, "case": case.name, "total M": total})
        best = min(mine, key=lambda row: row["total M"])
        rows += [row for row in mine if row is best or (case.is_dense and row["size"] == (512, 512))]
    return [{name: value for name, value in row.items() if name != "size"} for row in rows]


def ratios(rows: list[dict]) -> list[dict]:
    """Our total over each peer's best, forward and backward."""
    found = []
    for chip, case in dict.fromkeys((row["chip"], row["case"]) for row in rows):
        here = [row for row in rows if (row["chip"], row["case"]) == (chip, case)]
        for way, passes in (("forward", ("forward",)), ("backward", BACKWARD)):
            sums = {
                kernel: sum(
                    min(row["total M"] for row in here if row["kernel"] == kernel and row["pass"] == each)
                    for each in dict.fromkeys(row["pass"] for row in here if row["kernel"] == kernel)
                    if each in passes
                )
                for kernel in dict.fromkeys(row["kernel"] for row in here)
            }
            ours = sums.pop("ours")
            if way == "backward" and len([row for row in here if row["kernel"] == "ours"]) < len(OURS):
                continue
            found.append({"chip": chip, "pass": way, "case": case, "ours M": ours} | {
                f"{'of ' + kernel if 'ours' not in kernel else kernel + ' over block 64'}":
                total / ours if "ours" in kernel else ours / total for kernel, total in sums.items()
            })  # fmt: skip
    return found


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--chips", nargs="+", default=list(CHIPS), choices=CHIPS)
    arguments.add_argument("--cases", nargs="+", default=list(TPU_CASES), choices=TPU_CASES)
    given, rows = arguments.parse_args(), []
    if reason := missing("v5e:2x2"):
        sys.exit(reason)
    for chip in given.chips:
        steps = [row for name in KERNELS if name != "tokamax" or has_tokamax() for row in peer_steps(chip, name)]
        for case in (TPU_CASES[name] for name in given.cases):
            for block_size in (64, 16) if case.name == "dkernel-32k" else (64,):
                rows += our_rows(chip, case, block_size)
            # Tokamax has one mask for all heads.
            rows += peer_rows([step for step in steps if case.is_dense or step["kernel"] != "tokamax"], case)
        print(table([row for row in rows if row["chip"] == chip], list(max(rows, key=len))), flush=True)
    compared = ratios(rows)
    print(table(compared, list(max(compared, key=len))))
    save("tpu_schedule", rows, given.folder, ratios=compared)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        chip, side, *rest = sys.argv[2:]
        if side == "ours":
            compile_ours(chip, TPU_CASES[rest[0]], int(rest[1]))
        else:
            compile_peer(chip, side, Tile(*map(int, rest)))
    else:
        main()
