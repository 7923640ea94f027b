"""A fuzz of train.py's flags, up to the first state of the weights: accepted, or refused in one line."""

import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import train
from training.command_line import flags

ROOT = Path(__file__).parents[2]
GOOD = {
    "--preset": ["tiny"],
    "--steps": ["5", "1", "2147483647"],
    "--seed": ["0", "7"],
    "--seq-len": ["16", "64", "2"],
    "--batch-size": ["8", "0", "16"],
    "--heldout": ["0.1", "0.5", "1e-3"],
    "--heldout-tokens": ["5", "1000"],
    "--text-field": ["text", "body"],
    "--token-dtype": ["uint16", "uint32"],
    "--end-token": ["None", "0", "3"],
    "--vocab-size": ["272", "300", "1000"],
    "--num-layers": ["4", "1"],
    "--num-heads": ["8", "4", "16"],
    "--num-kv-heads": ["2", "1"],
    "--head-dim": ["8", "32"],
    "--d-model": ["32", "64"],
    "--d-ff": ["48"],
    "--pattern": ["Dense()", "LocalStride(16, 1, 2)", "Local(4) | FirstTokens(2)"],
    "--dense-layers": ["0", ""],
    "--rope-theta": ["10000"],
    "--rope-scaling": ["None", "8 1 4 8192"],
    "--dtype": ["float32", "bfloat16"],
    "--remat": ["none", "full"],
    "--implementation": ["auto", "xla", "reference", "mosaic_tpu"],
    "--optimizer": ["muon", "adamw"],
    "--learning-rate": ["None", "0.01"],
    "--accumulate": ["1", "2"],
    "--mesh": ["1 -1 1", "8 1 1", "2 2 2", "1 1 1"],
    "--profile": ["1 2", "None"],
    "--wandb": ["None"],
}
ODD = [
    "", " ", "-1", "0", "1", "1.5", "nan", "inf", "-inf", "1e999", "9" * 5000, str(10**30), "None", "none", "true", "é",
    "\udc80", "a b", "--", "-", "-x", "[1,2]", "{}", "../..", "/dev/null", "/dev/zero", "gs://b/x", "*", "'", '"', "\n",
    "x" * 5000, "s2-7b", "s2-70b", "Dense(", "LocalStride(10**9, 1, 1)", "Local(1)" + "|Local(1)" * 500, "0x10",
    "1_000", "１２", "1e5", "0.5", "__import__('os').abort()", "(" * 500, "LocalStride(16,-1,2)", "127.0.0.1:1",
    "2147483648",
]  # fmt: skip
FOREIGN = [
    "--lr",
    "--epochs",
    "--model",
    "--output-dir",
    "--x",
    "--no-",
    "-v",
    "--",
    "--steps-",
    "---steps",
    "--é",
    "--=1",
]


def write_data(folder: Path) -> None:
    """What --data, --config and --run-dir may name."""
    (folder / "text.txt").write_text("some words to train on\n" * 40)
    np.arange(250, dtype=np.uint16).tofile(folder / "tokens.bin")
    (folder / "lines.jsonl").write_text('{"text": "some words"}\n' * 9)
    (folder / "bad.jsonl").write_text("[[[")
    (folder / "empty").mkdir()
    (folder / "good.json").write_text(json.dumps({"steps": 4, "input": {"seq_len": 32}}))
    (folder / "good.yaml").write_text("optimizer: {learning_rate: 1e-4}\nseed: 3\n")
    (folder / "bad.yaml").write_text("steps: [")
    (folder / "other.json").write_text(json.dumps({"stesp": 4, "output": 7}))
    (folder / "spoiled").mkdir()
    (folder / "spoiled/config.json").write_text('{"steps": 3}')


