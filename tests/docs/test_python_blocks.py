"""The Python of the README, CONTRIBUTING and the docs, run as it stands.

The blocks of a page share their names, from top to bottom. A comment after a `print` is what it prints.
"""

import ast
import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest

from models.byte_tokenizer import byte_tokenizer
from models.checkpoints.pretrained import Pretrained, save
from tests.models.tiny_checkpoints import LLAMA, transformer, write_gguf

ROOT = pathlib.Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
PAGES = [
    page
    for page in ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]
    if BLOCK.search((ROOT / page).read_text())
]


def expected(block: str) -> list[str]:
    """The comments after prints."""
    lines = block.splitlines()
    calls = [
        node
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    ends = sorted(node.end_lineno or 0 for node in calls)
    assert all("  # " in lines[end - 1] for end in ends), "a print without the comment that says what it prints"
    return [lines[end - 1].rpartition("  # ")[2] for end in ends]


def a_tiny_gguf_file() -> dict:
    write_gguf("SmolLM2-135M-Instruct.Q4_1.gguf", transformer(dataclasses.replace(LLAMA, num_layers=2)))
    return {}


def the_model_of_a_run() -> dict:
    model = transformer(dataclasses.replace(LLAMA, vocab_size=272))
    save("runs/x/model", Pretrained(model=model, max_context=64, tokenizer=byte_tokenizer()))
    return {}


def arrays() -> dict:
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 100, 4, 16))
    return {"query": query, "key": key, "value": value, "mask": np.tril(np.ones((1, 100, 100), bool))}


GIVEN = {
    "docs/models.md": a_tiny_gguf_file,
    "docs/training.md": the_model_of_a_run,
    "docs/patterns.md": arrays,
}
"""What a page takes for granted: files, and names."""


@pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")
@pytest.mark.parametrize("page", PAGES)
def test_the_python_of(page, tmp_path, monkeypatch, capsys):
    text = (ROOT / page).read_text()
    monkeypatch.chdir(tmp_path)
    names: dict = GIVEN.get(page, dict)()
    for block in BLOCK.findall(text):
        wanted = expected(block)
        exec(compile(block, page, "exec"), names)
        assert capsys.readouterr().out.splitlines() == wanted


def test_blocks_are_found():
    assert {"README.md", "docs/index.md", "docs/getting_started.md", "docs/op.md", "docs/serving.md"} <= {*PAGES}


def test_expected_reads_the_comments():
    assert expected("print(1)  # 1\nfor i in x:\n    print(\n        i)  # a # 2\n") == ["1", "a # 2"]
    with pytest.raises(AssertionError, match="a print without"):
        expected("print(1)")
