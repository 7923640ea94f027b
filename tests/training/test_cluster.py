"""Runs of several real processes, to their very end."""

import json
import re
import signal
import time
from pathlib import Path

import jax
import pytest

from tests.training.programs import SMALL, TINY, cluster, ends, free_port, losses, train, write_text
from training.cluster import lost_peer


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


def check_complete(run_dir: Path, steps: int) -> None:
    """All that a byte-level run leaves is there, and nothing half-written."""
    results = json.loads((run_dir / "results.json").read_text())
    assert results["step"] == steps
    assert results["sample"].startswith("def ")
    assert len(results["far_context"]) > 0
    assert results["heldout_bits_per_byte"] > 0
    assert [step for step, _ in losses(run_dir)] == list(range(1, steps + 1))
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run_dir / "model" / "config.json").read_text())["s2jax"]["dense_layers"] == []
    assert (run_dir / "model" / "tokenizer.json").exists()
    assert not [path.name for path in run_dir.iterdir() if path.name.endswith((".tmp", ".new", ".old"))]
    assert not (run_dir / "running.json").exists()


@pytest.mark.parametrize(
    ("count", "devices", "mesh", "batch"),
    [
        (2, 1, "2 1 1", 6),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (2, 1, "1 2 1", 6),
                (2, 1, "1 1 2", 6),
                (2, 2, "4 1 1", 4),
                (2, 2, "1 4 1", 4),
                (2, 2, "2 2 1", 4),
                (2, 2, "1 2 2", 4),
                (3, 1, "3 1 1", 6),
                (3, 2, "3 1 2", 6),
            ]
        ),
    ],
)
def test_a_byte_level_run_comes_to_its_end(text, tmp_path, count, devices, mesh, batch):
    flags = [
        *TINY,
        "--batch-size",
        batch,
        "--data",
        text,
        "--steps",
        4,
        "--eval-every",
        2,
        "--run-dir",
        tmp_path / "run",
    ]
    with cluster(count, *flags, "--mesh", *mesh.split(), devices=devices) as processes:
        codes, outputs = ends(processes)
    assert codes == [0] * count, "\n".join(outputs)
    check_complete(tmp_path / "run", 4)
    assert "Sample at temperature" in outputs[0]
    assert "Traceback" not in "".join(outputs)


@pytest.mark.slow
def test_bad_data_of_one_process_ends_all_with_its_line(text, tmp_path):
    flags = [*TINY, "--steps", 4, "--run-dir", tmp_path / "run", "--data", text]
    with cluster(2, *flags, own={1: ["--data", tmp_path / "none"]}) as processes:
        codes, outputs = ends(processes)
    assert codes == [2, 2], outputs
    assert re.search("train.py: process 1: .*a file or a directory, got", outputs[0])
    assert re.search("train.py: .*a file or a directory, got", outputs[1])


@pytest.mark.slow
def test_a_second_job_on_the_port_does_not_end_the_first(text, tmp_path):
    port = free_port()
    flags = [*TINY, "--data", text, "--mesh", 2, 1, 1]
    with cluster(2, *flags, "--steps", 3000, "--run-dir", tmp_path / "first", port=port) as first:
        assert first[0].stdout is not None
        for line in first[0].stdout:
            if line.startswith("step"):
                break
        with cluster(2, *flags, "--run-dir", tmp_path / "second", "--join-timeout", 4, port=port) as second:
            codes, outputs = ends(second)
        assert codes == [2, 2], outputs
        assert "--coordinator: expected a port that is free on this machine" in outputs[0]
        assert "another job or program uses the port" in outputs[1]
        time.sleep(2)
        assert first[0].poll() is None
        first[1].send_signal(signal.SIGTERM)
        codes, outputs = ends(first)
    assert codes == [0, 0], outputs


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(text, tmp_path):
    """Two processes of two devices each; stopped by SIGTERM to one of them, then gone on with by one process."""
    flags = [*SMALL, "--data", text, "--steps", 30, "--run-dir"]
    train(*flags, tmp_path / "straight")
    run_dir = tmp_path / "run"
    with cluster(2, *flags, run_dir, "--mesh", 2, -1, 1, devices=2) as processes:
        assert processes[0].stdout is not None
        for line in processes[0].stdout:
            if line.startswith("step 10/"):
                processes[1].send_signal(signal.SIGTERM)
                break
        codes, outputs = ends(processes)
    assert codes == [0, 0], outputs
    assert "Stopped after step" in outputs[0]
    train("--run-dir", run_dir, "--mesh", 1, 1, 1)
    expected = dict(losses(tmp_path / "straight"))
    for step, loss in losses(run_dir):
        assert loss == pytest.approx(expected[step], abs=2e-5)
    assert len(losses(run_dir)) == 30


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:27335"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: NCCL operation ncclAllReduce failed: unhandled system error"), True),
        (ValueError("expected token ids from 0 to 271, got 999"), False),
        (OSError("Connection reset by peer"), False),  # of a file system, and says itself what it is
    ],
)
def test_a_peer_that_is_gone_is_told_from_other_errors(error, found):
    lost = lost_peer(error)
    assert (lost is not None) == found
    if lost is not None:
        assert str(lost).startswith("another process of the run is gone (")
        assert "\n" not in str(lost)
