"""Flags to config, and one line for each thing that can be wrong with them."""

import dataclasses

import pytest

import models
from s2jax import Dense, FirstTokens, Local, LocalStride
from train import load_data
from training.command_line import parse
from training.config import Config, ModelOptions, recipe


@pytest.mark.parametrize("preset", list(models.PRESETS))
def test_every_preset_has_a_recipe_whose_model_is_the_preset(preset):
    config = parse(["--preset", preset])
    assert config == recipe(preset)
    assert config.model.transformer() == models.PRESETS[preset]


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
        ("--optimizer sgd", "--optimizer: expected one of muon, adamw, got 'sgd'"),
        ("--dtype float8", "--dtype: expected one of bfloat16, float32, got 'float8'"),
        ("--remat some", "--remat: expected one of none, attention, full, got 'some'"),
        ("--preset big", "--preset: expected one of tiny, .*got big"),
        ("--mesh 2 2", "--mesh: expected 3 whole numbers, got '2 2'"),
        ("--mesh a b c", "--mesh: expected 3 whole numbers, got 'a b c'"),
        ("--mesh 0 1 1", "--mesh: expected three device counts, one of which may be -1, got 0 1 1"),
        ("--mesh -1 -1 1", "--mesh: expected three device counts"),
        ("--coordinator host:1", "--coordinator: expected --distributed beside it"),
        ("--distributed --num-processes 2", "--distributed: expected all or none of"),
        ("--num-heads 5", "--num-heads must be a multiple of num_kv_heads"),
        ("--pattern LocalStride(24)", "--pattern: .*block_size .* 24"),
        ("--pattern LocalStride(16,-1,2)", "--pattern: .*local_blocks .* -1"),
        ("--pattern Sparse(3)", "--pattern: expected a pattern such as 'LocalStride.64, 16, 8.' .* got 'Sparse.3.'"),
        ("--dense-layers 9", "--dense-layers must be layer indices from 0 to 3"),
        ("--dense-layers 0 x", "--dense-layers: expected whole numbers, got '0 x'"),
        ("--rope-scaling 1 2", "--rope-scaling: expected 4 numbers or None, got '1 2'"),
        ("--qk-norm true", "--qk-norm: expected no value, got 'true'"),
        ("--steps", "--steps: expected a whole number, got none"),
        ("--steps 1 2", "--steps: expected a whole number, got '1 2'"),
        ("--steps 5 --seed 1 --steps 7", "--steps: expected once, got it twice"),
        ("--qk-norm --no-qk-norm", "--no-qk-norm: expected once, got it twice"),
        (f"--steps {10**30}", "--steps: expected a whole number of at most 2147483647, got 1000"),
        (f"--d-model {10**30}", "--d-model: expected a whole number of at most"),
        (f"--num-layers {10**9}", "--num-layers: expected a whole number of at most"),
        (f"--seq-len {10**10}", "--seq-len: expected a whole number of at most"),
        (f"--seed {'9' * 5000}", "--seed: expected a whole number, got '999"),
        ("--norm-eps inf", "--norm-eps: expected a positive number, got inf"),
        ("--implementation cuda", "--implementation: expected one of auto, mosaic_gpu, .* got cuda"),
        ("--end-token 272", "--end-token: expected a token id below --vocab-size 272, got 272"),
        ("--data=", "--data: expected a path, got ''"),
        ("--run-dir=", "--run-dir: expected a path, got ''"),
        ("--text-field=", "--text-field: expected the name of a field, got ''"),
        ("--prompt \udc80", r"--prompt: expected text in UTF-8, got \\udc80"),
        ("--data gs://bucket/texts", "--data: expected a path of a file system .* got gs://bucket/texts"),
        ("--run-dir s3://bucket/run", "--run-dir: expected a path of a file system"),
        ("--pretrained hf://org/name", "--pretrained: expected a path of a file system"),
        ("--config gs:/bucket/c.json", "--config: expected a path of a file system"),
        (f"--run-dir {'x' * 5000}", "--run-dir: expected a directory, got .*File name too long"),
        ("texts --steps 3", "expected a flag first, such as --data, got 'texts'"),
        ("--sparse", "--sparse: there is no such flag"),
        ("--stesp 3", r"--stesp: there is no such flag; did you mean --steps\?"),
        ("--lr 3", r"did you mean --learning-rate\?"),
        ("--hidden-size 3", r"did you mean --d-model\?"),
        ("--resume-from-checkpoint x", r"did you mean --run-dir\?"),
        ("--learn_rate 3", r"did you mean --learning-rate\?"),
        ("--optimizer.warmup-steps 3", r"did you mean --warmup-steps\?"),
    ],
)
def test_bad_values_are_one_line(flags, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse(flags.split())
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700


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


def test_flags_may_have_underscores_and_values_may_begin_with_hyphens(tmp_path, small_config):
    saved = dataclasses.replace(small_config, run_dir=str(tmp_path))
    (tmp_path / "config.json").write_text(saved.to_json())
    assert parse(["--run_dir", str(tmp_path), "--batch_size=16"]).input.batch_size == 16
    assert parse(["--run_dir", str(tmp_path)]) == saved  # its config is found by that name, too
    assert parse(["--prompt", "-x"]).output.prompt == parse(["--prompt=-x"]).output.prompt == "-x"
    assert parse(["--prompt=--steps"]).output.prompt == "--steps"
    assert parse(["--learning-rate", "None", "--rope-scaling", "None"]) == recipe("tiny")


@pytest.mark.parametrize(
    "flags",
    ["--help", "-h", "--preset none --help", "--pretrained /no/such --help", "--nonsense -h", "--config x --help"],
)
def test_help_is_shown_whatever_else_is_wrong(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flags.split())
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(preset in shown for preset in models.PRESETS)
    assert "--config FILE" in shown


def test_a_run_found_in_its_directory_gives_the_defaults(tmp_path, small_config):
    saved = dataclasses.replace(small_config, run_dir=str(tmp_path))
    (tmp_path / "config.json").write_text(saved.to_json())
    assert parse(["--run-dir", str(tmp_path)]) == saved
    assert parse([f"--run-dir={tmp_path}", "--steps", "99"]) == dataclasses.replace(saved, steps=99)
    with pytest.raises(ValueError, match="--preset: expected tiny, as in"):
        parse(["--run-dir", str(tmp_path), "--preset", "s2-7b"])


@pytest.mark.parametrize("pattern", [Local(4) & (Dense() | FirstTokens(2)), LocalStride(64, 4, 8, homo_head=True)])
def test_every_pattern_has_its_flag(pattern):
    config = dataclasses.replace(models.PRESETS["tiny"], pattern=pattern)
    assert ModelOptions.of(config).transformer() == config
