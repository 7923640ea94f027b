"""train.py as it is run: stopped and resumed, diverging, wrongly asked."""

import dataclasses
import json
import re
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from models.checkpoints.pretrained import load
from s2jax import LocalStride
from tests.training.programs import ROOT, SMALL, TINY, command, environment, losses, train, write_text
from training.checkpoint import Checkpoints
from training.config import DeviceOptions
from training.config_file import read_config
from training.ending import ended_by
from training.recorder import Diverged, Recorder
from training.step import Metrics, Trainer

SLOW = pytest.mark.slow  # a start of the program takes seconds
PLURAL_OF_ONE = re.compile(r"(?<![\w.,])1 (KV )?[a-z]*[^s\W]s\b(?!/)|\(s\)")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, text) -> tuple[Path, str]:
    """A run of 30 steps without a stop: its directory and what it said."""
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    done = train(*SMALL, "--data", text, "--steps", 30, "--eval-every", 20, "--run-dir", run_dir)
    return run_dir, done.stdout


def test_a_run_ends_with_its_report(straight):
    run_dir, said = straight
    results = json.loads((run_dir / "results.json").read_text())
    assert results["step"] == 30
    assert 0 < results["heldout_bits_per_byte"] < 8.1
    assert set(results["baselines_bits_per_byte"]) == {"byte_unigram", "gzip_9_per_file"}
    assert [score["context"] for score in results["far_context"]] == [16, 32, 56]
    assert results["tokens_per_second"] > 0
    assert results["mfu"] is None
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    for part in (
        "this model",
        "gzip -9, per file",
        "byte frequencies alone",
        "Far context",
        "Sample",
        "FLOP/s",
        "no MFU",
    ):
        assert part in said
    assert not PLURAL_OF_ONE.search(said)
    assert str(run_dir / "checkpoints" / "30") in said
    assert re.search(r"step 30/30  loss \d\.\d+  [\d,]+ tokens/s  0:00 left", said)
    assert [step for step, _ in losses(run_dir)] == list(range(1, 31))


