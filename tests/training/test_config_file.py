"""Config files: what a run wrote comes back exactly, and every slip is one line that names it."""

import dataclasses
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from training.command_line import parse
from training.config import DataOptions, DeviceOptions, OptimizerOptions, OutputOptions, recipe
from training.config_file import overlaid, read_config, read_values

COUNTS = st.integers(1, 2**31 - 1)
RATES = st.floats(1e-30, 1e30)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
PATHS = st.one_of(st.none(), TEXTS.filter(str.strip).map(lambda text: f"./{text}"))


@st.composite
def configs(draw):
    base = recipe("tiny")
    accumulate = draw(st.integers(1, 4))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model,
            dense_layers=tuple(draw(st.sets(st.integers(0, 3)))),
            qk_norm=draw(st.booleans()),
            rope_theta=draw(RATES),
            rope_scaling=draw(st.sampled_from([None, (8.0, 1.0, 4.0, 8192), (1.5, 0.1, 0.3, 1)])),
            pattern=draw(st.sampled_from(["Dense()", "LocalStride(64, 16, 8) | FirstBlocks(1)"])),
        ),
        data=draw(PATHS),
        steps=draw(COUNTS),
        seed=draw(st.integers(0, 2**31 - 1)),
        input=DataOptions(
            seq_len=draw(st.integers(2, 2**24)),
            batch_size=accumulate * draw(st.integers(0, 100)),
            heldout=draw(st.floats(0, 1, exclude_min=True, exclude_max=True)),
            text_field=draw(TEXTS.filter(bool)),
            end_token=draw(st.none() | st.integers(0, 271)),
            named_splits=draw(st.booleans()),
        ),
        optimizer=OptimizerOptions(
            optimizer=draw(st.sampled_from(["muon", "adamw"])),
            learning_rate=draw(st.none() | RATES),
            weight_decay=draw(st.floats(0, 1e30)),
            accumulate=accumulate,
        ),
        devices=DeviceOptions(mesh=draw(st.sampled_from([(1, -1, 1), (2, 2, 2), (-1, 3, 1)]))),
        output=OutputOptions(keep=draw(COUNTS), prompt=draw(TEXTS), temperature=draw(st.floats(0, 1e30))),
    )


@given(config=configs())
def test_what_a_run_wrote_gives_the_config_back(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("configs")
    (folder / "config.json").write_text(config.to_json())
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(config.to_json())))
    assert read_config(folder / "config.json") == config
    for name in ("config.json", "config.yaml"):
        assert overlaid(recipe("s2-7b"), read_values(folder / name), name) == config


