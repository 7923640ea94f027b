"""Sparse attention against dense attention, forward and backward, side by side in one run.

    python -m benchmarks.attention                 # all cases that fit this machine
    python -m benchmarks.attention --cases cpu-8k --repeats 9
    python -m benchmarks.attention --all           # on a Hopper GPU: all cases and sides, in less than 8 minutes

All sides take turns, on random inputs; the median of the repeats counts. "of ideal" is the speedup times the density: 1
means that the time shrank exactly as the blocks that are read did. On a CPU the speedup is over the faster of two dense
attentions: chunks that skip what lies above the diagonal, and the op itself with the pattern `Dense`. On a GPU it is
over cuDNN, times are the GPU's own, and results are checked at the same sizes: see `gpu/`.
"""

import argparse
import pathlib
import signal
import statistics
import sys
import time

import jax
import jax.numpy as jnp

import s2jax
from benchmarks.cases import CPU_CASES, Case
from benchmarks.dense import chunked_causal
from benchmarks.gpu import machine, run
from benchmarks.gpu.options import GPU_CASES, SIDE_NAMES, Options
from benchmarks.record import RESULTS, parser, save, table


def timed(functions: dict, arguments, repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, in turn."""
    for function in functions.values():
        jax.block_until_ready(function(*arguments))
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            seconds[name].append(time.perf_counter() - start)
    return seconds


def with_gradients(function):
    """Forward and backward; the output is a result too, so that no side can leave its forward pass out."""

    def both(query, key, value, dout):
        out, pull = jax.vjp(function, query, key, value)
        return out, pull(dout)

    return jax.jit(both)


def measure(case: Case, dtype: str, repeats: int) -> dict:
    pattern = case.pattern()
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (case.batch, case.tokens, case.num_heads, case.head_dim)
    kv_shape = (case.batch, case.tokens, case.num_kv_heads, case.head_dim)
    query, dout = (jax.random.normal(key, shape, dtype) for key in keys[:2])
    key, value = (jax.random.normal(key, kv_shape, dtype) for key in keys[2:])

    def sparse(query, key, value):
        return s2jax.attention(query, key, value, pattern)

    def own_dense(query, key, value):
        return s2jax.attention(query, key, value, s2jax.Dense())

    sides = {"sparse": sparse, "chunked": chunked_causal, "own dense": own_dense}
    forward = timed({name: jax.jit(side) for name, side in sides.items()}, (query, key, value), repeats)
    both = timed({name: with_gradients(side) for name, side in sides.items()}, (query, key, value, dout), repeats)
    density = pattern.density(case.num_heads, case.num_kv_heads, case.tokens)
    row = {"case": case.name, "dtype": dtype, "density": density, "ideal speedup": 1 / density}
    medians = {"forward": _medians(forward), "forward + backward": _medians(both)}
    medians["backward"] = {side: medians["forward + backward"][side] - medians["forward"][side] for side in sides}
    for name, seconds in medians.items():
        fastest = min(seconds["chunked"], seconds["own dense"])
        row |= {f"{name} {side} s": value for side, value in seconds.items()}
        row |= {
            f"{name} speedup": fastest / seconds["sparse"],
            f"{name} of ideal": fastest / seconds["sparse"] * density,
        }
    for side, function in sides.items():
        row[f"{side} temporaries MB"] = _temporaries(function, query, key, value, dout) / 2**20
    return row


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {side: statistics.median(values) for side, values in seconds.items()}


def _temporaries(function, *arguments) -> int:
    memory = with_gradients(function).lower(*arguments).compile().memory_analysis()
    return memory.temp_size_in_bytes


def on_cpu(chosen: argparse.Namespace) -> None:
    jnp.zeros(()).block_until_ready()
    rows = []
    for case in CPU_CASES:
        if chosen.cases is None or case.name in chosen.cases:
            rows.append(measure(case, chosen.dtype, chosen.repeats))
            print({name: round(value, 3) if isinstance(value, float) else value for name, value in rows[-1].items()})
    columns = ["case", "density", "ideal speedup", "forward speedup", "forward of ideal", "backward speedup"]
    print(table(rows, [*columns, "backward of ideal", "sparse temporaries MB", "chunked temporaries MB"]))
    save("attention_cpu", rows, chosen.folder)


def on_gpu(chosen: argparse.Namespace) -> None:
    cases = tuple(case for case in GPU_CASES if chosen.cases is None or case.name in chosen.cases)
    options = Options(
        cases, tuple(chosen.sides or SIDE_NAMES), chosen.repeats, chosen.budget_s, folder=chosen.folder,
        xla_s=chosen.xla_s,
    )  # fmt: skip
    machine.leave_alone()
    # Whatever hangs, be it the end of this process, the system ends it. All rows are saved as they come.
    signal.alarm(int(options.limit_s) + 15)
    found = run.run(options)
    print(f"written to {chosen.folder}/attention_gpu.json", flush=True)
    if failed := found.failures():
        sys.exit("\n".join(["what was measured is kept, but s2jax failed:", *failed]))


def arguments(cpu: bool) -> argparse.ArgumentParser:
    options = parser(__doc__.splitlines()[0])
    names = [case.name for case in (CPU_CASES if cpu else GPU_CASES)]
    which = options.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="all cases, as without --cases")
    which.add_argument("--cases", nargs="+", choices=names, help="which cases; all by default")
    options.add_argument("--repeats", type=int, default=5, help="counted runs of each side")
    options.add_argument("--folder", type=pathlib.Path, default=RESULTS, help="where the results go")
    if cpu:
        options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the inputs")
    else:
        options.add_argument("--sides", nargs="+", choices=SIDE_NAMES, help="which sides; all by default")
        options.add_argument(
            "--budget-s", type=float, default=Options.budget_s, help="seconds in which cases should end"
        )
        options.add_argument(
            "--xla-s", type=float, default=Options.xla_s, help="leaves out XLA's passes that take longer a call"
        )
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