def test_a_run_stopped_by_sigterm_and_resumed_has_the_same_losses_bit_for_bit(straight, text, tmp_path):
    run_dir = tmp_path / "stopped"
    flags = [*SMALL, "--data", text, "--steps", 30, "--eval-every", 20, "--run-dir", run_dir]
    with subprocess.Popen(command(*flags), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith(("step  5/", "step 10/")):
                process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    stopped = re.search(r"Stopped after step (\d+) of 30; saved. Go on with\n  (.*)", said)
    assert stopped, said
    assert int(stopped[1]) < 30
    # The very command that it gave goes on.
    again = subprocess.run(
        stopped[2], shell=True, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    assert f"Going on from checkpoint {stopped[1]} " in again.stdout
    assert losses(run_dir) == losses(straight[0])
    ours, theirs = (json.loads((d / "results.json").read_text()) for d in (run_dir, straight[0]))
    assert ours["heldout_bits_per_byte"] == theirs["heldout_bits_per_byte"]
    assert ours["sample"] == theirs["sample"]


def test_a_run_from_scratch_leaves_a_model_that_knows_its_pattern(straight, one_device):
    """It computes what the run trained, and begins a text as the run's rows begin."""
    run_dir, said = straight
    model = load(run_dir / "model", dtype="float32")
    assert (str(model.model.config.pattern), model.model.config.dense_layers) == (
        str(LocalStride(16, 1, 2)),
        (0,),
    )
    assert (model.max_context, model.eos_ids, model.bos_id) == (64, (256,), 256)
    assert model.encode("def ") == [256, *b"def "]
    assert f"-m models.generate --model {run_dir} --prompt" in said
    config = dataclasses.replace(read_config(run_dir / "config.json"), devices=DeviceOptions((1, 1, 1)))
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=3)
    trainer = Trainer(config, one_device)
    state = checkpoints.restore(trainer.abstract_state._asdict()).state
    checkpoints.close()
    saved = nnx.to_pure_dict(nnx.state(model.model, nnx.Param))
    chex.assert_trees_all_equal(saved, jax.device_get(state["params"]), strict=True)


def test_held_out_scores_are_recorded_while_it_trains(straight):
    records = map(json.loads, (straight[0] / "metrics.jsonl").read_text().splitlines())
    scores = [(record["step"], record[name]) for record in records for name in record if name.startswith("heldout")]
    assert [step for step, _ in scores] == [20]
    assert "step 20  held out " in straight[1]


@pytest.mark.slow
def test_a_finished_run_reports_again_and_can_be_made_longer(straight, tmp_path):
    done = train("--run-dir", straight[0], "--steps", 31)
    assert "Going on from checkpoint 30" in done.stdout
    assert [step for step, _ in losses(straight[0])] == list(range(1, 32))
    done = train("--run-dir", straight[0])
    assert "no step was done" in done.stdout


def test_a_checkpoint_of_another_shape_is_one_line(straight):
    before = (straight[0] / "config.json").read_text()
    done = train("--run-dir", straight[0], "--d-ff", 64, check=2)
    assert re.search(r"^train.py: expected a checkpoint with .*\[64.* got .*\[48", done.stderr)
    assert done.stderr.count("\n") == 1
    assert (straight[0] / "config.json").read_text() == before  # the next resume is not spoiled


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(text, tmp_path):
    """The state that gave the loss is not called good either, and does not stand in the way."""
    run_dir = tmp_path / "run"
    flags = [*TINY, "--data", text, "--run-dir", run_dir, "--checkpoint-every", 1]
    train(*flags, "--steps", 3)
    rates = ["--warmup-steps", 0, "--learning-rate", 1e30, "--rest-learning-rate", 1e30]
    done = train(*flags, "--steps", 40, *rates, check=1)
    message = re.search(
        r"^train.py: the loss is (\S+) and the gradient's norm (\S+) at step 5; stopped. "
        r"Checkpoint 3 in .* is good; go on with lower rates .* by: (.*)$",
        done.stderr,
        re.MULTILINE,
    )
    assert message, done.stderr
    assert not np.isfinite(float(message[1]) * float(message[2]))
    recorded = losses(run_dir)
    assert [step for step, _ in recorded] == [1, 2, 3, 4]
    assert all(np.isfinite(loss) for _, loss in recorded)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["2", "3"]
    assert (run_dir / "checkpoints-diverged-4").is_dir()
    again = f"{message[3]} --steps 6 --learning-rate 1e-3 --rest-learning-rate 1e-3"
    done = subprocess.run(again, shell=True, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Going on from checkpoint 3 " in done.stdout


def test_a_state_that_overflows_in_its_update_is_not_saved(text, tmp_path):
    """Loss and gradient of the step are finite: they are of the state before it."""
    run_dir = tmp_path / "run"
    flags = [*TINY, "--data", text, "--run-dir", run_dir, "--checkpoint-every", 1, "--warmup-steps", 0]
    done = train(*flags, "--steps", 3, "--learning-rate", 1e39, "--rest-learning-rate", 1e39, check=1)
    assert re.search(
        r"^train.py: the update of step 1 gave numbers in params.* that are not finite; stopped. There is no good "
        r"checkpoint$",
        done.stderr,
        re.MULTILINE,
    ), done.stderr
    assert not list(run_dir.glob("checkpoints*/*"))
    assert not (run_dir / "model").exists()


@pytest.mark.slow
def test_a_model_that_scores_no_number_is_named(text, tmp_path):
    """Its numbers are finite, so it was written before anything was scored."""
    run_dir = tmp_path / "run"
    flags = [*TINY, "--data", text, "--run-dir", run_dir, "--warmup-steps", 0, "--steps", 1]
    done = train(*flags, "--learning-rate", 1e38, check=1)
    assert done.stderr.splitlines()[-1] == (
        f"train.py: the model of step 1, which is written to {run_dir / 'model'}, scores nan bits on the held-out "
        "text; stopped. There is no good checkpoint"
    )
    assert "1 layer, 1 of them sparse" in done.stdout
    assert not PLURAL_OF_ONE.search(done.stdout)
    assert (run_dir / "model" / "config.json").exists()


def test_an_error_of_preparation_misses_no_checkpoint(small_config, tmp_path, capsys):
    config = dataclasses.replace(small_config, run_dir=str(tmp_path))
    assert ended_by(OSError("no space"), config, None) == 2
    assert capsys.readouterr().err == "train.py: no space\n"
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "3" / "_CHECKPOINT_METADATA").touch()
    assert ended_by(OSError("no space"), config, None) == 2
    assert "no space; stopped. Checkpoint 3 in " in capsys.readouterr().err


@pytest.mark.parametrize(("loss", "grad_norm"), [(np.nan, 1.0), (np.inf, 1.0), (2.0, np.nan), (2.0, np.inf)])
def test_a_gradient_that_is_no_number_stops_the_run_too(small_config, tmp_path, loss, grad_norm):
    """Before its state is saved: the loss is of the weights before the step, and may be finite still."""
    config = dataclasses.replace(small_config, run_dir=str(tmp_path))
    model = SimpleNamespace(model_config=config.model.transformer())
    recorder = Recorder(config, model, byte_level=True, from_step=0)
    recorder.add(1, Metrics(2.0, 1.0, 0.1))
    recorder.add(2, Metrics(loss, grad_norm, 0.1))
    with pytest.raises(Diverged, match=f"the loss is {loss} and the gradient's norm {grad_norm} at step 2"):
        recorder.flush()
    with pytest.raises(Diverged, match="the model of step 1 scores nan bits on the held-out text") as raised:
        recorder.heldout(1, np.nan)
    assert raised.value.step == 2  # so that the checkpoint of step 1 is none to go on from
    recorder.close()
    assert losses(tmp_path) == [(1, 2.0)]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param("--data /no/such/place", "expected a file or a directory, got /no/such/place", marks=SLOW),
        pytest.param("--steps -1", "--steps: expected a whole number of at least 1, got -1", marks=SLOW),
        pytest.param("--mesh 2 2 2", "--mesh: expected counts for 1 device, got 2 × 2 × 2 = 8", marks=SLOW),
        ("--data TOKENS", "expected token ids from 0 to 271 .* got 999 at position 3"),
        ("--data TEXT --implementation fast --run-dir RUN", "fast"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, tmp_path, text):
    np.save(tmp_path / "tokens.npy", np.array([1, 2, 3, 999]))
    for name, path in {"TOKENS": tmp_path / "tokens.npy", "TEXT": text, "RUN": tmp_path / "run"}.items():
        flags = flags.replace(name, str(path))
    done = train(*SMALL, *flags.split(), check=2)
    assert re.search(message, done.stderr)
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
