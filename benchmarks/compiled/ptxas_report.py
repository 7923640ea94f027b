"""Compiled Hopper kernels at real shapes: registers, spills, shared memory, instructions per step.

    python -m benchmarks.compiled.ptxas_report      # needs `make compilers`, no GPU

Nothing is timed. Steps are the inner loops of the compute warpgroups, the first for full blocks and the second for
partial ones; loads are the inner loops of the load warpgroup. Spills outside of these loops occur once per tile.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp

import s2jax
from benchmarks.compiled.deviceless import KernelCode, kernels_of, missing, ptxas_version
from benchmarks.record import parser, save, table
from s2jax.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of the op."""

    name: str
    pattern: Pattern
    batch: int = 1
    tokens: int = 128 << 10
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    value_dim: int = 128
    dtype: str = "bfloat16"
    soft_cap: float | None = None
    sinks: bool = False
    segments: bool = False
    selection: bool = False
    config: s2jax.HopperConfig | None = None


WINDOW = s2jax.LocalStride(64, 16, 8)
CASES = (
    *(Case(f"d {d}", WINDOW, head_dim=d, value_dim=d) for d in (64, 96, 128, 192, 256)),
    Case("d 192, e 128", WINDOW, head_dim=192),
    Case("d 192, e 256", WINDOW, head_dim=192, value_dim=256),
    *(Case(f"block {size}", s2jax.LocalStride(size, 1024 // size, 8)) for size in (16, 32, 128)),
    Case("groups read apart", s2jax.LocalStride(64, 16, 8, residues="query_head")),
    Case("block 16, no groups", s2jax.LocalStride(16, 64, 8), num_kv_heads=32),
    Case("d 256, block 128", s2jax.LocalStride(128, 8, 8), head_dim=256, value_dim=256),
    Case("d 64, 256 keys", WINDOW, head_dim=64, value_dim=64, config=s2jax.HopperConfig(2, 256, 2)),
    Case("no groups", s2jax.LocalStride(64, 8, 16), num_heads=16, num_kv_heads=16, tokens=32 << 10, batch=4),
    Case("70B, 1M tokens", s2jax.LocalStride(64, 1, 64), tokens=1 << 20, num_heads=64, num_kv_heads=64),
    Case("dense", s2jax.Dense(), tokens=16 << 10),
    Case("both ways", s2jax.Dense(causal=False), tokens=16 << 10),
    Case("odd length", WINDOW, tokens=8 * 1024 + 5),
    Case("few keys", WINDOW, tokens=20),
    Case("eight heads a tile", s2jax.LocalStride(16, 64, 8), num_kv_heads=4, config=s2jax.HopperConfig(8, 128, 2)),
    Case("float16", WINDOW, dtype="float16"),
    Case("soft cap", WINDOW, soft_cap=30.0),
    Case("sinks", WINDOW, sinks=True),
    Case("segments", WINDOW, segments=True, batch=2, tokens=32 << 10),
    Case("eight heads, segments", s2jax.LocalStride(16, 64, 8), num_kv_heads=4, segments=True, tokens=32 << 10),
    Case(
        "all together, block 16, heads apart",
        s2jax.LocalStride(16, 64, 8, residues="query_head"),
        soft_cap=30.0,
        sinks=True,
        segments=True,
        batch=2,
        tokens=8 << 10,
    ),
    Case("selection", WINDOW, selection=True, tokens=32 << 10),
    Case("all together", WINDOW, soft_cap=30.0, sinks=True, segments=True, tokens=32 << 10),
)


def compiled(case: Case) -> list[dict]:
    """Rows of the table, one per kernel: the forward pass, then the gradients."""
    batch, tokens, heads, kv_heads = case.batch, case.tokens, case.num_heads, case.num_kv_heads
    shape = jax.ShapeDtypeStruct
    inputs = (
        shape((batch, tokens, heads, case.head_dim), case.dtype),
        shape((batch, tokens, kv_heads, case.head_dim), case.dtype),
        shape((batch, tokens, kv_heads, case.value_dim), case.dtype),
        shape((batch, tokens, heads, case.value_dim), case.dtype),
        shape((heads,), jnp.float32) if case.sinks else None,
        shape((batch, tokens), jnp.int32) if case.segments else None,
        shape((batch, kv_heads, tokens // 64, 32), jnp.int32) if case.selection else None,
    )

    def function(query, key, value, dout, sinks, ids, kv_blocks):
        pattern = case.pattern
        if kv_blocks is not None:
            pattern = s2jax.BlockSelection(kv_blocks, jnp.full(kv_blocks.shape[:3], kv_blocks.shape[3], jnp.int32))
        attention = functools.partial(
            s2jax.attention, pattern=pattern, implementation="mosaic_gpu", logits_soft_cap=case.soft_cap,
            config=case.config, sinks=sinks, query_segment_ids=ids, kv_segment_ids=ids,
        )  # fmt: skip
        out, pull = jax.vjp(attention, query, key, value)
        return out, pull(dout)

    return [_row(case, kernel) for kernel in kernels_of("h100", function, *inputs)]


def _row(case: Case, kernel: KernelCode) -> dict:
    steps, loads = kernel.inner_loops(), kernel.inner_loops("UTMALDG")
    row = {"case": case.name, "kernel": kernel.name, "registers": kernel.registers}
    row |= {"spilled bytes": kernel.spill_bytes, "shared KB": round(kernel.shared_bytes / 1024, 1)}
    for opcode in ("HGMMA", "MUFU"):
        row[opcode] = [loop.instructions[opcode] for loop in steps]
    row["spills a step"] = [loop.instructions["LDL"] + loop.instructions["STL"] for loop in steps]
    row["spills a load"] = [loop.instructions["LDL"] + loop.instructions["STL"] for loop in loads]
    row["TMA loads, bulk loads"] = [kernel.instructions["UTMALDG"], kernel.sass.count("UBLKCP.S.G")]
    row["instructions"] = [loop.instructions.total() for loop in steps]
    return row


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    names = [case.name for case in CASES]
    arguments.add_argument("--cases", nargs="+", choices=names, default=names, help="which cases")
    given = arguments.parse_args()
    reason = missing("h100")
    if reason:
        sys.exit(reason)
    rows = []
    for case in (case for case in CASES if case.name in given.cases):
        for row in compiled(case):
            rows.append(row)
            print(row, flush=True)
    print(table(rows, list(rows[0])))
    save("ptxas_report", [row | {"ptxas": ".".join(map(str, ptxas_version()))} for row in rows], given.folder)


if __name__ == "__main__":
    main()
