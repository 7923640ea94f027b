"""The first line of a docstring is a noun phrase that names the result, or a verb in the third person."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DENIED = {
    "As", "By", "For", "From", "How", "If", "In", "It", "Not", "Of", "That", "There", "Those", "What", "When", "Where",
    "Whether", "Which", "Who", "Whose", "Why", "With",
}  # fmt: skip


def denied_lines(source: str) -> list[str]:
    """The first lines of docstrings that begin with a denied word."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    lines = [docstring.splitlines()[0] for docstring in docstrings if docstring]
    return [line for line in lines if line.split()[0].strip(",.:;") in DENIED]


def test_denied_words_are_found():
    assert denied_lines('"""Masks."""\ndef f():\n    """Whether it is."""\nclass C:\n    """Of heads."""') == [
        "Whether it is.", "Of heads.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "top", ["pallas_kernels", "s2jax", "models", "training", "train.py", "benchmarks", "experiments", "examples"]
)
def test_docstrings_name_what_they_describe(top):
    paths = [ROOT / top] if top.endswith(".py") else sorted((ROOT / top).rglob("*.py"))
    assert paths
    found = {str(path.relative_to(ROOT)): denied_lines(path.read_text()) for path in paths}
    assert {path: lines for path, lines in found.items() if lines} == {}