def flag_set(rng: random.Random, folder: Path) -> list[str]:
    """Flags as someone might type them: mostly right, and now and then anything at all."""
    good = {
        **GOOD,
        "--data": [
            str(folder / name) for name in ("text.txt", "tokens.bin", "lines.jsonl", "bad.jsonl", "empty", "no")
        ],
        "--config": [str(folder / name) for name in ("good.json", "good.yaml", "bad.yaml", "other.json", "no.json")],
        "--run-dir": [str(folder / name) for name in ("run", "spoiled", "text.txt", "text.txt/run")],
        "--pretrained": [str(folder / name) for name in ("empty", "text.txt", "no")],
    }
    hostile = rng.random() < 0.6
    words: list[str] = ["--data", str(folder / rng.choice(["text.txt", "tokens.bin", "lines.jsonl"]))]
    if rng.random() < 0.7:
        words += ["--run-dir", str(folder / "runs" / str(rng.randrange(10**9)))]
    known = [*flags(), "--no-qk-norm", "--no-named-splits", "--no-tie-embeddings"]
    for _ in range(rng.choice([0, 1, 1, 2, 3, 5])):
        odd = hostile and rng.random() < 0.4
        flag = rng.choice(FOREIGN) if odd and rng.random() < 0.2 else rng.choice(known)
        if flag == "--distributed":  # joins whoever is there
            continue
        if odd and rng.random() < 0.1:
            place = rng.randrange(2, len(flag) + 1)
            flag = flag[:place] + rng.choice(["", "s", "-", "_", "x"]) + flag[place + 1 :]
        values = [rng.choice(ODD) for _ in range(rng.choice([0, 1, 1, 1, 2, 3]))] if odd else []
        if not odd and flag in good:
            values = (
                rng.choice(good[flag]).split() if flag in ("--mesh", "--rope-scaling") else [rng.choice(good[flag])]
            )
            values = [value for value in values if value or flag != "--dense-layers"]
        if flag in words and not hostile:
            continue
        words += [f"{flag}={values[0]}"] if len(values) == 1 and rng.random() < 0.3 else [flag, *values]
    if hostile and rng.random() < 0.05:
        words.insert(rng.randrange(len(words) + 1), rng.choice(["--help", "-h", "stray"]))
    return words


class ReachedError(Exception):
    """Everything that depends on flags and data alone went well."""


def reach(*_args, **_kwargs):
    raise ReachedError


def outcome(words: list[str]) -> str:
    """How train.py takes the flags, in this process."""
    out, err = io.StringIO(), io.StringIO()
    began = time.monotonic()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = train.main(words)
    except ReachedError:
        return "accepted"
    except SystemExit as stop:
        code = stop.code
    if code == 0 and "usage: train.py" in out.getvalue():
        return "help"
    said = err.getvalue()
    assert code == 2, (words, code, said)
    assert said.startswith("train.py: "), (words, said)
    assert said.count("\n") == 1, (words, said)
    assert len(said) < 1500, (words, said)
    assert time.monotonic() - began < 60, (words, said)
    found = re.match(r"train\.py: ([\w\-, ]*)", said)
    return f"refused: {(found[1] if found else said)[:40]}"


def fuzz(seeds: range, folder: Path, monkeypatch) -> Counter[str]:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train, "start_state", reach)
    write_data(folder)
    return Counter(outcome(flag_set(random.Random(seed), folder)) for seed in seeds)


def test_some_flag_sets(tmp_path, monkeypatch):
    outcomes = fuzz(range(25), tmp_path, monkeypatch)
    assert outcomes["accepted"] >= 3
    assert outcomes.total() - outcomes["accepted"] >= 8


@pytest.mark.slow
def test_two_thousand_flag_sets(tmp_path, monkeypatch):
    outcomes = fuzz(range(1000, 3000), tmp_path, monkeypatch)
    print("\n".join(f"{count:6} {kind}" for kind, count in outcomes.most_common()))
    assert outcomes.total() == 2000
    assert outcomes["accepted"] >= 300


@pytest.mark.slow
def test_flag_sets_of_real_processes(tmp_path):
    """What the shell would see: exit code 2 and one line, or a run that began."""
    write_data(tmp_path)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    codes: Counter[int] = Counter()
    for seed in range(5000, 5012):
        words = [*flag_set(random.Random(seed), tmp_path)]
        if any("\0" in word for word in words):
            continue
        command = [sys.executable, str(ROOT / "train.py"), *map(os.fsencode, [*words, "--nonsense"])]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=300)
        codes[done.returncode] += 1
        assert done.returncode in (0, 2), (words, done.stderr[-2000:])
        assert b"Traceback" not in done.stderr, words
        if done.returncode == 2:
            assert done.stderr.count(b"\n") == 1, (words, done.stderr)
    print(codes)
