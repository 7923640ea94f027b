"""The programs of models: what they write where, and that whatever is wrong is one line and exit code 2."""

import io
import json
import os
import pathlib
import subprocess
import sys

import pytest

from models import chat, convert, generate
from models.command_line import run
from tests.models.programs import ran, write

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("kept_compilations")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write(tmp_path_factory.mktemp("programs") / "model")


class TestGenerate:
    def test_the_model_reads_by_the_pattern_that_it_was_saved_with(self, directory):
        code, out, err = ran(generate, "--model", directory, "--prompt", "ab", "--max-new-tokens", "40")
        assert (code, out.endswith("\n")) == (0, True)
        lines = err.splitlines()
        assert lines[:2] == [f"loading {directory} …", "compiling …"]
        assert "prompt: 3 tokens in " in lines[2]  # the boundary opens it
        assert "100% of a full one" not in lines[2]
        *_, dense = ran(
            generate, "--model", directory, "--prompt", "a", "--pattern", "Dense()", "--max-new-tokens", "2"
        )
        assert "100% of a full one" in dense

    def test_a_run_stands_for_its_model(self, directory, tmp_path):
        (tmp_path / "model").symlink_to(directory)
        (tmp_path / "config.json").write_text("{}")  # the run's own
        code, out, err = ran(generate, "--model", tmp_path, "--prompt", "ab", "--max-new-tokens", "2")
        assert (code, err.splitlines()[0]) == (0, f"loading {tmp_path} …")
        assert out == ran(generate, "--model", directory, "--prompt", "ab", "--max-new-tokens", "2")[1]

    def test_several_prompts_at_once(self, directory, tmp_path):
        (tmp_path / "long.txt").write_text("the quick brown fox " * 3)
        prompts = ["--prompt", "ab", "--prompt-file", tmp_path / "long.txt", "--prompt", "é"]
        code, out, err = ran(generate, "--model", directory, *prompts, "--max-new-tokens", "12")
        found = [json.loads(line) for line in out.splitlines()]
        assert code == 0
        assert "3 prompts: 67 tokens" in err
        assert [line["prompt"] for line in found] == ["ab", "the quick brown fox " * 3, "é"]
        for flags, line in zip((prompts[:2], prompts[2:4], prompts[4:]), found, strict=True):
            alone = ran(generate, "--model", directory, *flags, "--max-new-tokens", "12")[1]
            assert alone == line["text"] + "\n"
            assert line["end"] in ("length", "token")

    def test_a_stop_string_ends_the_text_before_it(self, directory):
        flags = "--model", directory, "--prompt", "ab", "--max-new-tokens", "12"
        text = ran(generate, *flags)[1][:-1]
        stop = text[3:5]  # two tokens of the byte tokenizer
        assert ran(generate, *flags, "--stop", stop, "--stop", "never")[1] == text[: text.index(stop)] + "\n"
        out = ran(generate, *flags, "--prompt", "ab", "--stop", stop)[1]
        assert [json.loads(line)["end"] for line in out.splitlines()] == ["stop", "stop"]

    def test_a_stop_string_that_the_end_completes_is_named(self, directory):
        flags = "--model", directory, "--prompt", "d", "--prompt", "b", "--prompt", "h", "--max-new-tokens", "1"
        found = [json.loads(line) for line in ran(generate, *flags)[1].splitlines()]
        expected = [("", "stop") if line["text"] == "\ufffd" else (line["text"], line["end"]) for line in found]
        assert ("", "stop") in expected  # the beginning of a character, which is known for none at the end only
        found = [json.loads(line) for line in ran(generate, *flags, "--stop", "\ufffd")[1].splitlines()]
        assert [(line["text"], line["end"]) for line in found] == expected

    @pytest.mark.parametrize(
        ("flags", "lines"),
        [
            ("--seed 0 --top-k 3 --top-p 0.5", ["--top-k", "--top-p", "--seed"]),
            ("--seed 0 --top-k 3 --top-p 0.5 --temperature 1", []),
            ("--pattern Dense() --dense-layers 0", ["--dense-layers"]),
            ("--pattern Local(1,16) --dense-layers 0 1", ["--pattern"]),
            ("--dense-layers 0", []),
        ],
    )
    def test_a_flag_without_an_effect_is_said(self, directory, flags, lines):
        settings = flags.split()
        code, _, err = ran(generate, "--model", directory, "--prompt", "ab", "--max-new-tokens", "2", *settings)
        said = [line.partition(" has no effect: ")[0] for line in err.splitlines() if " has no effect: " in line]
        assert (code, said) == (0, lines)

    def test_broken_weights_end_it(self, tmp_path):
        code, out, err = ran(generate, "--model", write(tmp_path, nan=True), "--prompt", "ab")
        assert (code, out) == (1, "")
        assert "models.generate: the model's logits for the token at position 3 are NaN" in err.splitlines()[-1]


