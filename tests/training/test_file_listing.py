"""Files of a directory: behind links, each once, and everything else counted."""

import os

from training.file_listing import files_under
from training.left_out import LeftOut


def listed(directory) -> tuple[list[str], dict[str, tuple[int, str]]]:
    left_out = LeftOut()
    found = files_under(directory, left_out)
    return [path.relative_to(directory).as_posix() for path in found], left_out.reasons


def test_directories_and_files_behind_links_are_read(tmp_path):
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/deep/a").write_text("a")
    (tmp_path / "b").write_text("b")
    data = tmp_path / "data"
    data.mkdir()
    (data / "folder").symlink_to(tmp_path / "elsewhere")
    (data / "file").symlink_to("../b")
    assert listed(data) == (["file", "folder/deep/a"], {})
    (tmp_path / "link").symlink_to(data)
    assert listed(tmp_path / "link") == (["file", "folder/deep/a"], {})


def test_cycles_end_and_nothing_counts_twice(tmp_path):
    (tmp_path / "z").mkdir()
    (tmp_path / "z/text").write_text("a")
    os.link(tmp_path / "z/text", tmp_path / "z/twin")
    for name, target in {"a": "z/text", "b": "z", "z/up": "..", "z/self": "self", "c": "nowhere"}.items():
        (tmp_path / name).symlink_to(target)
    # What has its name without a link is known by it, whatever comes first in the alphabet.
    assert listed(tmp_path) == (
        ["z/text"],
        {"link(s) to what was read already": (4, "z/twin"), "broken link(s)": (2, "c")},
    )


def test_pipes_are_not_opened_and_hidden_names_are_counted(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/a").write_text("a")
    (tmp_path / ".b").write_text("b")
    assert listed(tmp_path) == ([], {"pipe, socket or device": (1, "pipe"), "hidden": (2, ".b")})


def test_a_folder_that_cannot_be_listed_is_counted(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def refuse(path):  # chmod would not stop root
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert listed(tmp_path) == ([], {"unreadable: Permission denied": (1, "locked/")})


def test_what_runs_wrote_is_no_data(tmp_path):
    run = tmp_path / "runs/x"
    for folder in ("checkpoints/3", "checkpoints-torn-1", "model", "texts"):
        (run / folder).mkdir(parents=True)
        (run / folder / "config.json").write_text("{}")
    for name in ("run.lock", "config.json", "metrics.jsonl", "results.json", "loss.png", "note.txt"):
        (run / name).write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")  # beside no run
    found, left_out = listed(tmp_path)
    assert found == ["model/config.json", "runs/x/note.txt", "runs/x/texts/config.json"]
    assert left_out == {"of a run": (8, "runs/x/checkpoints")}
