"""Fine-tuning: weights and tokens of a checkpoint in, the tuned model out."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer

from models.checkpoints.gguf_tokenizer import tokenizer_from_gguf
from models.checkpoints.huggingface_weights import to_huggingface
from models.checkpoints.pretrained import Pretrained, load, save
from s2jax import Dense, FirstBlocks, parse_pattern
from tests.models.tiny_checkpoints import LLAMA, SCALED, TOKENIZER, UNTIED, transformer, write_gguf
from train import main
from training.command_line import parse
from training.config import DeviceOptions
from training.corpus import load_corpus
from training.mesh import make_mesh
from training.pretrained import checkpoint_of, export, in_tokens, pretrained_state
from training.step import Trainer

TOKENS = tokenizer_from_gguf({f"tokenizer.ggml.{name}": value for name, value in TOKENIZER.items()})
END, ROOT = 90, Path(__file__).parents[2]
# Eight devices, a row each.
COMMON = ["--dtype", "float32", "--implementation", "reference", "--log-every", "1"]
FLAGS = ["--seq-len", "32", *COMMON]


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "tiny"
    save(path, Pretrained(model=transformer(LLAMA), max_context=128, tokenizer=TOKENS, eos_ids=(END, 91)))
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "texts"
    path.mkdir()
    for name in "abcd":
        (path / f"{name}.txt").write_text(f"the cab of {name} is in a lab " * 12)
    return path


def run(*flags):
    return main([str(flag) for flag in flags])


def test_a_run_starts_from_the_weights_and_leaves_a_model(checkpoint, text, tmp_path, capsys):
    flags = ["--pretrained", checkpoint, "--data", text, "--run-dir", tmp_path / "run", *FLAGS]
    pattern = "LocalStride(16, 1, 2) | FirstBlocks(1, 16)"
    assert run(*flags, "--steps", 6, "--warmup-steps", 0, "--pattern", pattern, "--dense-layers", 1) == 0
    said = capsys.readouterr().out
    assert "Model tiny: " in said
    assert "1 of them sparse: LocalStride" in said
    assert f"models.generate --model {tmp_path}/run --prompt" in said
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    tuned = load(tmp_path / "run" / "model", dtype="float32")
    assert str(tuned.model.config.pattern) == str(parse_pattern(pattern))
    assert tuned.model.config.dense_layers == (1,)
    assert (tuned.max_context, tuned.eos_ids) == (128, (END, 91))
    assert tuned.tokenizer.to_str() == TOKENS.to_str()
    before, after = (to_huggingface(model) for model in (transformer(LLAMA), tuned.model))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == set(before)
    assert max(np.abs(before[name] - after[name]).max() for name in before) < 6e-3  # six steps of at most 1e-4, Adam's


def test_weights_that_are_not_moved_come_out_as_they_went_in(checkpoint, text, tmp_path):
    flags = ["--pretrained", checkpoint, "--data", text, "--run-dir", tmp_path / "run", *FLAGS, "--steps", 1]
    assert run(*flags, "--learning-rate", 1e-30, "--rest-learning-rate", 1e-30) == 0
    tuned, original = (to_huggingface(load(path).model) for path in (tmp_path / "run" / "model", checkpoint))
    for name, tensor in original.items():
        np.testing.assert_array_equal(tuned[name], tensor, err_msg=name)


def test_the_checkpoint_gives_the_defaults(tmp_path):
    write_gguf(tmp_path / "model.gguf", transformer(UNTIED))
    config = parse(["--pretrained", str(tmp_path / "model.gguf")])
    model = config.model.transformer()
    stored = {"dtype": "bfloat16", "implementation": None, "norm_eps": float(np.float32(UNTIED.norm_eps))}
    assert model == dataclasses.replace(UNTIED, **stored)
    assert (config.input.seq_len, config.preset, config.name, model.pattern) == (128, None, "model", Dense())
    config = parse(["--pretrained", str(tmp_path / "model.gguf"), "--pattern", "FirstBlocks(1)", "--remat", "full"])
    assert (config.model.transformer().pattern, config.model.remat) == (FirstBlocks(1), "full")


def test_text_is_cut_by_the_tokenizer_and_closed(checkpoint, text):
    corpus = load_corpus(text, vocab_size=96, text_field="text", token_dtype="uint16", end_token=None)
    tokens = in_tokens(corpus, checkpoint_of(parse(["--pretrained", str(checkpoint)])))
    assert not tokens.byte_level
    assert [document.name for document in tokens.documents] == ["a.txt", "b.txt", "c.txt", "d.txt"]
    for document, whole in zip(tokens.documents, corpus.documents, strict=True):
        stream = document.read(0, document.length).tolist()
        assert stream == [*TOKENS.encode((text / whole.name).read_text()).ids, END]


def test_weights_lie_over_the_mesh_and_are_gathered(checkpoint, tmp_path):
    devices = DeviceOptions((2, 2, 2))
    config = parse(["--pretrained", str(checkpoint), "--dtype", "float32", "--run-dir", str(tmp_path)])
    config = dataclasses.replace(config, devices=devices)
    source = checkpoint_of(config)
    trainer = Trainer(config, make_mesh(config))
    state = pretrained_state(trainer, source)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == trainer.shardings
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    export(config, source.with_parameters, state.params)
    exported, original = (nnx.state(load(path).model) for path in (tmp_path / "model", checkpoint))
    chex.assert_trees_all_equal(exported, original, strict=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--d-model 128", "--d-model: expected 64, as in .*tiny, got 128"),
        ("--num-layers 1", "--num-layers: expected 2, as in .*tiny, got 1"),
        ("--no-tie-embeddings", "--tie-embeddings: expected True, as in"),
        ("--rope-scaling 0.5 1 4 8192", "needs a factor of at least 1"),
        ("--preset tiny", "--pretrained: expected no --preset beside it, got tiny"),
        ("--pattern Window(3)", "--pattern: expected a pattern such as"),
        ("--pattern BlockMask()", "--pattern: expected a pattern such as"),
        ("--pretrained=nowhere", "nowhere is missing: expected a GGUF file"),
    ],
)
def test_what_does_not_fit_is_one_line(checkpoint, text, flags, message, capsys):
    source = () if "--pretrained=" in flags else ("--pretrained", checkpoint)
    assert run(*source, "--data", text, *flags.split()) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert re.search(message, said), said


def test_text_without_a_tokenizer(text, tmp_path, capsys):
    save(tmp_path / "model", Pretrained(model=transformer(LLAMA), max_context=128))
    assert run("--pretrained", tmp_path / "model", "--data", text) == 2
    assert "--data: expected token files (.npy, .bin), as the checkpoint has no tokenizer" in capsys.readouterr().err


def test_text_that_is_not_utf_8(checkpoint, tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes("café au lait".encode("latin-1") * 9)
    assert run("--pretrained", checkpoint, "--data", tmp_path / "latin.txt") == 2
    assert "--data: expected UTF-8 in latin.txt, got byte 233 at 3" in capsys.readouterr().err


def test_a_tokenizer_of_more_tokens_than_the_model_has(tmp_path, text, capsys):
    more = Tokenizer.from_str(TOKENS.to_str())
    more.add_tokens([f"extra{i}" for i in range(9)] + ["cab"])
    save(tmp_path / "model", Pretrained(model=transformer(LLAMA), max_context=128, tokenizer=more))
    assert run("--pretrained", tmp_path / "model", "--data", text) == 2
    assert "expected a tokenizer of at most the model's 96 tokens, got token 101 in a.txt" in capsys.readouterr().err


def test_texts_too_short_to_predict_anything(tmp_path, capsys):
    save(tmp_path / "model", Pretrained(model=transformer(LLAMA), max_context=128, tokenizer=TOKENS))
    (tmp_path / "short.txt").write_text("a")
    assert run("--pretrained", tmp_path / "model", "--data", tmp_path / "short.txt") == 2
    assert "--data: expected texts of more than one token, got none" in capsys.readouterr().err


def test_many_documents_and_short_ones(tmp_path):
    save(tmp_path / "model", Pretrained(model=transformer(LLAMA), max_context=128, tokenizer=TOKENS))
    lines = [json.dumps({"text": "a" if i % 5 == 0 else f"line {i}"}) for i in range(150)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    path = tmp_path / "texts.jsonl"
    corpus = load_corpus(path, vocab_size=96, text_field="text", token_dtype="uint16", end_token=None)
    tokens = in_tokens(corpus, checkpoint_of(parse(["--pretrained", str(tmp_path / "model")])))
    assert len(tokens.documents) == 120
    last = tokens.documents[-1]
    assert last.read(0, last.length).tolist() == TOKENS.encode("line 149").ids


def test_token_files_are_taken_as_they_are(checkpoint, tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(90, dtype=np.uint16))
    path = tmp_path / "tokens.npy"
    corpus = load_corpus(path, vocab_size=96, text_field="text", token_dtype="uint16", end_token=None)
    assert in_tokens(corpus, checkpoint_of(parse(["--pretrained", str(checkpoint)]))) is corpus


@pytest.mark.slow
def test_rotary_positions_are_kept_or_changed(tmp_path, text):
    save(tmp_path / "scaled", Pretrained(model=transformer(SCALED), max_context=128, tokenizer=TOKENS, eos_ids=(END,)))
    flags = ["--pretrained", tmp_path / "scaled", "--data", text, *COMMON, "--steps", 1, "--seq-len", 160]
    changes = ["--rope-theta", 900.0, "--rope-scaling", 4.0, 1.0, 4.0, 64]
    for name, changed, expected in (
        ("kept", [], (SCALED.rope_theta, SCALED.rope_scaling)),
        ("changed", changes, (900.0, (4.0, 1.0, 4.0, 64))),
    ):
        assert run(*flags, *changed, "--run-dir", tmp_path / name) == 0
        tuned = load(tmp_path / name / "model")
        assert (tuned.model.config.rope_theta, tuned.model.config.rope_scaling) == expected
        assert tuned.max_context == 160  # longer than it was


@pytest.mark.slow
def test_a_checkpoint_that_moved(checkpoint, text, tmp_path, capsys):
    flags = [*FLAGS, "--run-dir", tmp_path / "run"]
    assert run("--pretrained", checkpoint, "--data", text, *flags, "--steps", 1) == 0
    moved = checkpoint.rename(tmp_path / "moved")
    assert run(*flags) == 2
    assert run(*flags, "--pretrained", moved, "--steps", 2) == 0
    assert "Going on from checkpoint 1" in capsys.readouterr().out
    assert run("--run-dir", tmp_path / "run", "--preset", "tiny") == 2
    assert "--preset: expected None, as in" in capsys.readouterr().err


def test_a_place_that_is_taken(checkpoint, text, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").write_text("mine")
    assert run("--pretrained", checkpoint, "--data", text, "--run-dir", tmp_path / "run") == 2
    assert "--run-dir: expected one in which the tuned model may be written to" in capsys.readouterr().err
    (tmp_path / "own").mkdir()
    source = checkpoint.rename(tmp_path / "own" / "model")
    assert run("--pretrained", source, "--data", text, "--run-dir", tmp_path / "own") == 2
    assert "got a file or its source" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_write_one_model(checkpoint, text, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--pretrained", checkpoint, "--data", text, *FLAGS, "--steps", 2, "--run-dir", tmp_path / "run"]
    flags += ["--mesh", 2, -1, 1, "--distributed", "--coordinator", f"127.0.0.1:{port}", "--num-processes", 2]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    commands = [[sys.executable, "train.py", *map(str, [*flags, "--process-id", i])] for i in range(2)]
    processes = [subprocess.Popen(command, cwd=ROOT, env=env) for command in commands]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    assert run("--pretrained", checkpoint, "--data", text, *FLAGS, "--steps", 2, "--run-dir", tmp_path / "alone") == 0
    both, alone = (to_huggingface(load(tmp_path / name / "model").model) for name in ("run", "alone"))
    for name, tensor in both.items():
        np.testing.assert_allclose(tensor, alone[name], atol=3e-4, err_msg=name)