SMALL = ("--max-new-tokens", "2")
PROMPT = ("--prompt", "a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is no prompt: give --prompt or --prompt-file"),
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "a\udcff"), "--prompt must be UTF-8 text, got '\\udcff' at character 1"),
        ((*PROMPT, "--prompt", "\ud800"), "--prompt must be UTF-8 text, got '\\ud800' at character 0"),
        ((*PROMPT, "--stop", ""), "--stop must be a text of at least one character"),
        ((*PROMPT, "--stop", "\udcff"), "--stop must be UTF-8"),
        ((*PROMPT, "--pattern", "Diagonal(3)"), "expected a pattern"),
        ((*PROMPT, "--temperature", "-1"), "temperature must be at least 0, got -1"),
        ((*PROMPT, "--temperature", "nan"), "temperature must be at least 0, got nan"),
        ((*PROMPT, "--temperature", "warm"), "argument --temperature: invalid float value: 'warm'"),
        ((*PROMPT, "--top-k", "0"), "top_k must be at least 1"),
        ((*PROMPT, "--top-p", "0"), "top_p must be above 0"),
        ((*PROMPT, "--seed", "-1"), "--seed must be from 0 to 4294967295, got -1"),
        ((*PROMPT, "--seed", str(1 << 64)), "--seed must be from 0 to 4294967295"),
        ((*PROMPT, "--chunk", "0"), "--chunk must be at least 1, got 0"),
        ((*PROMPT, "--model", "nowhere"), "nowhere is missing: expected a GGUF file"),
        ((*PROMPT, "--max-new-tokens", "0"), "--max-new-tokens must be from 1 to 2147483647, got 0"),
        ((*PROMPT, "--max-new-tokens", "9" * 4000), "--max-new-tokens must be from 1 to 2147483647, got 9999"),
        ((*PROMPT, "--max-new-tokens", "127"), "do not fit into the model's context of 128"),
        ((*PROMPT, "--max-new-tokens", "9" * 5000), "--max-new-tokens: invalid int value"),
        ((*PROMPT, "--dense-layers", "31"), "dense_layers must be layer indices from 0 to 1"),
        (("--prompt-file", "nowhere.txt"), "nowhere.txt"),
        ((*PROMPT, "--system", "b"), "--system is part of a conversation: give --chat, too"),
        ((*PROMPT, "--temprature", "1"), "unrecognized arguments: --temprature 1; did you mean --temperature?"),
        ((*PROMPT, "--seed=--"), "argument --seed: expected a value, got '--'"),
        (("--prompt=--",), "argument --prompt: expected a value, got '--'"),
        ((*PROMPT, "--seed", "1", "--seed=2"), "argument --seed: expected once, got it twice"),
        ((*PROMPT, "--implementation", "mosaic_tpu", *SMALL), "mosaic_tpu"),
        ((*PROMPT, "--implementation", "mosaic_gpu", *SMALL), "mosaic_gpu"),
    ],
)
def test_what_generate_refuses(directory, arguments, message):
    model = () if "--model" in arguments else ("--model", directory)
    code, out, err = ran(generate, *model, *arguments)
    last = err.splitlines()[-1]
    assert message in last
    assert last.startswith(("models.generate: ", "python -m models.generate: "))
    assert (code, out) == (2, "")
    assert len(last) < 800
    assert set(err.splitlines()[:-1]) <= {f"loading {directory} …", "loading nowhere …", "compiling …"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "nowhere.txt", "--pattern", "Local(4)", "--kv-budget", "0.5"), "nowhere.txt"),
        (("--text", "nowhere.txt", "--pattern", "Locale(4)", "--kv-budget", "0.5"), "expected a pattern"),
        (("--text", __file__, "--pattern", "Local(4)", "--kv-budget", "0.5", "--model", "nowhere"), "nowhere"),
        (("--text", __file__, "--pattern", "Local(4)", "--kv-budget", "nan"), "the budget must be from"),
        (
            ("--text", __file__, "--pattern", "Local(4)", "--kv-budget", "1", "--tokens", "0"),
            "--tokens must be at least",
        ),
        (
            ("--text", __file__, "--pattern", "Local(4)", "--kv-budget", "1", "--tokens", "9999999"),
            "must hold 9,999,999",
        ),
        (("--text", __file__, "--pattern", "Local(4)"), "--kv-budget --flops-budget is required"),
    ],
)
def test_what_convert_refuses(directory, arguments, message):
    model = () if "--model" in arguments else ("--model", directory)
    code, out, err = ran(convert, *model, *arguments)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert set(err.splitlines()[:-1]) <= {f"loading {directory} …", "loading nowhere …"}


