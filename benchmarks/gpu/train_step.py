"""A training step of one attention block: the pattern against dense attention, with the memory that each needs.

RMS norm, projections, attention, projection, the residual; the mean of squares, its gradient, a step of SGD. All in
bfloat16. Nothing else of a model is there, so this is what the attention's share of a step becomes.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.cases import Case
from benchmarks.gpu.device_time import Clock, Timing, clocked
from benchmarks.gpu.guard import Job, Teller
from benchmarks.gpu.options import Budget, LeftOuts, Options, TrainStep
from benchmarks.gpu.sides import Attention

NAME = "train step"
RATE = 1e-3

Weights = dict[str, Array]


def make_weights(case: TrainStep, dtype: str = "bfloat16") -> Weights:
    """norm [f], query, key, value [f, h, d], out [h, d, f]."""
    width, heads = case.width, (case.num_heads, case.head_dim)
    keys = jax.random.split(jax.random.key(1), 4)
    weights = {
        name: jax.random.normal(key, (width, *heads), dtype) * width**-0.5
        for name, key in zip(("query", "key", "value"), keys, strict=False)
    }
    out = jax.random.normal(keys[3], (*heads, width), dtype) * width**-0.5
    return weights | {"norm": jnp.ones(width, dtype), "out": out}


def loss(attention: Attention, weights: Weights, x: Float[Array, "b t f"]) -> Float[Array, ""]:
    """The mean of squares of what the block gives."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    normed = normed.astype(x.dtype) * weights["norm"]
    heads = (jnp.einsum("btf,fhd->bthd", normed, weights[name]) for name in ("query", "key", "value"))
    out = x + jnp.einsum("bthd,hdf->btf", attention(*heads), weights["out"])
    return jnp.square(out.astype(jnp.float32)).mean()


def step(attention: Attention, weights: Weights, x: Float[Array, "b t f"]) -> tuple[Array, Weights]:
    """The loss, and the weights after one step."""
    value, gradients = jax.value_and_grad(functools.partial(loss, attention))(weights, x)
    return value, jax.tree.map(lambda weight, gradient: weight - RATE * gradient, weights, gradients)


def attentions(case: TrainStep, options: Options) -> dict[str, Callable[[], Attention]]:
    """By side; the dense peer is cuDNN's where it is to be had."""
    made = {side.name: side.make for side in options.all_sides}
    dense = dataclasses.replace(case, local_blocks=0, vert_stride=0)
    found: dict[str, tuple[str, Case]] = {
        "s2jax": ("s2jax", case), "s2jax dense": ("s2jax", dense), "cudnn": ("cudnn", dense),
    }  # fmt: skip
    wanted = {name: found[name] for name in options.sides_at(case)}
    return {name: functools.partial(made[side], at, 64) for name, (side, at) in wanted.items()}


def measure(
    case: TrainStep, options: Options, left_out: LeftOuts, clock: Clock, budget: Budget, teller: Teller
) -> None:
    """Tells a row for each side."""
    print(f"{case.name} at {budget.spent:.0f} s", flush=True)
    rows = {name: {"case": case.name, "side": name} for name in options.sides_at(case)}

    def doing(side: str, limit_s: float = options.stalled_s) -> None:
        teller.doing(Job(case.name, side, NAME), limit_s)

    doing("")
    weights = make_weights(case)
    x = jax.random.normal(jax.random.key(0), (case.batch, case.tokens, case.width), "bfloat16")
    timings = {}
    for name, make in attentions(case, options).items():
        hung = left_out.get(f"{name} {NAME}") or left_out.get(name.removesuffix(" dense"))
        doing(name, options.compiling_s)
        ready, reason = (None, next(iter(hung.values()))) if hung else teller.attempt(
            functools.partial(_ready, make, weights, x)
        )  # fmt: skip
        if ready is None:
            rows[name]["left out"] = reason
            continue
        call, facts = ready
        rows[name] |= facts
        timings[name] = Timing(call, jax.block_until_ready, functools.partial(doing, name))
    clocks = clocked(timings, clock, options.repeats, enough=budget.is_over, tried=teller.attempt)
    for name, timing in timings.items():
        rows[name] |= timing.row(NAME) | ({f"{NAME} clock": clocks[name]} if timing.samples else {})
    _compare(rows)
    for row in rows.values():
        print(f"  {row}", flush=True)
    teller.keep({"rows": list(rows.values())})


def _ready(make: Callable[[], Attention], weights: Weights, x: Array) -> tuple[Callable, dict]:
    """The call, compiled and run once, and what a row says of it."""
    start = time.perf_counter()
    compiled = jax.jit(functools.partial(step, make())).lower(weights, x).compile()
    seconds = time.perf_counter() - start
    value = float(compiled(weights, x)[0])
    if not math.isfinite(value):
        raise ValueError(f"the loss is {value}")
    facts = {"compile s": seconds, "loss": value} | _memory(compiled)
    return functools.partial(compiled, weights, x), facts


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    memory = compiled.memory_analysis()
    if memory is None:
        return {}
    found = {
        "temporary bytes": memory.temp_size_in_bytes,
        "argument bytes": memory.argument_size_in_bytes,
        "output bytes": memory.output_size_in_bytes,
    }
    return found | {"peak bytes": sum(found.values())}


def _compare(rows: dict[str, dict]) -> None:
    """Speedups over the dense sides, where one clock timed both; and both dense sides have one loss."""
    for row in rows.values():
        for other in ("s2jax dense", "cudnn"):
            theirs = rows.get(other, {})
            same = f"{NAME} ms" in row and row.get(f"{NAME} clock") == theirs.get(f"{NAME} clock")
            if same and row is not theirs:
                row[f"{NAME} over {other}"] = theirs[f"{NAME} ms"] / row[f"{NAME} ms"]
    ours, theirs = (rows.get(name, {}).get("loss") for name in ("s2jax dense", "cudnn"))
    if ours is not None and theirs is not None:
        rows["s2jax dense"]["correct"] = abs(ours - theirs) <= 2**-7 * abs(theirs)
