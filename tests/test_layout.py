"""The layout of the tree: which way imports point, how long files get, what the wheel ships."""

import ast
import importlib.metadata
import pathlib
import tomllib

import pytest

import s2jax

ROOT = pathlib.Path(__file__).parents[1]
LAYERS = ["pallas_kernels", "s2jax", "models", "training", "train"]  # each imports only from those before it
SOURCES = sorted(
    path
    for top in [*LAYERS, "tests", "benchmarks", "experiments", "examples"]
    for path in [ROOT / f"{top}.py", *(ROOT / top).rglob("*.py")]
    if path.exists()
)


def imported(source: str) -> set[str]:
    """The top-level packages that a module imports, in functions and under TYPE_CHECKING too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


def forbidden(layer: str) -> set[str]:
    above = set(LAYERS[LAYERS.index(layer) + 1 :]) | {"tests", "benchmarks", "experiments", "examples"}
    return above | {"flax"} if layer == "pallas_kernels" else above


def test_imported_sees_every_form():
    assert imported("import a.b\ndef f():\n    from c.d import e\nfrom . import g") == {"a", "c"}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer):
    paths = [path for path in SOURCES if path.relative_to(ROOT).with_suffix("").parts[0] == layer]
    assert paths, f"{layer} has no modules"
    wrong = {str(path.relative_to(ROOT)): imported(path.read_text()) & forbidden(layer) for path in paths}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_files_stay_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    limits = {path: 700 if path.startswith("pallas_kernels/mosaic_") else 400 for path in lengths}
    assert {path: length for path, length in lengths.items() if length > limits[path]} == {}


def test_the_version_is_the_same_everywhere():
    assert importlib.metadata.version("s2jax") == s2jax.__version__
    assert f"\nversion: {s2jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_wheel_ships_the_two_packages_alone():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["pallas_kernels", "s2jax"]}
    assert all((ROOT / package / "py.typed").exists() for package in wheel["packages"])
