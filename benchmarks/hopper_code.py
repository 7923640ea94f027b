"""What the compiler makes of the Hopper kernels at real shapes: registers, spills, shared memory, instructions a step.

    python benchmarks/hopper_code.py      # needs `make compilers`, no GPU

Nothing is timed here. Steps are the inner loops of the warpgroups that compute: the first without a mask, the second
with one; loads are those of the warpgroup that loads. What is spilled outside of them is spilled once a tile.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
from deviceless import KernelCode, kernels_of, missing, ptxas_version
from points import save, table

import s2jax
from s2jax.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Config:
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
    tiles: s2jax.HopperTiles | None = None


WINDOW = s2jax.LocalStride(64, 16, 8)
CONFIGS = (
    *(Config(f"d {d}", WINDOW, head_dim=d, value_dim=d) for d in (64, 96, 128, 192, 256)),
    Config("d 192, e 128", WINDOW, head_dim=192),
    Config("d 192, e 256", WINDOW, head_dim=192, value_dim=256),
    *(Config(f"block {size}", s2jax.LocalStride(size, 1024 // size, 8)) for size in (16, 32, 128)),
    Config("groups read apart", s2jax.LocalStride(64, 16, 8, residues="query_head")),
    Config("block 16, no groups", s2jax.LocalStride(16, 64, 8), num_kv_heads=32),
    Config("d 256, block 128", s2jax.LocalStride(128, 8, 8), head_dim=256, value_dim=256),
    Config("d 64, 256 keys", WINDOW, head_dim=64, value_dim=64, tiles=s2jax.HopperTiles(2, 256, 2)),
    Config("no groups", s2jax.LocalStride(64, 8, 16), num_heads=16, num_kv_heads=16, tokens=32 << 10, batch=4),
    Config("70B, 1M tokens", s2jax.LocalStride(64, 1, 64), tokens=1 << 20, num_heads=64, num_kv_heads=64),
    Config("dense", s2jax.Dense(), tokens=16 << 10),
    Config("both ways", s2jax.Dense(causal=False), tokens=16 << 10),
    Config("odd length", WINDOW, tokens=8 * 1024 + 5),
    Config("few keys", WINDOW, tokens=20),
    Config("eight heads a tile", s2jax.LocalStride(16, 64, 8), num_kv_heads=4, tiles=s2jax.HopperTiles(8, 128, 2)),
    Config("float16", WINDOW, dtype="float16"),
    Config("soft cap", WINDOW, soft_cap=30.0),
    Config("sinks", WINDOW, sinks=True),
    Config("segments", WINDOW, segments=True, batch=2, tokens=32 << 10),
    Config("eight heads, segments", s2jax.LocalStride(16, 64, 8), num_kv_heads=4, segments=True, tokens=32 << 10),
    Config(
        "all together, block 16, heads apart",
        s2jax.LocalStride(16, 64, 8, residues="query_head"),
        soft_cap=30.0,
        sinks=True,
        segments=True,
        batch=2,
        tokens=8 << 10,
    ),
    Config("selection", WINDOW, selection=True, tokens=32 << 10),
    Config("all together", WINDOW, soft_cap=30.0, sinks=True, segments=True, tokens=32 << 10),
)


def compiled(config: Config) -> list[dict]:
    """Rows of the table, one for each kernel: the forward pass, and those of the gradients."""
    shape = jax.ShapeDtypeStruct
    batch, tokens, heads, kv_heads = config.batch, config.tokens, config.num_heads, config.num_kv_heads
    inputs = {
        "query": shape((batch, tokens, heads, config.head_dim), config.dtype),
        "key": shape((batch, tokens, kv_heads, config.head_dim), config.dtype),
        "value": shape((batch, tokens, kv_heads, config.value_dim), config.dtype),
        "dout": shape((batch, tokens, heads, config.value_dim), config.dtype),
        "sinks": shape((heads,), jnp.float32) if config.sinks else None,
        "ids": shape((batch, tokens), jnp.int32) if config.segments else None,
        "kv_blocks": shape((batch, kv_heads, tokens // 64, 32), jnp.int32) if config.selection else None,
    }
    names = [name for name, value in inputs.items() if value is not None]

    def function(*arrays):
        given = dict(zip(names, arrays, strict=True))
        dout, ids, kv_blocks = given.pop("dout"), given.pop("ids", None), given.pop("kv_blocks", None)
        pattern = config.pattern
        if kv_blocks is not None:
            pattern = s2jax.BlockSelection(kv_blocks, jnp.full(kv_blocks.shape[:3], kv_blocks.shape[3], jnp.int32))
        options = {} if ids is None else {"query_segment_ids": ids, "kv_segment_ids": ids}

        def attention(query, key, value):
            return s2jax.attention(
                query, key, value, pattern, implementation="mosaic_gpu", logits_soft_cap=config.soft_cap,
                tiles=config.tiles, sinks=given.get("sinks"), **options,
            )  # fmt: skip

        out, pull = jax.vjp(attention, given["query"], given["key"], given["value"])
        return out, pull(dout)

    return [_row(config, kernel) for kernel in kernels_of("h100", function, *(inputs[name] for name in names))]


def _row(config: Config, kernel: KernelCode) -> dict:
    steps, loads = kernel.inner_loops(), kernel.inner_loops("UTMALDG")
    row = {"config": config.name, "kernel": kernel.name, "registers": kernel.registers}
    row |= {"spilled bytes": kernel.spill_bytes, "shared KB": round(kernel.shared_bytes / 1024, 1)}
    for opcode in ("HGMMA", "MUFU"):
        row[opcode] = [loop.instructions[opcode] for loop in steps]
    row["spills a step"] = [loop.instructions["LDL"] + loop.instructions["STL"] for loop in steps]
    row["spills a load"] = [loop.instructions["LDL"] + loop.instructions["STL"] for loop in loads]
    row["TMA loads, bulk loads"] = [kernel.instructions["UTMALDG"], kernel.sass.count("UBLKCP.S.G")]
    row["instructions"] = [loop.instructions.total() for loop in steps]
    return row


def main() -> None:
    reason = missing("h100")
    if reason:
        sys.exit(reason)
    rows = []
    for config in CONFIGS:
        for row in compiled(config):
            rows.append(row)
            print(row, flush=True)
    print(table(rows, list(rows[0])))
    save("hopper_code", [row | {"ptxas": ".".join(map(str, ptxas_version()))} for row in rows])


if __name__ == "__main__":
    main()
