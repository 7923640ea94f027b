"""The directory of a run: nobody's work is replaced."""

import dataclasses
from pathlib import Path

import pytest

from training.config import recipe
from training.pretrained import replace_directory
from training.run_dir import with_run_dir


@pytest.mark.parametrize("name", ["model", "results.json", "loss.png", "metrics.jsonl"])
def test_what_is_no_runs_is_not_replaced(tmp_path, name):
    config = dataclasses.replace(recipe("tiny"), run_dir=str(tmp_path))
    assert with_run_dir(config) == config
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(ValueError, match=rf"--run-dir: expected a run's directory, .* got .* with {name}, but no"):
        with_run_dir(config)
    (tmp_path / "config.json").write_text(config.to_json())  # that of a run: it is the run's own
    assert with_run_dir(config) == config


def test_copies_beside_a_model_stay(tmp_path):
    for name in ("model", "model.old", "model.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)

    def write(directory: Path) -> None:
        directory.mkdir()
        (directory / "weights").write_text("new")

    replace_directory(tmp_path / "model", write)
    names = {path.name: (path / "weights").read_text() for path in tmp_path.iterdir()}
    assert names == {"model": "new", "model.old": "model.old", "model.new": "model.new"}