def test_convert_keeps_sparse_layers_sparse(directory, tmp_path):
    (tmp_path / "text").write_text("some text to calibrate on " * 5)
    flags = "--model", directory, "--text", tmp_path / "text", "--pattern", "Local(1, 16)", "--tokens", "60"
    code, out, err = ran(convert, *flags, "--kv-budget", "1", "--length", "128")
    assert (code, out) == (0, '--pattern "Local(1, 16)" --dense-layers 1\n')
    assert "layer  1: " in err
    assert "stays dense" in err


class TestChat:
    def test_a_conversation(self, directory, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\nyes\r\n"))
        code, out, err = ran(chat, "--model", directory, "--max-new-tokens", "3")
        assert code == 0
        assert out.count("\n") >= 2
        assert err.splitlines()[0] == f"loading {directory} …"

    def test_no_message_is_no_error(self, directory, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        assert ran(chat, "--model", directory)[:2] == (0, "")

    @pytest.mark.parametrize(
        ("said", "message"),
        [("\ud800\n", "a message must be UTF-8 text"), ("x" * 200 + "\n", "the message is too long: 2")],
    )
    def test_a_message_that_cannot_be_taken(self, directory, monkeypatch, said, message):
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        code, out, err = ran(chat, "--model", directory)
        assert (code, out) == (2, "")
        assert message in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (None, 0, ""),
        (ValueError("two\nlines"), 2, "models.x: two lines\n"),
        (OSError(28, "No space left on device"), 2, "models.x: [Errno 28] No space left on device\n"),
        (MemoryError(), 1, "models.x: out of memory\n"),
        (KeyboardInterrupt(), 130, "models.x: ended by Ctrl-C\n"),
    ],
)
def test_how_a_program_ends(capsys, raised, code, told):
    def body(argv):
        if raised is not None:
            raise raised

    assert run("models.x", body, []) == code
    assert capsys.readouterr().err == told


def as_process(*command, **settings) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | settings.pop("env", {})
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, cwd=ROOT, env=environment, **settings
    )


def test_starts_of_a_program(directory, tmp_path):
    """Programs are compiled once; an output may lack characters, or be closed."""
    # One process for all: starting one takes seconds.
    script = """
import os, pathlib, sys
from models import generate
flags = ["--model", sys.argv[1], "--max-new-tokens", "3", "--prompt", "a"]
kept = lambda: {path.name for path in pathlib.Path(sys.argv[2]).glob("s2jax/xla/jit_step*-cache")}
assert generate.main(flags) == 0
first = kept()
assert len(first) == 2, first  # the prompt's step, and a token's
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)
assert generate.main(flags) == 0
assert kept() == first
"""
    settings = {"JAX_ENABLE_COMPILATION_CACHE": "1", "XDG_CACHE_HOME": str(tmp_path), "PYTHONIOENCODING": "ascii"}
    ran = as_process("-c", script, directory, tmp_path, env=settings)
    assert (ran.returncode, b"Traceback" in ran.stderr) == (0, False), ran.stderr
    assert ran.stdout.endswith(b"\n")


def test_a_missing_extra_is_one_line(tmp_path):
    (tmp_path / "tokenizers.py").write_text("raise ModuleNotFoundError(\"No module named 'x'\", name='tokenizers')\n")
    script = """
import runpy
for program in ("generate", "chat", "convert"):
    try:
        runpy.run_module(f"models.{program}", run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 2
"""
    ran = as_process("-c", script, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert ran.returncode == 0
    assert ran.stderr.decode().splitlines() == [
        f"models.{program}: the package tokenizers is missing; from the checkout, this installs what is needed: "
        "python -m pip install -c constraints.txt -e '.[generate]'"
        for program in ("generate", "chat", "convert")
    ]


@pytest.mark.slow
def test_a_real_model_goes_on(smollm2_path):
    flags = "--model", smollm2_path, "--prompt", "The capital of Italy is", "--max-new-tokens", "4"
    code, out, err = ran(generate, *flags)
    assert (code, out) == (0, " Rome.\n\n\n")  # the last one ends the output
    assert "prompt: 5 tokens in " in err
    assert "100% of a full one" in err


@pytest.mark.slow
def test_a_real_model_talks(smollm2_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of Italy?\nAnd of Spain?\n"))
    code, out, _ = ran(chat, "--model", smollm2_path, "--max-new-tokens", "30")
    assert code == 0
    # As small and as narrow as it is, it names a place of each country, and knows what the second question is about.
    assert [country in line for country, line in zip(("Italy", "Spain"), out.splitlines(), strict=True)] == [True] * 2
