"""The shapes and patterns that are measured, and what every results file says of where it was made."""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import subprocess

import jax
import jaxlib

import s2jax

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Point:
    """One shape: batch, query and KV heads, head dim, tokens, and the pattern's window and stride in blocks of 64.

    Without a window and a stride, both 0, the pattern is dense.
    """

    name: str
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    local_blocks: int
    vert_stride: int
    tokens: int

    @property
    def is_dense(self) -> bool:
        return not self.local_blocks

    def pattern(self, block_size: int = 64) -> s2jax.LocalStride | s2jax.Dense:
        """The pattern at another block size, with as many tokens in its window; one block stays one block."""
        if self.is_dense:
            return s2jax.Dense()
        window = self.local_blocks * 64 // block_size if self.local_blocks > 1 else 1
        return s2jax.LocalStride(block_size, window, self.vert_stride)


POINTS = (
    Point("dkernel-32k", 4, 16, 16, 128, 8, 16, 32 << 10),
    Point("dkernel-32k-v4", 4, 16, 16, 128, 8, 4, 32 << 10),
    Point("phi3-8k", 4, 32, 8, 128, 16, 8, 8 << 10),
    Point("phi3-128k", 1, 32, 8, 128, 16, 8, 128 << 10),
    Point("s2-1.3b-128k", 1, 16, 16, 128, 1, 16, 128 << 10),
    Point("s2-7b-128k", 1, 32, 32, 128, 1, 32, 128 << 10),
    Point("s2-70b-128k", 1, 64, 64, 128, 1, 64, 128 << 10),
)

DENSE_POINTS = tuple(
    Point(f"dense-{tokens >> 10}k-d{head_dim}", (16 << 10) // tokens, heads, heads, head_dim, 0, 0, tokens)
    for tokens in (4 << 10, 16 << 10)
    for head_dim, heads in ((64, 32), (128, 16))
)
"""16k tokens in all, and heads · head dim = 2048: where the peers' own figures stand."""

CPU_POINTS = (
    Point("cpu-8k", 1, 8, 8, 128, 8, 16, 8 << 10),
    Point("cpu-8k-gqa", 1, 8, 2, 128, 16, 8, 8 << 10),
    Point("cpu-8k-l1", 1, 16, 16, 64, 1, 16, 8 << 10),
)
"""dkernel's, Phi-3-small's and S2-Attention's patterns at a length that a CPU can do."""


def save(name: str, rows: list[dict], folder: pathlib.Path = RESULTS, **more) -> None:
    """Writes FOLDER/NAME.json, with `more` before the rows; a reader never finds half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()}, {jax.device_count()} device)",
        "processor": _processor(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        **more,
        "rows": rows,
    }
    path, partial = folder / f"{name}.json", folder / f"{name}.json.part"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)
    print(f"written to {path}", flush=True)


def table(rows: list[dict], columns: list[str]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_shown(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def _shown(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    # A copy of the tree without its history is told from outside.
    return found.stdout.strip() or os.environ.get("S2JAX_COMMIT", "unknown")


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()
