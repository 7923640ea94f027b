"""train.py as processes of its own: small, quickly compiled runs, alone or as a cluster."""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
# Two small layers; short rows of a text that is soon read.
SMALL = shlex.split("""
    --num-layers 2 --d-model 32 --num-heads 4 --num-kv-heads 2 --head-dim 8 --d-ff 48
    --pattern LocalStride(16,1,2) --dense-layers 0 --seq-len 64 --batch-size 4 --optimizer adamw
    --log-every 5 --sample-bytes 8
""")
# One layer that compiles in a second, for what is not about the model.
TINY = shlex.split("""
    --num-layers 1 --d-model 16 --num-heads 2 --num-kv-heads 2 --head-dim 8 --d-ff 16 --implementation reference
    --pattern LocalStride(16,1,2) --dense-layers --seq-len 32 --batch-size 6 --optimizer adamw
    --log-every 5 --sample-bytes 4 --heldout-tokens 500
""")
_COMPILED = Path(tempfile.gettempdir(), f"s2jax-tests-compiled-{os.getuid()}")


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """So many CPU devices, whatever the tests around have; compiled quickly, and once."""
    return {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(_COMPILED),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        **more,
    }


def write_text(path: Path) -> Path:
    """A text that a small model learns a little of."""
    rng = np.random.default_rng(0)
    path.write_text("\n".join(f"line {i} says {rng.integers(1000)} and {rng.integers(1000)}" for i in range(600)))
    return path


def command(*flags: object) -> list[str]:
    """The command line; of a flag that is given twice the last one counts."""
    given: dict[str, list[str]] = {}
    name = ""
    for word in map(str, flags):
        if word.startswith("--"):
            name, given[word] = word, []
        else:
            given[name].append(word)
    return [sys.executable, "train.py", *(word for flag, values in given.items() for word in (flag, *values))]


def train(*flags: object, check: int | None = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """A run to its end, with the exit code `check`."""
    options = {"env": environment(), "capture_output": True, "text": True, "timeout": 600, "cwd": ROOT, **options}
    done = subprocess.run(command(*flags), **options)
    assert check is None or done.returncode == check, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@contextlib.contextmanager
def running(*flags: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A run that goes on meanwhile; killed at the end of the block."""
    options = {"env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    with subprocess.Popen(command(*flags), cwd=ROOT, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def cluster(
    count: int, *flags: object, devices: int = 1, port: int | None = None, own: dict[int, list] | None = None
) -> Iterator[list[subprocess.Popen]]:
    """A run of several processes, each with its output in a pipe; killed at the end of the block.

    Args:
        own: further flags of single processes.
    """
    port = port or free_port()
    flags = (*flags, "--distributed", "--coordinator", f"127.0.0.1:{port}", "--num-processes", count, "--process-id")
    with contextlib.ExitStack() as held:
        env = environment(devices)
        own = own or {}
        yield [held.enter_context(running(*flags, i, *own.get(i, []), env=env)) for i in range(count)]


def ends(processes: list[subprocess.Popen], timeout: float = 600) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of processes, once all have ended."""
    with ThreadPoolExecutor(len(processes)) as readers:  # a full pipe would stop its process, and that all others
        outputs = list(readers.map(lambda process: process.communicate(timeout=timeout)[0], processes))
    return [process.returncode for process in processes], outputs


def losses(run_dir: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records if "loss" in record]
