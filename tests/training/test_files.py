"""Small files and the screen: whole or as before, and never the end of a run."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from training.files import write_whole
from training.metrics import MetricsLog

ROOT = Path(__file__).parents[2]


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "[a]" / "config.json"
    path.parent.mkdir()
    for content in ("one", b"two", "bad\udcff"):
        write_whole(path, content)
    assert path.read_bytes() == b"bad\xff"
    assert os.listdir(path.parent) == ["config.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.fixture
def full_disk():
    """Lets no file grow beyond 100 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_what_was_there(tmp_path, full_disk):
    write_whole(tmp_path / "config.json", "before")
    full_disk()
    with pytest.raises(OSError, match=r"File too large: .*config\.json"):
        write_whole(tmp_path / "config.json", "after" * 100)
    assert (tmp_path / "config.json").read_text() == "before"
    assert os.listdir(tmp_path) == ["config.json"]


def test_metrics_that_find_no_room_raise_and_can_be_gone_on_with(tmp_path, full_disk):
    log = MetricsLog(tmp_path / "metrics.jsonl", from_step=0)
    log.write(step=1, loss=0.5)
    full_disk()
    log.write(step=2, loss=0.25)
    with pytest.raises(OSError, match=r"File too large: .*metrics\.jsonl"):
        log.write(step=3, loss=0.125, note=10**60)
    log.close()
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert len(content) == 100
    again = MetricsLog(tmp_path / "metrics.jsonl", from_step=100)
    again.close()
    kept = (tmp_path / "metrics.jsonl").read_bytes()
    assert content.startswith(kept)
    assert kept.endswith(b"}\n")  # the torn line is gone


def test_removed_metrics_are_noticed(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", from_step=0)
    log.check()
    log.path.unlink()
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl was removed while the run went on"):
        log.check()
    log.close()


TALK = """
from training.output import show, tolerate_any_text, warn
tolerate_any_text()
for line in range(3000):
    show(f"κ × … 中 {line}")
warn("κ: done")
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_lines_that_the_encoding_lacks(encoding):
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", TALK], cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.decode(encoding).splitlines()) == 3000


@pytest.mark.parametrize("redirection", ["| head -1", "> /dev/full", ">&-", "2>&- | head -1", "> /dev/full 2>&1"])
def test_readers_that_are_gone(redirection):
    script = f"set -o pipefail; {sys.executable} -c '{TALK}' {redirection}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
