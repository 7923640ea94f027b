"""Sparse attention against dense attention, forward and backward, side by side in one run.

    python benchmarks/attention.py                 # all points that fit this machine
    python benchmarks/attention.py --points cpu-8k --repeats 9

The two sides take turns, on random inputs; the median of the repeats counts. "of ideal" is the speedup times the
density: 1 means that the time shrank exactly as the blocks that are read did.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from dense import chunked_causal
from points import CPU_POINTS, Point, parser, save, table
from schedules import executed_over_ideal

import s2jax


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


def gradients(function):
    """The backward pass alone: its inputs are what the forward pass leaves behind."""

    def pull(query, key, value, dout):
        return jax.vjp(function, query, key, value)[1](dout)

    return jax.jit(pull)


def measure(point: Point, dtype: str, repeats: int) -> dict:
    pattern = point.pattern()
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (point.batch, point.tokens, point.num_heads, point.head_dim)
    kv_shape = (point.batch, point.tokens, point.num_kv_heads, point.head_dim)
    query, dout = (jax.random.normal(key, shape, dtype) for key in keys[:2])
    key, value = (jax.random.normal(key, kv_shape, dtype) for key in keys[2:])

    def sparse(query, key, value):
        return s2jax.attention(query, key, value, pattern)

    forward = timed({"sparse": jax.jit(sparse), "dense": jax.jit(chunked_causal)}, (query, key, value), repeats)
    both = timed({"sparse": gradients(sparse), "dense": gradients(chunked_causal)}, (query, key, value, dout), repeats)
    density = pattern.density(point.num_heads, point.num_kv_heads, point.tokens)
    schedule = s2jax.compile_schedule(
        pattern, num_heads=point.num_heads, num_kv_heads=point.num_kv_heads,
        query_length=point.tokens, kv_length=point.tokens,
    )  # fmt: skip
    executed = executed_over_ideal(schedule)
    row = {"point": point.name, "dtype": dtype, "density": density, "ideal speedup": 1 / density}
    for name, seconds, ratio in (("forward", forward, executed[0]), ("forward + backward", both, executed[1])):
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        speedup = medians["dense"] / medians["sparse"]
        row |= {
            f"{name} s": medians["sparse"], f"{name} dense s": medians["dense"],
            f"{name} speedup": speedup, f"{name} of ideal": speedup * density, f"{name} executed/ideal": ratio,
        }  # fmt: skip
    alone = {side: row[f"forward + backward{side} s"] - row[f"forward{side} s"] for side in ("", " dense")}
    return row | {
        "backward speedup": alone[" dense"] / alone[""], "backward of ideal": alone[" dense"] / alone[""] * density,
        "temporaries MB": _temporaries(sparse, query, key, value, dout) / 2**20,
        "dense temporaries MB": _temporaries(chunked_causal, query, key, value, dout) / 2**20,
    }  # fmt: skip


def _temporaries(function, *arguments) -> int:
    memory = gradients(function).lower(*arguments).compile().memory_analysis()
    return memory.temp_size_in_bytes


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    names = [point.name for point in CPU_POINTS]
    options.add_argument("--points", nargs="+", choices=names, default=names, help="which points")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of query, key, value")
    options.add_argument("--repeats", type=int, default=5, help="counted runs of each side")
    chosen = options.parse_args()
    if jax.default_backend() != "cpu":
        options.error("the points of this benchmark are for a CPU; run it with JAX_PLATFORMS=cpu")
    jnp.zeros(()).block_until_ready()
    rows = []
    for point in CPU_POINTS:
        if point.name in chosen.points:
            rows.append(measure(point, chosen.dtype, chosen.repeats))
            print({name: round(value, 3) if isinstance(value, float) else value for name, value in rows[-1].items()})
    columns = ["point", "density", "ideal speedup", "forward speedup", "forward of ideal", "backward speedup"]
    print(table(rows, [*columns, "backward of ideal", "temporaries MB", "dense temporaries MB"]))
    save("attention_cpu", rows)


if __name__ == "__main__":
    main()
