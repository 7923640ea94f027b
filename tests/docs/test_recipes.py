"""The recipes of CONTRIBUTING, followed in a copy of the checkout: files written, changes made, commands run."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[2]
COPIED = ("pallas_kernels", "s2jax", "models", "training", "tests", "docs", "examples", "benchmarks", ".ci")
FILES = ("pyproject.toml", "mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.M | re.S)


def recipe(title: str) -> list[tuple[str, str]]:
    """The blocks of a recipe: language and text."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    [section] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return [(language, textwrap.dedent(body)) for language, body in BLOCK.findall(section)]


def write_file(checkout: pathlib.Path, text: str) -> None:
    """Writes a Python block to the path in its first line."""
    name, _, body = text.partition("\n")
    path = checkout / name.removeprefix("# ")
    assert not path.exists()
    path.write_text(body)


def change_files(checkout: pathlib.Path, text: str) -> None:
    """Replaces the `-` lines of a file, which stand in it once, by the `+` lines after them."""
    for part in re.split(r"^--- ", text, flags=re.M)[1:]:
        name, _, body = part.partition("\n")
        path = checkout / name
        for before, after in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", body, re.M):
            old, new = (re.sub(r"^.", "", lines, flags=re.M) for lines in (before, after))
            content = path.read_text()
            assert f"\n{content}".count(f"\n{old}") == 1, f"{name} must have once: {old}"
            path.write_text(f"\n{content}".replace(f"\n{old}", f"\n{new}")[1:])


@pytest.mark.parametrize("title", ["A backend", "A pattern", "A model family"])
def test_the_recipe(title, tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    ran = 0
    for language, text in recipe(title):
        match language:
            case "python":
                write_file(tmp_path, text)
            case "diff":
                change_files(tmp_path, text)
            case "sh":
                for command in text.splitlines():
                    run(tmp_path, command)
                    ran += 1
    assert ran


def run(checkout: pathlib.Path, command: str) -> None:
    """Runs a command of the recipe with this interpreter; tests must have passed."""
    program, *arguments = shlex.split(command)
    assert program == ".venv/bin/python"
    done = subprocess.run(
        [sys.executable, *arguments, "-q", "-p", "no:cacheprovider"],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
