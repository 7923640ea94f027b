"""Small calls of the Hopper kernel, each against the reference: one JSON line for each.

Run as a process of its own before the rest, so that a kernel that hangs or spoils the GPU's context spoils no more.
"""

import functools
import json
import pathlib
import sys
import typing

if __name__ == "__main__":  # as a script: the modules beside this folder, and the packages beside that
    sys.path[:0] = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parents[2])]

import jax
import jax.numpy as jnp
from points import Point

import s2jax
from gpu.attempt import attempt
from gpu.sides import PASSES, make_arrays

CASES = (
    (Point("strided", 2, 4, 4, 128, 2, 4, 1024), (64, 32, 16)),
    (Point("strided, groups", 2, 4, 1, 128, 2, 4, 1024), (64, 32, 16)),
    (Point("strided, d 64", 2, 4, 4, 64, 2, 4, 1024), (64,)),
    (Point("dense", 2, 4, 4, 128, 0, 0, 1024), (64,)),
)
"""Points and the block sizes of their patterns."""

Case = tuple[Point, int, str]
"""A point, a block size and a pass."""


def cases() -> list[Case]:
    """Forward first, and block 64: what comes after one that hangs is not tried."""
    found = [(point, block, what) for point, blocks in CASES for block in blocks for what in PASSES[:2]]
    return sorted(found, key=lambda case: (PASSES.index(case[2]), -case[1]))


def tried(point: Point, block: int, what: str, implementation: str) -> dict:
    """How far the kernel is from the reference in the inputs' own precision; float32 truth comes at the real sizes."""
    arrays, pattern = make_arrays(point), point.pattern(block)

    def attention(name: str):
        return lambda q, k, v: s2jax.attention(q, k, v, pattern, implementation=name)

    inputs = arrays.query, arrays.key, arrays.value
    results = []
    for name in (implementation, "reference"):
        if what == "forward":
            results.append((jax.jit(attention(name))(*inputs),))
        else:
            _, pull = jax.vjp(jax.jit(attention(name)), *inputs)
            results.append(jax.jit(pull)(arrays.dout))
    difference = max(
        float(jnp.abs(one.astype(jnp.float32) - other.astype(jnp.float32)).max())
        / float(jnp.abs(other.astype(jnp.float32)).max())
        for one, other in zip(*results, strict=True)
    )
    return {"passed": difference < 2**-5, "difference": difference}


def main(chosen: typing.Iterable[Case], implementation: str = "mosaic_gpu") -> None:
    for case in chosen:
        found, reason = attempt(functools.partial(tried, *case, implementation))
        row = found or {"passed": False, "error": reason}
        point, block, what = case
        print(json.dumps({"point": point.name, "block": block, "pass": what, **row}), flush=True)


if __name__ == "__main__":
    main(cases())
