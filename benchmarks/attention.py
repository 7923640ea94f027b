"""Sparse attention against dense attention, forward and backward, side by side in one run.

    python -m benchmarks.attention                 # all cases that fit this machine
    python -m benchmarks.attention --cases cpu-8k --repeats 9
    python -m benchmarks.attention --all           # on a Hopper GPU: everything, in less than 8 minutes

All implementations take turns, on random inputs; the median of the repeats counts. "of ideal" is the speedup times the
density: 1 means that the time shrank exactly as the number of blocks did. On a CPU the speedup is over the faster of
two dense attentions: chunks that skip the upper triangle, and the op itself with the pattern `Dense`. On a GPU it is
over cuDNN, times are the GPU's own, and results are checked at the same sizes: see `gpu/`.
"""

import argparse
import contextlib
import functools
import signal
import statistics
import sys
import time

import jax

import s2jax
from benchmarks.cases import CPU_CASES, Case
from benchmarks.dense import chunked_causal
from benchmarks.gpu import machine
from benchmarks.gpu.comparison import Options
from benchmarks.gpu.implementations import FUNCTIONS, make_arrays
from benchmarks.gpu.run import GRACE_S, Record, run
from benchmarks.gpu.suite import ALL, GPU_CASES, compare
from benchmarks.record import parser, save, table


def timed(functions: dict, arguments, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call; the functions take turns."""
    for function in functions.values():
        jax.block_until_ready(function(*arguments))
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(case: Case, dtype: str, repeats: int) -> dict:
    """The row of a case: seconds by pass and implementation, speedups over the faster dense one, temporaries."""
    pattern, arrays = case.pattern(), make_arrays(case, dtype)
    attentions = {
        "sparse": functools.partial(s2jax.attention, pattern=pattern),
        "chunked": chunked_causal,
        "own dense": functools.partial(s2jax.attention, pattern=s2jax.Dense()),
    }
    density = pattern.density(case.num_heads, case.num_kv_heads, case.tokens)
    row = {"case": case.name, "dtype": dtype, "density": density, "ideal speedup": 1 / density}
    medians = {}
    for step, function in FUNCTIONS.items():
        compiled = {name: jax.jit(function(each)).lower(arrays).compile() for name, each in attentions.items()}
        seconds = timed(compiled, (arrays,), repeats)
        medians[step] = {name: statistics.median(values) for name, values in seconds.items()}
    both = medians["forward + backward"]
    medians["backward"] = {name: both[name] - seconds for name, seconds in medians["forward"].items()}
    for step, seconds in medians.items():
        speedup = min(seconds["chunked"], seconds["own dense"]) / seconds["sparse"]
        row |= {f"{step} {name} s": value for name, value in seconds.items()}
        row |= {f"{step} speedup": speedup, f"{step} of ideal": speedup * density}
    for name, each in compiled.items():  # of both passes
        row[f"{name} temporaries MB"] = each.memory_analysis().temp_size_in_bytes / 2**20
    return row


def on_cpu(chosen: argparse.Namespace) -> None:
    rows = []
    for case in CPU_CASES:
        if chosen.cases is None or case.name in chosen.cases:
            rows.append(measure(case, chosen.dtype, chosen.repeats))
            print({name: round(value, 3) if isinstance(value, float) else value for name, value in rows[-1].items()})
    columns = ["case", "density", "ideal speedup", "forward speedup", "forward of ideal", "backward speedup"]
    print(table(rows, [*columns, "backward of ideal", "sparse temporaries MB", "chunked temporaries MB"]))
    save("attention_cpu", rows, chosen.folder)


def on_gpu(chosen: argparse.Namespace) -> None:
    comparisons = tuple(
        compare(case, chosen.implementations) for case in GPU_CASES if chosen.cases is None or case.name in chosen.cases
    )
    options, path = Options(chosen.repeats, chosen.budget_s), chosen.folder / "attention_gpu.json"

    def write(rows: list[dict], header: dict) -> None:
        with contextlib.redirect_stdout(None):
            save("attention_gpu", rows, chosen.folder, **header)

    record = Record.resume(path, write) if chosen.resume else Record(write)
    machine.leave_alone()
    # The system ends this process if it hangs. All rows are saved as they come.
    signal.alarm(int(options.budget_s) + 2 * GRACE_S)
    run(comparisons, options, record)
    print(f"written to {path}", flush=True)
    if failed := record.failures():
        sys.exit("\n".join(["what was measured is kept, but s2jax failed:", *failed]))


def arguments(cpu: bool) -> argparse.ArgumentParser:
    options = parser(__doc__.splitlines()[0])
    which = options.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="all cases, as without --cases")
    names = [case.name for case in (CPU_CASES if cpu else GPU_CASES)]
    which.add_argument("--cases", nargs="+", choices=names, help="cases to run; all by default")
    options.add_argument("--repeats", type=int, default=5, help="counted runs of each implementation")
    if cpu:
        options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the inputs")
        return options
    names = [each.name for each in ALL]
    options.add_argument("--implementations", nargs="+", choices=names, default=names, help="implementations to time")
    options.add_argument("--budget-s", type=float, default=Options.budget_s, help="seconds; nothing is begun later")
    options.add_argument("--resume", action="store_true", help="measure what the results file in the folder lacks")
    return options


def main() -> None:
    cpu = not machine.has_gpu()
    if not cpu:
        machine.set_environment()
    chosen = arguments(cpu).parse_args()
    if cpu and jax.default_backend() != "cpu":
        sys.exit(f"jax runs on {jax.default_backend()}; with JAX_PLATFORMS=cpu this measures the CPU")
    (on_cpu if cpu else on_gpu)(chosen)


if __name__ == "__main__":
    main()
