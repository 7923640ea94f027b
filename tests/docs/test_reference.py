"""The docs site: the reference names every public name, the navigation every page, and paths that exist."""

import importlib
import pathlib
import re
import runpy

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
MODULES = ("s2jax", "s2jax.nnx", "s2jax.linen", "s2jax.patterns", "s2jax.cache", "pallas_kernels")
MORE = ("s2jax.plotting.plot", "s2jax.plotting.plot_text")
"""Public names of modules that have no `__all__`."""

REFERENCE = {page: page.read_text() for page in sorted((DOCS / "api").glob("*.md"))}
DIRECTIVES = [name for text in REFERENCE.values() for name in re.findall(r"^::: (\S+)$", text, re.M)]


def public() -> dict[str, object]:
    """Every public object by its dotted name."""
    found = {name: resolved(name) for name in MORE}
    for name in MODULES:
        module = importlib.import_module(name)
        found |= {f"{name}.{each}": getattr(module, each) for each in module.__all__}
    return found


def resolved(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_the_reference_documents_every_public_object_once():
    documented = {name: resolved(name) for name in DIRECTIVES}
    assert len(documented) == len(DIRECTIVES), "a directive stands twice"
    objects = list(documented.values())
    for name, each in public().items():
        assert sum(other is each for other in objects) == 1, f"{name} is documented {objects.count(each)} times"
    assert documented.keys() <= public().keys()


@pytest.mark.parametrize("module", ["s2jax", "s2jax.nnx", "s2jax.linen", "pallas_kernels"])
def test_the_reference_names_every_export(module):
    """Where one object is exported twice, the page of its directive names the other path."""
    text = "\n".join(REFERENCE.values())
    names = [f"{module}.{each}" for each in importlib.import_module(module).__all__]
    missing = [name for name in names if not re.search(rf"(^::: |`){re.escape(name)}($|`)", text, re.M)]
    assert missing == []


def leaves(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for each in (nav.values() if isinstance(nav, dict) else nav) for page in leaves(each)]


def test_the_navigation_lists_every_page():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = leaves(settings["nav"])
    made = runpy.run_path(str(ROOT / ".ci" / "docs_hooks.py"))["PAGES"]
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} | set(made.values())
    assert len(listed) == len(set(listed))
    assert set(listed) == pages
    assert all((ROOT / source).exists() for source in made)


PATH = re.compile(r"`((?:pallas_kernels|s2jax|models|training|tests|benchmarks|experiments|examples|docs)/[\w/.-]+)`")


@pytest.mark.parametrize("page", ["docs/design.md", "CONTRIBUTING.md", "tests/README.md", "README.md"])
def test_paths_that_a_page_names_exist(page):
    paths = PATH.findall((ROOT / page).read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []
