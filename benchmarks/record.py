"""Results files: rows of figures with device, versions, date and commit."""

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess

import jax
import jaxlib

RESULTS = pathlib.Path(__file__).parent / "results"


def save(name: str, rows: list[dict], folder: pathlib.Path = RESULTS, **more) -> None:
    """Writes FOLDER/NAME.json atomically, with `more` before the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": device(),
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


def device() -> str:
    return f"{jax.devices()[0].device_kind} ({platform.machine()}, {jax.device_count()} device)"


def table(rows: list[dict], columns: list[str]) -> str:
    """A Markdown table of rows."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_shown(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def parser(description: str) -> argparse.ArgumentParser:
    """A command-line parser with the option `--folder`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--folder", type=pathlib.Path, default=RESULTS, help="where the results go")
    return made


def _shown(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    # A copy of the tree without its history takes the commit from the environment.
    return found.stdout.strip() or os.environ.get("S2JAX_COMMIT", "unknown")


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()
