"""The README: its length, its table of figures, and the sentence on what was not measured."""

import pathlib
import re

from benchmarks import headlines

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_figures_are_those_of_the_files():
    """`python -m benchmarks.report` writes them."""
    assert headlines.written(README) == README
    assert headlines.table() in README
    assert len(headlines.table().splitlines()) <= 2 + 10


def test_the_readme_is_short_and_honest():
    assert len(README.splitlines()) <= 150
    assert "**Nothing was timed on a GPU or TPU yet.**" in README[: README.index("## ")]


def test_links_lead_to_files():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]
    for page in pages:
        targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", page.read_text())
        assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == [], page
