"""Flags to config, and one line for each thing that can be wrong with them."""

import dataclasses

import pytest

import models
from s2jax import Dense, FirstTokens, Local, LocalStride
from train import load_data
from training.command_line import parse
from training.config import Config, DeviceOptions, ModelOptions, recipe


@pytest.mark.parametrize("preset", list(models.presets))
def test_every_preset_has_a_recipe_whose_model_is_the_preset(preset):
    config = parse(["--preset", preset])
    assert config == recipe(preset)
    assert config.model.transformer() == models.presets[preset]


def test_flags_reach_their_fields():
    flags = (
        "--data d --steps 7 --seq-len 32 --pattern LocalStride(16,4,2) --dense-layers 1 3 --optimizer adamw "
        "--mesh 2 -1 2 --keep 5 --no-qk-norm --remat full --learning-rate 0.5"
    )
    config = parse(flags.split())
    assert (config.data, config.steps, config.input.seq_len, config.output.keep) == ("d", 7, 32, 5)
    assert config.devices.mesh == (2, -1, 2)
    assert config.optimizer.matrix_rate == 0.5
    model = config.model.transformer()
    assert (model.dense_layers, model.qk_norm, model.remat) == ((1, 3), False, "full")
    assert model.pattern == LocalStride(16, 4, 2)


def test_the_rate_follows_the_optimizer():
    assert parse(["--optimizer", "muon"]).optimizer.matrix_rate == 0.02
    assert parse(["--optimizer", "adamw"]).optimizer.matrix_rate == 0.003


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 0", "--steps: expected a whole number of at least 1, got 0"),
        ("--steps -3", "--steps: expected a whole number of at least 1, got -3"),
        ("--steps 1.5", "--steps: expected a whole number, got '1.5'"),
        ("--batch-size x", "--batch-size: expected a whole number, got 'x'"),
        ("--end-token 1.5", "--end-token: expected a whole number or None, got '1.5'"),
        ("--end-token -1", "--end-token: expected a whole number of at least 0, got -1"),
        ("--learning-rate -1", "--learning-rate: expected a positive number, got -1.0"),
        ("--learning-rate nan", "--learning-rate: expected a positive number, got nan"),
        ("--learning-rate fast", "--learning-rate: expected a number or None, got 'fast'"),
        ("--clip-norm 0", "--clip-norm: expected a positive number"),
        ("--heldout 1", "--heldout: expected a share between 0 and 1"),
        ("--temperature -1", "--temperature: expected a number from 0 up"),
        ("--batch-size 8 --accumulate 3", "--accumulate: expected a divisor of the 8 rows of a batch, got 3"),
        ("--optimizer sgd", "invalid choice 'sgd' .* 'adamw'"),
        ("--dtype float8", "invalid choice 'float8' .*'bfloat16'"),
        ("--remat some", "invalid choice 'some' .* 'attention'"),
        ("--preset big", "--preset: expected one of tiny, .*got big"),
        ("--mesh 2 2", "'--mesh'. Expected 3 values"),
        ("--mesh 0 1 1", "--mesh: expected three device counts, one of which may be -1, got 0 1 1"),
        ("--mesh -1 -1 1", "--mesh: expected three device counts"),
        ("--coordinator host:1", "--coordinator: expected --distributed beside it"),
        ("--distributed --num-processes 2", "--distributed: expected all or none of"),
        ("--num-heads 5", "num_heads must be a multiple of num_kv_heads"),
        ("--pattern LocalStride(24)", "--pattern: block_size .* 24"),
        ("--pattern LocalStride(16,-1,2)", "--pattern: .*local_blocks .* -1"),
        ("--pattern Sparse(3)", "--pattern: expected a pattern such as 'LocalStride.64, 16, 8.' .* got 'Sparse.3.'"),
        ("--dense-layers 9", "dense_layers must be layer indices from 0 to 3"),
        ("--sparse", "Unrecognized options: --sparse"),
    ],
)
def test_bad_values_are_one_line(flags, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse(flags.split())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("data", [[], ["--data", __file__]])
def test_bytes_need_their_vocabulary(data):
    with pytest.raises(ValueError, match="--vocab-size: expected at least 257 for byte-level text, got 256"):
        load_data(parse(["--vocab-size", "256", *data]), None)


def test_help_names_every_flag_in_groups(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for part in ("model options", "input options", "optimizer options", "devices options", "output options"):
        assert part in shown
    for part in dataclasses.fields(Config):
        fields = dataclasses.fields(part.default_factory()) if part.name in ("input", "optimizer", "output") else [part]
        for field in fields:
            if field.name not in ("model", "devices"):
                assert f"--{field.name.replace('_', '-')}" in shown


def test_a_config_survives_json(tmp_path, small_config):
    path = tmp_path / "config.json"
    path.write_text(small_config.to_json())
    assert Config.from_json(path) == small_config


def test_a_process_s_place_in_a_cluster_is_not_saved(tmp_path, small_config):
    devices = DeviceOptions((2, 2, 2), distributed=True, coordinator="h:1", num_processes=2, process_id=1)
    path = tmp_path / "config.json"
    path.write_text(dataclasses.replace(small_config, devices=devices).to_json())
    assert Config.from_json(path).devices == DeviceOptions((2, 2, 2))


def test_a_run_found_in_its_directory_gives_the_defaults(tmp_path, small_config):
    saved = dataclasses.replace(small_config, run_dir=str(tmp_path))
    (tmp_path / "config.json").write_text(saved.to_json())
    assert parse(["--run-dir", str(tmp_path)]) == saved
    assert parse([f"--run-dir={tmp_path}", "--steps", "99"]) == dataclasses.replace(saved, steps=99)
    with pytest.raises(ValueError, match="--preset: expected tiny, as in"):
        parse(["--run-dir", str(tmp_path), "--preset", "s2-7b"])


@pytest.mark.parametrize("content", ["", "[]", '{"steps": 3}', "{"])
def test_a_spoiled_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="expected the config of a run of this version in"):
        parse(["--run-dir", str(tmp_path)])


@pytest.mark.parametrize("pattern", [Local(4) & (Dense() | FirstTokens(2)), LocalStride(64, 4, 8, homo_head=True)])
def test_every_pattern_has_its_flag(pattern):
    config = dataclasses.replace(models.presets["tiny"], pattern=pattern)
    assert ModelOptions.of(config).transformer() == config
