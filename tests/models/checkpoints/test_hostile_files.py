"""Thousands of mutated checkpoints: each is refused in one line, or loads; in seconds, and within a gigabyte."""

import collections
import json
import os
import pathlib
import selectors
import subprocess
import sys

import pytest

from models.checkpoints.gguf_tokenizer import tokenizer_from_gguf
from models.checkpoints.pretrained import Pretrained, save
from tests.models.checkpoints.hostile_files import write_case
from tests.models.tiny_checkpoints import LLAMA, TOKENIZER, transformer, write_gguf

ROOT = pathlib.Path(__file__).parents[3]
SECONDS = 10


class Worker:
    """A process that reads checkpoints, begun anew where one took too long or ended it."""

    def __init__(self, directory: pathlib.Path):
        self.directory, self.process = directory, None

    def ask(self, kind: str, path: pathlib.Path) -> tuple[str, float, float]:
        if self.process is None:
            environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
            command = [sys.executable, "-m", "tests.models.checkpoints.hostile_files"]
            self.process = subprocess.Popen(
                command, cwd=self.directory, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            self.patience = 120  # of the first answer, for which it imports
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{json.dumps([kind, str(path)])}\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            answered = selector.select(self.patience)
        line = self.process.stdout.readline() if answered else ""
        self.patience = 3 * SECONDS
        if not line:
            code = self.close()
            return (f"FAULT: ended with {code}" if answered else "FAULT: took too long"), 0.0, 0.0
        return tuple(json.loads(line))

    def close(self) -> int | None:
        if self.process is not None:
            process, self.process = self.process, None
            process.kill()
            process.communicate()
            return process.returncode
        return None


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The files of a directory, and a GGUF file."""
    path = tmp_path_factory.mktemp("originals")
    tokenizer = tokenizer_from_gguf({f"tokenizer.ggml.{name}": value for name, value in TOKENIZER.items()})
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model = transformer(LLAMA)
    special = {"bos_token": "'", "eos_token": "<|end|>"}
    save(
        path / "directory",
        Pretrained(
            model=model, max_context=128, tokenizer=tokenizer, eos_ids=(90, 91), bos_id=0, special_tokens=special,
            chat_template=template,
        ),
    )  # fmt: skip
    write_gguf(path / "model.gguf", model)
    files = {file.name: file.read_bytes() for file in (path / "directory").iterdir()}
    files["generation_config.json"] = json.dumps(
        json.loads(files["generation_config.json"])
        | {"do_sample": True, "temperature": 0.6, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.0}
    ).encode()
    return files, (path / "model.gguf").read_bytes()


def check(seeds, originals, directory):
    """Loads the case of each seed; prints how many came to what."""
    counts, slowest, largest, faults = collections.Counter(), 0.0, 0.0, []
    worker = Worker(directory)
    for seed in seeds:
        kind, path = write_case(seed, *originals, directory / str(seed))
        answer, seconds, megabytes = worker.ask(kind, path)
        counts[kind, answer.split(":")[0]] += 1
        slowest, largest = max(slowest, seconds), max(largest, megabytes)
        bad = (
            answer.startswith("FAULT") or "\n" in answer or len(answer) > 1000 or seconds > SECONDS or megabytes > 1024
        )
        if bad:
            faults.append(f"seed {seed}, {kind}: {answer[:300]!r}, {seconds:.1f} s, {megabytes:.0f} MB")
        for file in (directory / str(seed)).iterdir():
            file.unlink()
    worker.close()
    print(f"\n{dict(sorted(counts.items()))}; slowest {slowest:.2f} s, at most {largest:.0f} MB in all")
    assert not faults, "\n".join([f"{len(faults)} faults", *faults[:20]])
    assert not list(directory.rglob("CANARY"))
    return counts


def test_a_sample_of_mutated_files(originals, tmp_path):
    counts = check(range(40), originals, tmp_path)
    assert {answer for _, answer in counts} == {"right", "refused"}


@pytest.mark.slow
def test_mutated_files(originals, tmp_path):
    check(range(1_000, 6_000), originals, tmp_path)
