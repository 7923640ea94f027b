"""Small calls of the Hopper kernel, each against the reference: one JSON line for each.

Run as a process of its own before the rest, so that a kernel that hangs or spoils the GPU's context spoils no more.
"""

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
from gpu.sides import make_arrays

CASES = (
    (Point("strided", 2, 4, 4, 128, 2, 4, 1024), (64, 32, 16)),
    (Point("strided, groups", 2, 4, 1, 128, 2, 4, 1024), (64, 32, 16)),
    (Point("strided, d 64", 2, 4, 4, 64, 2, 4, 1024), (64,)),
    (Point("dense", 2, 4, 4, 128, 0, 0, 1024), (64,)),
)
"""Points and the block sizes of their patterns."""


def cases() -> list[tuple[Point, int]]:
    """Block 64 first: what comes after one that hangs is not tried."""
    pairs = [(point, block) for point, blocks in CASES for block in blocks]
    return sorted(pairs, key=lambda pair: -pair[1])


def tried(point: Point, block: int, implementation: str) -> dict:
    """How far the kernel is from the reference in the inputs' own precision; float32 truth comes at the real sizes."""
    arrays, pattern = make_arrays(point), point.pattern(block)

    def attention(name: str):
        return lambda q, k, v: s2jax.attention(q, k, v, pattern, implementation=name)

    inputs = arrays.query, arrays.key, arrays.value
    results = []
    for name in (implementation, "reference"):
        out, pull = jax.vjp(jax.jit(attention(name)), *inputs)
        results.append((out, *jax.jit(pull)(arrays.dout)))
    difference = max(
        float(jnp.abs(one.astype(jnp.float32) - other.astype(jnp.float32)).max())
        / float(jnp.abs(other.astype(jnp.float32)).max())
        for one, other in zip(*results, strict=True)
    )
    return {"passed": difference < 2**-5, "difference": difference}


def main(chosen: typing.Iterable[tuple[Point, int]], implementation: str = "mosaic_gpu") -> None:
    for point, block in chosen:
        found, reason = attempt(lambda point=point, block=block: tried(point, block, implementation))
        row = found or {"passed": False, "error": reason}
        print(json.dumps({"point": point.name, "block": block, **row}), flush=True)


if __name__ == "__main__":
    main(cases())
