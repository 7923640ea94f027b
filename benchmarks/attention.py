"""Sparse attention against dense attention, forward and backward, side by side in one run.

    python benchmarks/attention.py                 # all points that fit this machine
    python benchmarks/attention.py --points cpu-8k --repeats 9

All sides take turns, on random inputs; the median of the repeats counts. The speedup is over the faster of two dense
attentions: chunks that skip what lies above the diagonal, and the op itself with the pattern `Dense`. "of ideal" is the
speedup times the density: 1 means that the time shrank exactly as the blocks that are read did.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from dense import chunked_causal
from points import CPU_POINTS, Point, parser, save, table

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


def with_gradients(function):
    """Forward and backward; the output is a result too, so that no side can leave its forward pass out."""

    def both(query, key, value, dout):
        out, pull = jax.vjp(function, query, key, value)
        return out, pull(dout)

    return jax.jit(both)


def measure(point: Point, dtype: str, repeats: int) -> dict:
    pattern = point.pattern()
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (point.batch, point.tokens, point.num_heads, point.head_dim)
    kv_shape = (point.batch, point.tokens, point.num_kv_heads, point.head_dim)
    query, dout = (jax.random.normal(key, shape, dtype) for key in keys[:2])
    key, value = (jax.random.normal(key, kv_shape, dtype) for key in keys[2:])

    def sparse(query, key, value):
        return s2jax.attention(query, key, value, pattern)

    def own_dense(query, key, value):
        return s2jax.attention(query, key, value, s2jax.Dense())

    sides = {"sparse": sparse, "chunked": chunked_causal, "own dense": own_dense}
    forward = timed({name: jax.jit(side) for name, side in sides.items()}, (query, key, value), repeats)
    both = timed({name: with_gradients(side) for name, side in sides.items()}, (query, key, value, dout), repeats)
    density = pattern.density(point.num_heads, point.num_kv_heads, point.tokens)
    row = {"point": point.name, "dtype": dtype, "density": density, "ideal speedup": 1 / density}
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
    print(table(rows, [*columns, "backward of ideal", "sparse temporaries MB", "chunked temporaries MB"]))
    save("attention_cpu", rows)


if __name__ == "__main__":
    main()
