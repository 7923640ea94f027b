"""Options without an effect: each is said in one line, or refused."""

import numpy as np
import pytest

from train import load_data
from training.command_line import flags_of, parse

SAMPLE = "no effect: the sample at the end is of models of bytes alone"
LEFT_OUT = "no effect: --sample-bytes 0 leaves the sample out"
NO_BIN = "--token-dtype has no effect: the data has no .bin file"
NO_FIELDS = "--text-field has no effect: the data has no .jsonl file and no records"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unused")
    ids = np.arange(2000) % 250
    np.save(folder / "ids.npy", ids.astype(np.uint16))
    ids.astype(np.uint16).tofile(folder / "ids.bin")
    (folder / "text.txt").write_text("some text " * 200)
    (folder / "text.jsonl").write_text('{"text": "some text", "body": "some other"}\n' * 200)
    return folder


@pytest.mark.parametrize(
    ("file", "flags", "lines"),
    [
        ("text.txt", "--steps 3", []),
        ("text.txt", "--prompt a --sample-bytes 3 --temperature 1", []),
        ("text.txt", "--prompt a --sample-bytes 0 --temperature 1", [f"--prompt and --temperature have {LEFT_OUT}"]),
        ("ids.bin", "--prompt a --token-dtype uint16", [f"--prompt has {SAMPLE}"]),
        ("ids.bin", "--sample-bytes 300", [f"--sample-bytes has {SAMPLE}"]),
        ("ids.npy", "--token-dtype uint16", [NO_BIN]),
        ("text.txt", "--token-dtype uint32 --text-field body", [NO_BIN, NO_FIELDS]),
        ("text.jsonl", "--text-field body", []),
        ("ids.bin", "--text-field body", [NO_FIELDS]),
        ("text.txt", "--steps 3 --eval-every 2", []),
        (
            "text.txt",
            "--steps 3 --eval-every 3",
            ["--eval-every has no effect: the last of the 3 steps is scored in any case"],
        ),
        (
            "text.txt",
            "--pattern Dense() --dense-layers 1",
            ["--dense-layers has no effect: --pattern is dense in every layer"],
        ),
        ("text.txt", "--pattern Dense()", []),
        (
            "text.txt",
            "--pattern Local(2) --dense-layers 0 1 2 3",
            ["--pattern has no effect: --dense-layers names every layer"],
        ),
    ],
)
def test_what_has_no_effect_is_said(data, capsys, file, flags, lines):
    argv = [*flags.split(), "--data", str(data / file)]
    load_data(parse(argv), None, flags_of(argv))
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "no effect" in line] == lines


def test_options_of_a_file_are_heard_too(data, tmp_path, capsys):
    (tmp_path / "options.json").write_text('{"output": {"prompt": "a"}}')
    argv = ["--config", str(tmp_path / "options.json"), "--data", str(data / "ids.npy")]
    load_data(parse(argv), None, flags_of(argv))
    assert f"--prompt has {SAMPLE}" in capsys.readouterr().out


def test_waiting_for_nobody_is_refused():
    with pytest.raises(ValueError, match="--join-timeout: expected --distributed beside it, got it alone"):
        parse(["--join-timeout", "3"])
    assert parse(["--join-timeout", "3", "--distributed"]).devices.join_timeout == 3
