"""Fine-tuning: weights and tokens of a checkpoint in, the tuned model out."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

from models.gguf_tokenizer import tokenizer_from_gguf
from models.huggingface import to_huggingface
from models.pretrained import Pretrained, load, save
from s2jax import Dense, FirstBlocks, LocalStride
from tests.models.checkpoints import LLAMA, TOKENIZER, UNTIED, transformer, write_gguf
from train import main
from training.command_line import parse
from training.config import DeviceOptions
from training.corpus import load_corpus
from training.mesh import make_mesh
from training.pretrained import checkpoint_of, export, in_tokens, pretrained_state
from training.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOKENS = tokenizer_from_gguf({f"tokenizer.ggml.{name}": value for name, value in TOKENIZER.items()})
END = 90
# Eight devices, a row each.
FLAGS = ["--seq-len", "32", "--dtype", "float32", "--implementation", "reference", "--log-every", "1"]


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
    assert f"models.generate --model {tmp_path}/run/model --pattern '{pattern}' --dense-layers 1 --prompt" in said
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    tuned = load(tmp_path / "run" / "model", LocalStride(16, 1, 2), dtype="float32")
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


def test_a_run_goes_on_from_its_own_checkpoint(checkpoint, text, tmp_path, capsys):
    flags = ["--pretrained", checkpoint, "--data", text, "--run-dir", tmp_path / "run", *FLAGS]
    assert run(*flags, "--steps", 2) == 0
    assert run("--run-dir", tmp_path / "run", "--steps", 3) == 0
    assert "Going on from checkpoint 2" in capsys.readouterr().out


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
    config = dataclasses.replace(parse(["--pretrained", str(checkpoint), "--dtype", "float32"]), devices=devices)
    source = checkpoint_of(config)
    trainer = Trainer(config, make_mesh(config))
    state = pretrained_state(trainer, source)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == trainer.shardings
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    export(tmp_path / "model", source, state.params)
    exported, original = (nnx.state(load(path).model) for path in (tmp_path / "model", checkpoint))
    jax.tree.map(np.testing.assert_array_equal, exported, original)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--d-model 128", "--d-model: expected 64, as in .*tiny, got 128"),
        ("--num-layers 1", "--num-layers: expected 2, as in .*tiny, got 1"),
        ("--no-tie-embeddings", "--tie-embeddings: expected True, as in"),
        ("--preset tiny", "--pretrained: expected no --preset beside it, got tiny"),
        ("--pattern Window(3)", "--pattern: expected a pattern such as"),
        ("--pattern BlockMask()", "--pattern: expected a pattern such as"),
        ("--pretrained nowhere", "nowhere"),
    ],
)
def test_what_does_not_fit_is_one_line(checkpoint, text, flags, message, capsys):
    assert run("--pretrained", checkpoint, "--data", text, *flags.split()) == 2
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


def test_another_checkpoint_than_the_run_s(checkpoint, text, tmp_path, capsys):
    assert run("--pretrained", checkpoint, "--data", text, "--run-dir", tmp_path / "run", *FLAGS, "--steps", 1) == 0
    assert run("--pretrained", "other", "--run-dir", tmp_path / "run") == 2
    assert f"--pretrained: expected {checkpoint}, as in {tmp_path}/run, got other" in capsys.readouterr().err
