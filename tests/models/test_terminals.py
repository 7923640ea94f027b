"""The programs of models at a terminal or in a pipe: prompts, encodings, Ctrl-C."""

import gc
import io
import json
import pathlib
import signal
import subprocess
import sys

import pytest

import models
from models import chat, generate
from tests.models.programs import ran, write

pytestmark = pytest.mark.usefixtures("kept_compilations")

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write(tmp_path_factory.mktemp("terminals") / "model")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_prompt_goes_to_a_terminal_or_to_stderr(directory, monkeypatch):
    flags = "--model", directory, "--max-new-tokens", "3"
    monkeypatch.setattr(sys, "stdin", Terminal("hi\nyes\n"))
    code, out, err = ran(chat, *flags)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nyes\n"))
    assert (code, out) == ran(chat, *flags)[:2]
    assert err.count("> ") == 3
    monkeypatch.setattr(sys, "stdin", Terminal("hi\nyes\n"))
    shown = ran(chat, *flags, out=Terminal())[1]
    assert shown == "".join(f"> {line}" for line in [*out.splitlines(keepends=True), "\n"])


class Interrupted(io.StringIO):
    """A stream during whose third write Ctrl-C comes while Python is in a callback, whose exceptions it drops."""

    def __init__(self, presses: int, at: int = 3):
        super().__init__()
        self.presses, self.left = presses, at

    def write(self, text):
        self.left -= bool(text)
        if text and self.left == 0:
            gc.callbacks.append(self.press)
            gc.collect()
        return super().write(text)

    def press(self, phase, info):
        gc.callbacks.remove(self.press)
        for _ in range(self.presses):
            signal.raise_signal(signal.SIGINT)


class Encoded(io.TextIOWrapper):
    def getvalue(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize("encoding", ["cp1252", pytest.param("ascii", marks=pytest.mark.slow)])
def test_output_in_encodings_that_lack_characters(directory, monkeypatch, encoding):
    def both(program, *flags):
        found = []
        for settings in {}, {name: Encoded(io.BytesIO(), encoding) for name in ("out", "err")}:
            monkeypatch.setattr(sys, "stdin", io.StringIO("hi € 日本\n"))
            code, out, err = ran(program, "--model", directory, "--max-new-tokens", "12", *flags, **settings)
            assert (code, "Traceback" in err) == (0, False)
            found.append(out)
        return found

    for program, flags in (generate, ("--prompt", "日本 €")), (chat, ()):
        text, written = both(program, *flags)
        assert not text.isascii()
        assert written == text.encode(encoding, "backslashreplace").decode(encoding)
    text, written = both(generate, "--prompt", "日本 €", "--prompt", "é")
    assert [*map(json.loads, written.splitlines())] == [*map(json.loads, text.splitlines())]


class TestCtrlC:
    """No press is lost, none shows a traceback."""

    @pytest.mark.parametrize("presses", [pytest.param(1, marks=pytest.mark.slow), 2])
    def test_generate_ends(self, directory, presses):
        flags = "--model", directory, "--prompt", "ab", "--max-new-tokens", "100"
        whole = ran(generate, *flags)[1]
        code, out, err = ran(generate, *flags, out=Interrupted(presses))
        assert (code, err.splitlines()[2:]) == (130, ["models.generate: ended by Ctrl-C"])
        assert whole.startswith(out[:-1])
        assert 0 < len(out) < len(whole) / 2

    @pytest.mark.parametrize("program", [generate, chat])
    def test_while_a_model_is_loaded(self, directory, program):
        prompt = ("--prompt", "a") if program is generate else ()
        code, out, err = ran(program, "--model", directory, *prompt, err=Interrupted(1, at=1))
        name = f"models.{program.__name__.rpartition('.')[2]}"
        assert (code, out) == (130, "")
        assert err.splitlines() == [f"loading {directory} …", f"{name}: ended by Ctrl-C"]

    def test_an_answer_ends_and_the_conversation_goes_on(self, directory, monkeypatch):
        flags = "--model", directory, "--max-new-tokens", "40"
        monkeypatch.setattr(sys, "stdin", Terminal("hi\nyes\n"))
        whole = ran(chat, *flags)[1].splitlines()
        monkeypatch.setattr(sys, "stdin", Terminal("hi\nyes\n"))
        code, out, err = ran(chat, *flags, out=Interrupted(1))
        first, second = out.splitlines()
        assert (code, "Traceback" in err) == (0, False)
        assert whole[0].startswith(first)
        assert 0 < len(first) < len(whole[0]) / 2
        assert second

    def test_lines_that_are_not_typed_end_with_it(self, directory, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nyes\n"))
        code, _, err = ran(chat, "--model", directory, out=Interrupted(1))
        assert (code, err.splitlines()[-1]) == (130, "models.chat: ended by Ctrl-C")
        assert "Traceback" not in err


@pytest.mark.parametrize("program", ["generate", "chat", "convert", "checkpoints.smollm2"])
def test_ctrl_c_during_the_imports(program):
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", f"models.{program}", "--help"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.rstrip().endswith(" numpy"):
                process.send_signal(signal.SIGINT)
                break
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == f"models.{program}: ended by Ctrl-C"
    assert "Traceback" not in said


def test_names_of_the_package_are_imported_when_they_are_used():
    code = "import sys, models; print('jax' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
    assert {*models.__all__} <= {*dir(models)}
    assert all(hasattr(models, name) for name in models.__all__)
    assert not hasattr(models, "nothing")
