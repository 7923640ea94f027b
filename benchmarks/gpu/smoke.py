"""Small calls of the Hopper kernel, each against the reference: one JSON line for each.

Run as a process of its own before the rest, so that a kernel that hangs or spoils the GPU's context spoils no more.
"""

import functools
import json
import typing

import jax
import jax.numpy as jnp

import s2jax
from benchmarks.cases import Case
from benchmarks.gpu.attempt import attempt
from benchmarks.gpu.sides import PASSES, make_arrays

SMALL = (
    (Case("strided", 2, 4, 4, 128, 2, 4, 1024), (64, 32, 16)),
    (Case("strided, groups", 2, 4, 1, 128, 2, 4, 1024), (64, 32, 16)),
    (Case("strided, d 64", 2, 4, 4, 64, 2, 4, 1024), (64,)),
    (Case("dense", 2, 4, 4, 128, 0, 0, 1024), (64,)),
)
"""Cases and the block sizes of their patterns."""

Call = tuple[Case, int, str]
"""A case, a block size and a pass."""


def calls() -> list[Call]:
    """Forward first, and block 64: what comes after one that hangs is not tried."""
    found = [(case, block, what) for case, blocks in SMALL for block in blocks for what in PASSES[:2]]
    return sorted(found, key=lambda call: (PASSES.index(call[2]), -call[1]))


def tried(case: Case, block: int, what: str, implementation: str) -> dict:
    """How far the kernel is from the reference in the inputs' own precision; float32 truth comes at the real sizes."""
    arrays, pattern = make_arrays(case), case.pattern(block)

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


def main(chosen: typing.Iterable[Call], implementation: str = "mosaic_gpu") -> None:
    for call in chosen:
        found, reason = attempt(functools.partial(tried, *call, implementation))
        row = found or {"passed": False, "error": reason}
        case, block, what = call
        print(json.dumps({"case": case.name, "block": block, "pass": what, **row}), flush=True)


if __name__ == "__main__":
    main(calls())
