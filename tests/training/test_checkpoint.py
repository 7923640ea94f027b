"""Checkpoints: whole, the last ones, not disturbed by the steps that follow; torn ones passed over."""

import json
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.checkpoint import Checkpoints, SaveFailed


def make_state(step: int):
    return {"params": {"layers": {0: {"w": jnp.full((4, 3), float(step))}}}, "step": jnp.int32(step)}


def like(state):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def checkpoints(tmp_path, said):
    opened = Checkpoints(tmp_path / "checkpoints", keep=3, say=said.append)
    yield opened
    opened.close()


@pytest.fixture
def written(checkpoints) -> Checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), {"row": 8 * step})
    checkpoints.wait()
    return checkpoints


def tear(step_dir: Path, how: str) -> None:
    match how:
        case "arrays gone":
            shutil.rmtree(step_dir / "state" / "d")
        case "arrays cut short":
            for path in step_dir.rglob("d/*"):
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "state gone":
            shutil.rmtree(step_dir / "state")
        case "marker gone":
            (step_dir / "_CHECKPOINT_METADATA").unlink()
        case "empty":
            shutil.rmtree(step_dir)
            step_dir.mkdir()


TEARS = ["arrays gone", "arrays cut short", "state gone", "marker gone", "empty"]


def test_an_empty_directory_restores_nothing(checkpoints):
    assert checkpoints.restore(like(make_state(0))) is None


def test_the_newest_is_restored_with_its_position(written):
    restored = written.restore(like(make_state(0)))
    assert (restored.step, restored.position) == (3, {"row": 24})
    np.testing.assert_array_equal(restored.state["params"]["layers"][0]["w"], 3.0)


def test_only_the_last_ones_are_kept(written):
    for step in (4, 5):
        written.save(step, make_state(step), {"row": 0})
    written.wait()
    assert written.steps == [3, 4, 5]
    assert sorted(path.name for path in written.directory.iterdir()) == ["3", "4", "5"]


def test_saving_goes_on_beside_steps_that_donate_the_state(checkpoints):
    step = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
    state = {"w": jnp.zeros((1 << 20,)), "n": jnp.int32(0)}
    for _ in range(3):
        state = step(state)
    checkpoints.save(3, state, {"row": 0})
    assert checkpoints._checkpointer.is_saving_in_progress()
    for _ in range(50):
        state = step(state)
    checkpoints.wait()
    restored = checkpoints.restore(like(state))
    np.testing.assert_array_equal(restored.state["w"], 3.0)
    assert int(restored.state["n"]) == 3


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[pytest.mark.slow] if number > 1 else []) for number, how in enumerate(TEARS)]
)
def test_a_torn_newest_one_is_passed_over_and_named(written, said, how):
    tear(written.directory / "3", how)
    restored = written.restore(like(make_state(0)))
    assert (restored.step, restored.position) == (2, {"row": 16})
    np.testing.assert_array_equal(restored.state["params"]["layers"][0]["w"], 2.0)
    assert "checkpoint 3 is torn, going back to the one before" in said[0]
    assert "\n" not in said[0]
    # It neither counts among those kept nor stands in the way of the step when it comes again.
    assert written.steps == [1, 2]
    assert (written.directory.parent / "checkpoints-torn-3").is_dir()
    written.save(3, make_state(30), {"row": 24})
    written.wait()
    assert float(written.restore(like(make_state(0))).state["params"]["layers"][0]["w"][0, 0]) == 30


def test_several_torn_ones(written, said):
    for step in (2, 3):
        tear(written.directory / str(step), "arrays cut short")
    assert written.restore(like(make_state(0))).step == 1
    assert [line.split(",")[0] for line in said[:2]] == ["checkpoint 3 is torn", "checkpoint 2 is torn"]


def test_if_all_are_torn_none_is_moved_and_the_run_does_not_begin_anew(written):
    for step in (1, 2, 3):
        tear(written.directory / str(step), "state gone")
    with pytest.raises(ValueError, match=r"expected a whole checkpoint in .*, got 3 that cannot be read"):
        written.restore(like(make_state(0)))
    assert (written.directory / "3").is_dir()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"w": jnp.ones((4, 5))}, r"params.layers.0.w float32\[4, 5\].*float32\[4, 3\]"),
        ({"w": jnp.ones((4, 3), "bfloat16")}, r"bfloat16\[4, 3\].*float32\[4, 3\]"),
        ({}, "params.layers.0.w absent"),
        ({"w": jnp.ones((4, 3)), "b": jnp.ones(3)}, r"params.layers.0.b float32\[3\] .* got none"),
    ],
)
def test_a_checkpoint_of_another_shape_is_one_line(written, said, layer, message):
    with pytest.raises(ValueError, match=message) as raised:
        written.restore(like({"params": {"layers": {0: layer}}, "step": jnp.int32(0)}))
    assert "\n" not in str(raised.value)
    assert not said  # and is not taken for a torn one
    assert written.steps == [1, 2, 3]


def test_positions_are_plain_json(written):
    stored = json.loads((written.directory / "2" / "_CHECKPOINT_METADATA").read_text())
    assert stored["custom_metadata"] == {"row": 16}


@pytest.mark.parametrize("name", ["lr=3e-4,layers=[0,1]", "back\\slash", "gs:", "a*b?", "bad\udcffbytes", "é 中"])
def test_directories_of_any_name(tmp_path, name):
    directory = tmp_path / name / "checkpoints"
    for step in (1, 2):
        written = Checkpoints(directory, keep=1)
        written.save(step, make_state(step), {"row": step})
        written.close()
        opened = Checkpoints(directory, keep=1)
        assert opened.restore(like(make_state(0))).step == step
        assert opened.written == [step]
        opened.close()
    assert [path.name for path in directory.iterdir()] == ["2"]
    directory.parent.rename(tmp_path / "plain")
    moved = Checkpoints(tmp_path / "plain" / "checkpoints", keep=1)
    assert moved.restore(like(make_state(0))).step == 2
    moved.close()


def test_no_alias_stays_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    Checkpoints(tmp_path / "[1]" / "checkpoints", keep=1).close()
    assert [path for path in (tmp_path / "tmp").rglob("*") if not path.is_dir()] == []


def test_a_full_disk_is_one_line_and_leaves_the_others_whole(tmp_path):
    state = {"w": jnp.asarray(np.random.default_rng(0).random(1 << 16, np.float32))}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    checkpoints.save(1, state, {"row": 1})
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        checkpoints.save(2, state, {"row": 2})
        with pytest.raises(SaveFailed, match=r"checkpoint 2 could not be written to .* File too large"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.written == [1]
    assert [path.name for path in checkpoints.directory.iterdir()] == ["1"]  # what was half-written takes no room
    checkpoints.save(3, state, {"row": 3})  # there is room again
    checkpoints.wait()
    assert checkpoints.restore(like(state)).step == 3
    checkpoints.close()


class Orphan:
    """Something whose end raises where nobody can catch it."""

    def __init__(self, message: str):
        self.message = message

    def __del__(self):
        raise RuntimeError(self.message)


def test_writes_that_end_after_their_checkpoint_was_given_up_are_not_heard(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(str(unraisable.exc_value)))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    for message in ("Event loop is closed", "something else"):
        Orphan(message)
    checkpoints.close()
    Orphan("Event loop is closed")
    assert heard == ["something else", "Event loop is closed"]


def test_those_not_to_go_on_from_are_moved_aside(written):
    written.discard([2, 3], "diverged")
    assert written.written == [1]
    assert written.restore(like(make_state(0))).step == 1
    assert (written.directory.parent / "checkpoints-diverged-3").is_dir()
