"""The Python of the README and of docs/training.md, run as it stands."""

import dataclasses
import pathlib
import re

from models.byte_tokenizer import byte_tokenizer
from models.checkpoints.pretrained import Pretrained, save
from tests.models.tiny_checkpoints import LLAMA, transformer

ROOT = pathlib.Path(__file__).parents[1]


def blocks(name: str, first: str, last: str) -> list[str]:
    """The Python between two headings."""
    text = (ROOT / name).read_text()
    return re.findall(r"```python\n(.*?)```", text[text.index(f"## {first}\n") : text.index(f"## {last}\n")], re.S)


def test_the_readme(capsys):
    found, told = blocks("README.md", "The layer", "What runs where"), []
    assert len(found) == 3
    names: dict = {}
    for block in found:
        exec(block, names)
        told += re.findall(r"print\(.*  # (.*)", block)
    # Each comment beside a print is what it prints.
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == told[0] == "(1, 8192, 512)"
    assert ", ".join(line.split()[1] for line in printed[1:4]) == told[1]
    assert printed[4] == told[2]
    assert len(printed) == 5


def test_a_runs_model(tmp_path, monkeypatch):
    model = transformer(dataclasses.replace(LLAMA, vocab_size=272))
    save(tmp_path / "runs" / "x" / "model", Pretrained(model=model, max_context=64, tokenizer=byte_tokenizer()))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    [block] = blocks("docs/training.md", "The model of a run", "Fine-tuning")
    exec(block, names)
    assert names["logits"].shape == (1, 5, 272)
