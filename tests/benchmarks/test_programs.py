"""Every program of benchmarks and experiments can be imported, and the page of results is what report.py writes."""

import importlib
import pathlib

import pytest

from benchmarks import report

ROOT = pathlib.Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for top in ("benchmarks", "experiments")
    for path in (ROOT / top).rglob("*.py")
)


@pytest.mark.parametrize("name", MODULES)
def test_it_imports(name):
    importlib.import_module(name)


def test_the_page_of_results_is_up_to_date(tmp_path, monkeypatch):
    page = tmp_path / "results.md"
    page.write_text(report.PAGE.read_text())
    committed = page.read_text()
    monkeypatch.setattr(report, "PAGE", page)
    report.main()
    assert page.read_text() == committed
