"""A fuzz of the flags and files of the programs of models, up to the first compilation: accepted, or one line."""

import contextlib
import dataclasses
import io
import itertools
import random
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from models import chat, convert, generate
from models.byte_tokenizer import BOUNDARY, byte_tokenizer
from models.checkpoints.pretrained import Pretrained, save
from tests.models.tiny_checkpoints import LLAMA, transformer

PROGRAMS = {"generate": generate, "convert": convert, "chat": chat}
ODD = [
    "", " ", "-1", "0", "1", "1.5", "nan", "inf", "1e999", "9" * 5000, str(10**30), "None", "true", "é", "\udc80", "--",
    "-", "-x", "[1,2]", "{}", "../..", "/dev/null", "gs://b/x", "*", "\n", "x" * 5000, "Dense(", "Local(1)",
    "LocalStride(16, 1, 2)", "Local(1)" + "|Local(1)" * 500, "(" * 500, "0x10", "1_000", "4294967296", "Sparse()",
    "__import__('os').abort()", "s2-7b", "float32", "int8", "xla", "0 1", "\ud800",
]  # fmt: skip
FLAGS = {
    "generate": ["--prompt", "--prompt-file", "--chat", "--system", "--chunk"],
    "convert": ["--text", "--pattern", "--kv-budget", "--flops-budget", "--length", "--tokens"],
    "chat": ["--system"],
}
SHARED = {
    "--pattern": ["LocalStride(16, 1, 2)", "Dense()"],
    "--dense-layers": ["0", "1", ""],
    "--dtype": ["float32", "bfloat16"],
    "--implementation": ["xla", "reference"],
    "--max-new-tokens": ["3", "1"],
    "--temperature": ["0", "0.7"],
    "--top-k": ["5"],
    "--top-p": ["0.9"],
    "--stop": ["."],
    "--seed": ["0", "4294967295"],
    "--cache-dtype": ["int8", "float32"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, and files that flags may name."""
    root = tmp_path_factory.mktemp("programs")
    config = dataclasses.replace(LLAMA, vocab_size=272)
    kept = {"tokenizer": byte_tokenizer(), "bos_id": BOUNDARY, "eos_ids": (BOUNDARY,)}
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    save(root / "model", Pretrained(model=transformer(config), max_context=128, chat_template=template, **kept))
    (root / "text.txt").write_text("some words to go on from\n" * 20)
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "empty.txt").touch()
    (root / "folder").mkdir()
    np.save(root / "array.npy", np.arange(9))
    (root / "bad.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 16)
    return root


def command(rng: random.Random, folder: Path) -> tuple[str, list[str]]:
    """A program and flags as someone might type them: mostly right, and now and then anything at all."""
    program = rng.choice(["generate", "generate", "convert", "chat"])
    files = [str(folder / name) for name in ("text.txt", "latin.txt", "empty.txt", "folder", "array.npy", "no")]
    good = {**SHARED, "--prompt": ["some words", "é"], "--system": ["You rhyme."], "--chunk": ["16"], "--chat": []}
    good |= {"--prompt-file": files, "--text": files, "--kv-budget": ["0.9"], "--flops-budget": ["0.95"]}
    good |= {"--length": ["64"], "--tokens": ["20"]}
    models = [str(folder / name) for name in (*["model"] * 9, "folder", "bad.gguf", "no")]
    words = ["--model", rng.choice(models)]
    if program == "generate":
        words += rng.choice([["--prompt", "some words"], ["--prompt-file", rng.choice(files)], []])
    if program == "convert":
        words += ["--text", rng.choice(files[:1] * 9 + files), "--pattern", "LocalStride(16, 1, 2)"]
        words += [rng.choice(["--kv-budget", "--flops-budget"]), rng.choice(["0.99"] * 6 + ["2", "0"])]
        words += ["--tokens", "20"] if rng.random() < 0.8 else []
    for _ in range(rng.choice([0, 1, 2, 3])):
        odd = rng.random() < 0.35
        flag = rng.choice([*FLAGS[program], *(SHARED if program != "convert" else {})])
        if flag in words:
            continue
        if odd and rng.random() < 0.2:
            flag = rng.choice(["--x", "--promt", "--", "-q", "--temprature", "--model.", flag[:-1], f"{flag}s"])
        values = rng.choices(ODD, k=rng.choice([0, 1, 1, 2])) if odd else rng.sample(good[flag] or [""], 1)
        values = [value for value in values if value or odd]
        words += [f"{flag}={values[0]}"] if len(values) == 1 and rng.random() < 0.3 else [flag, *values]
    if rng.random() < 0.02:
        words.append("--help")
    return program, words


class ReachedError(Exception):
    """Everything that depends on flags and files alone went well."""


def reach(*_args, **_kwargs):
    raise ReachedError


def outcome(program: str, words: list[str]) -> str:
    """How a program takes the flags, in this process."""
    out, err = io.StringIO(), io.StringIO()
    began = time.monotonic()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = PROGRAMS[program].main(words)
    except ReachedError:
        return f"{program} accepted"
    except SystemExit as stop:
        code = stop.code
    assert time.monotonic() - began < 60, (program, words)
    said = [line for line in err.getvalue().splitlines() if not line.endswith("…")]
    if code == 0:
        return f"{program} {'help' if 'usage:' in out.getvalue() else 'accepted'}"
    assert code == 2, (program, words, code, said)
    assert len(said) == 1, (program, words, said)
    assert program in said[0], (program, words, said)
    assert len(said[0]) < 900, (program, words, said)
    return f"{program} refused"


def fuzz(seeds: range, folder: Path, monkeypatch) -> Counter[str]:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(generate, "generate_batch", reach)
    monkeypatch.setattr(convert, "lost_mass", reach)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    return Counter(itertools.starmap(outcome, (command(random.Random(seed), folder) for seed in seeds)))


def test_some_commands(folder, monkeypatch):
    outcomes = fuzz(range(50), folder, monkeypatch)
    assert all(outcomes[f"{program} accepted"] and outcomes[f"{program} refused"] for program in PROGRAMS), outcomes


@pytest.mark.slow
def test_two_thousand_commands(folder, monkeypatch):
    outcomes = fuzz(range(1000, 3000), folder, monkeypatch)
    print("\n".join(f"{count:6} {kind}" for kind, count in outcomes.most_common()))
    assert outcomes.total() == 2000
