"""What a run tells: metrics, progress, speed, plot."""

import dataclasses
import json
import struct
import sys
from collections.abc import Iterator

import pytest
from tensorboardX.proto.event_pb2 import Event

from training import metrics
from training.metrics import MetricsLog, Progress, describe_speed, mfu, peak_flops, plot_loss
from training.profile import Profile
from training.trackers import Trackers, check_packages


def test_a_run_that_goes_on_drops_the_lines_beyond_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, from_step=0)
    for step in range(1, 6):
        log.write(step=step, loss=step / 2, mfu=None)
    log.close()
    path.write_text(path.read_text() + '{"step": 2, "lo')  # a line cut short by a crash
    log = MetricsLog(path, from_step=3)
    log.write(step=4, loss=9.0)
    log.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 9.0)]
    assert "mfu" not in records[0]


@pytest.mark.parametrize("line", ['{"step": "1"}', '{"step": null}', "[1]", "1", "", "[" * 100_000, '{"step": 1.5}'])
def test_lines_that_are_no_metrics_are_dropped(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    MetricsLog(tmp_path / "metrics.jsonl", from_step=1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_profile_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "profile").write_text("a file")
    said = []
    profile = Profile((1, 1), tmp_path / "profile", said.append)
    profile.before(1)
    profile.after(1, None)
    profile.before(2)
    profile.close()
    assert len(said) == 1
    assert "The profile could not be written to" in said[0]


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


class _Device:
    device_kind = "NVIDIA H100 80GB HBM3"


def test_mfu_is_of_all_devices(monkeypatch):
    monkeypatch.setattr(metrics.jax, "devices", lambda: [_Device()] * 4)
    monkeypatch.setattr(metrics.jax, "device_count", lambda: 4)
    assert mfu(1e6, 989e6) == pytest.approx(0.25)
    assert "MFU 25.0% (989 TFLOP/s of the model, 4 × NVIDIA H100 80GB HBM3)" in describe_speed(1e6, 989e6)


def test_without_a_peak_there_is_no_mfu_but_a_word():
    assert mfu(1e3, 1e6) is None
    assert "1 GFLOP/s of the model (no MFU, for no peak is known for the device cpu)" in describe_speed(1e3, 1e6)


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    progress = Progress(step=0, steps=100, tokens_per_step=50, shown=True)
    now[0] += 2
    assert progress.advance(10, 1.25) == pytest.approx(250)
    now[0] += 1000
    progress.restart_clock()  # a checkpoint was written
    now[0] += 2
    progress.advance(20, 1.0)
    progress.finish()
    assert capsys.readouterr().out.splitlines() == [
        "step  10/100  loss 1.2500  250 tokens/s  0:18 left",
        "step  20/100  loss 1.0000  250 tokens/s  0:16 left",
    ]
    assert progress.tokens_per_second() == pytest.approx(250)


def test_the_plot_is_a_png(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", from_step=0)
    for step in range(1, 50):
        log.write(step=step, loss=5 / step)
    log.close()
    plot_loss(tmp_path / "m.jsonl", tmp_path / "loss.png", unit="bits per byte", scale=1.44)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def tf_records(content: bytes) -> Iterator[bytes]:
    """The records of an event file: length, its checksum, the record, its checksum."""
    at = 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield content[at + 12 : at + 12 + length]
        at += 16 + length


def test_tensorboard_reads_the_metrics_of_the_last_attempt(tmp_path, small_config):
    """A run that goes on drops what is beyond its first step; nothing is left in memory for the end."""
    output = dataclasses.replace(small_config.output, tensorboard=True)
    config = dataclasses.replace(small_config, run_dir=str(tmp_path), output=output)
    written = []
    for from_step, scale in ((0, 1.0), (3, 10.0)):
        trackers = Trackers(config, from_step=from_step)
        for step in range(from_step + 1, 6):
            trackers.write(step, {"loss": scale * step, "mfu": None})
        trackers.flush()
        written.append(trackers)
    found = {}
    for path in sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for record in tf_records(path.read_bytes()):
            event = Event.FromString(record)
            if event.HasField("session_log"):
                found = {step: value for step, value in found.items() if step < event.step}
            for value in event.summary.value:
                found[event.step] = (value.tag, value.simple_value)
    for trackers in written:
        trackers.close()
    assert found == {step: ("loss", step * (1.0 if step <= 3 else 10.0)) for step in range(1, 6)}


def test_a_tracker_that_is_not_installed_is_one_line(small_config, monkeypatch):
    config = dataclasses.replace(small_config, output=dataclasses.replace(small_config.output, wandb="project"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"--wandb: expected the package wandb to be installed \(pip install wandb\)"):
        check_packages(config)