@settings(max_examples=3)
@given(config=configs())
def test_what_a_run_wrote_can_be_given_back(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("configs") / "config.json"
    path.write_text(config.to_json())
    assert parse([f"--config={path}"]) == config
    assert parse(["--config", str(path), "--steps", "7"]) == dataclasses.replace(config, steps=7)


def write(tmp_path, content: str, name: str = "c.yaml") -> str:
    path = tmp_path / name
    path.write_text(content)
    return str(path)


def test_a_part_of_a_config_changes_the_recipe_and_flags_change_that(tmp_path):
    path = write(tmp_path, "preset: s2-1.3b\nsteps: 5\noptimizer:\n  learning_rate: 1e-4\n  warmup_steps: 2 # of 5\n")
    config = parse(["--config", path, "--warmup-steps", "3"])
    expected = recipe("s2-1.3b")
    optimizer = dataclasses.replace(expected.optimizer, learning_rate=1e-4, warmup_steps=3)
    assert config == dataclasses.replace(expected, steps=5, optimizer=optimizer)
    assert isinstance(config.optimizer.learning_rate, float)


def test_a_run_and_a_file_and_flags_come_in_that_order(tmp_path, small_config):
    saved = dataclasses.replace(small_config, run_dir=str(tmp_path))
    (tmp_path / "config.json").write_text(saved.to_json())
    path = write(tmp_path, json.dumps({"run_dir": str(tmp_path), "steps": 20, "seed": 4}), "other.json")
    assert parse(["--config", path, "--seed", "5"]) == dataclasses.replace(saved, steps=20, seed=5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stesp: 3", "there is no option 'stesp'; the nearest is 'steps'"),
        ("seq_len: 3", r"seq_len belongs into input: \{"),
        ("input: {seqlen: 3}", "there is no option 'seqlen'; the nearest is 'seq_len'"),
        ("input: 3", "input: expected an object with the options of that part, got 3"),
        ("steps: many", "steps: expected int, got 'many'"),
        ("steps: 1.5", "steps: expected int, got 1.5"),
        ("steps: true", "steps: expected int, got True"),
        ("steps: 017", "steps: expected int, got '017'"),
        ("steps: 1:30", "steps: expected int, got '1:30'"),
        ("steps: 0x1F", "steps: expected int, got '0x1F'"),
        ("devices: {mesh: [1, 1, true]}", r"mesh: expected tuple.*, got \[1, 1, True\]"),
        ("steps:", "steps: expected int, got None"),
        ("steps: 0", "--steps: expected a whole number of at least 1, got 0"),
        ("steps: .nan", "steps: expected int, got nan"),
        ("data: 3", r"data: expected str \| None, got 3"),
        ("optimizer: {optimizer: sgd}", "optimizer: expected Literal.*, got 'sgd'"),
        ("optimizer: {learning_rate: [1, 2]}", r"learning_rate: expected float \| None, got \[1, 2\]"),
        ("devices: {mesh: [1, 1]}", r"mesh: expected tuple.*, got \[1, 1\]"),
        ("preset: 7", "preset: expected a string, got 7"),
        ("preset: tinny", "--preset: expected one of tiny, .* got tinny"),
        ("steps: 1\nsteps: 2", "got 'steps' twice"),
        ("input: &a {seq_len: 3}\nmodel: *a", r"an alias \(\*\); write the value out"),
        ("[1, 2]", "no object with the names of options"),
        ("1: 2", "a name that is no string"),
        ("", "no object with the names of options"),
        ("steps: [", "got while parsing"),
        ("!!python/object/apply:os.abort []", "could not determine a constructor"),
        ("a: " + "[" * 2000, "nested too deeply|got while"),
        ("steps: " + "9" * 5000, "Exceeds the limit"),
        ("prompt: " + "x" * 200_000, "got 200008 bytes"),
        ('output: {prompt: "\\ud800"}', "--prompt: expected text in UTF-8|got while|surrogate"),
    ],
)
def test_slips_are_one_short_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse(["--config", write(tmp_path, content)])
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.json", "{", "got Expecting"),
        ("c.json", '{"steps": 1, "steps": 2}', "got 'steps' twice"),
        ("c.json", "[" * 50_000, "nested too deeply"),
        ("c.json", '{"steps": NaN}', "steps: expected int, got nan"),
        ("c.json", "\ufeff{}", "BOM"),
        ("c.txt", "{}", "got the suffix '.txt'"),
        ("c.toml", "", "got the suffix '.toml'"),
    ],
)
def test_files_that_hold_no_config(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        parse(["--config", write(tmp_path, content, name)])


def test_a_missing_file_a_directory_and_bytes_are_named(tmp_path):
    (tmp_path / "c.json").write_bytes(b"\xff\xfe{")
    for path, message in (("no.json", "no such file"), (".", "no regular file"), ("c.json", "can't decode byte")):
        with pytest.raises(ValueError, match=f"expected a config in JSON or YAML in .* got .*{message}"):
            parse(["--config", str(tmp_path / path)])


@pytest.mark.parametrize("content", ["", "[]", '{"steps": 3}', "{", "[" * 50_000])
def test_a_spoiled_config_of_a_run_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="expected the config of a run of this version in") as raised:
        parse(["--run-dir", str(tmp_path)])
    assert len(str(raised.value)) < 600 + 2 * len(str(tmp_path))


@pytest.mark.parametrize("change", [{"steps": "3"}, {"extra": 1}, {"input": []}, {"data": ["a"]}, {"seed": None}])
def test_a_config_with_other_types_is_refused(tmp_path, small_config, change):
    (tmp_path / "config.json").write_text(json.dumps(json.loads(small_config.to_json()) | change))
    with pytest.raises(ValueError, match="expected the config of a run of this version in"):
        parse(["--run-dir", str(tmp_path)])


def test_a_process_s_place_in_a_cluster_is_not_saved(tmp_path, small_config):
    devices = DeviceOptions((2, 2, 2), distributed=True, coordinator="h:1", num_processes=2, process_id=1)
    path = tmp_path / "config.json"
    path.write_text(dataclasses.replace(small_config, devices=devices).to_json())
    assert read_config(path).devices == DeviceOptions((2, 2, 2))


def test_the_preset_of_a_flag_must_be_the_file_s(tmp_path):
    path = write(tmp_path, "preset: s2-7b")
    with pytest.raises(ValueError, match=r"--preset: expected s2-7b, as in .*c.yaml, got tiny"):
        parse(["--config", path, "--preset", "tiny"])
