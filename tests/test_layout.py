"""The layout of the tree: which way imports point, how long files get, what the wheel ships."""

import ast
import contextlib
import graphlib
import importlib.metadata
import io
import pathlib
import tokenize
import tomllib
from collections.abc import Collection

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


NOT_ON_IMPORT = ("typing.TYPE_CHECKING", "TYPE_CHECKING", "__name__ == '__main__'")


def imported_on_import(source: str, modules: Collection[str]) -> set[str]:
    """The modules that a module imports when it is imported itself: not those in functions or under TYPE_CHECKING.

    `from package import name` counts as `package.name` if that is a module, else as the package.
    """
    names, statements = set(), list(ast.parse(source).body)
    while statements:
        node = statements.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= submodules if submodules <= set(modules) else {*submodules, str(node.module)}
        elif isinstance(node, ast.If) and ast.unparse(node.test) in NOT_ON_IMPORT:
            statements += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            statements += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return names & set(modules)


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """The modules that each module imports; an `__init__` that thereby runs does not count."""
    return {module: imported_on_import(source, sources) for module, source in sources.items()}


@pytest.mark.parametrize(
    ("sources", "circle"),
    [
        ({"p": "from p.a import f", "p.a": "from p import b", "p.b": "from p.a import f"}, True),
        ({"p": "from p.a import f", "p.a": "from p import g"}, True),
        ({"p": "from p.a import f", "p.a": "def g():\n    import p.b", "p.b": "import p.a"}, False),
        ({"a": "if typing.TYPE_CHECKING:\n    import b\nelse:\n    pass", "b": "import a"}, False),
        ({"a": "try:\n    import b\nexcept ImportError:\n    pass", "b": "import a"}, True),
    ],
)
def test_import_graph_has_circles(sources, circle):
    with pytest.raises(graphlib.CycleError) if circle else contextlib.nullcontext():
        graphlib.TopologicalSorter(import_graph(sources)).prepare()


def test_no_module_imports_itself_in_a_circle():
    names = {path: path.relative_to(ROOT).with_suffix("").parts for path in SOURCES}
    modules = {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}
    graph = import_graph({name: path.read_text() for name, path in modules.items()})
    assert graph["s2jax.patterns.statistics"] >= {"s2jax.patterns.bands", "s2jax.patterns.rule"}
    graphlib.TopologicalSorter(graph).prepare()  # its CycleError names the modules


def test_files_stay_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    limits = {path: 700 if path.startswith("pallas_kernels/mosaic_") else 400 for path in lengths}
    assert {path: length for path, length in lengths.items() if length > limits[path]} == {}


NO_CODE = {tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
BUDGETS = {("benchmarks", "experiments"): 2400}
"""Lines of code that packages may have together."""


def code_lines(source: str) -> int:
    """The number of lines that hold code: without blanks, comments and docstrings."""
    lines, statement = set(), []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            if [each.type for each in statement] != [tokenize.STRING]:
                lines.update(line for each in statement for line in range(each.start[0], each.end[0] + 1))
            statement = []
        elif token.type not in NO_CODE:
            statement.append(token)
    return len(lines)


def test_code_lines_are_neither_blanks_nor_comments_nor_docstrings():
    source = """'''A docstring
    of two lines.'''
import a  # a comment

NAMES = (
    # a comment

    1, f"{a} text"
)
'''An attribute's docstring.'''
text = '''no docstring
of two lines'''
"""
    assert code_lines(source) == 6


@pytest.mark.parametrize("packages", BUDGETS, ids=" and ".join)
def test_packages_stay_within_their_budgets(packages):
    counts = {each: sum(code_lines(path.read_text()) for path in (ROOT / each).rglob("*.py")) for each in packages}
    assert sum(counts.values()) <= BUDGETS[packages], counts


def test_the_version_is_the_same_everywhere():
    assert importlib.metadata.version("s2jax") == s2jax.__version__
    assert f"\nversion: {s2jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_wheel_ships_the_two_packages_alone():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["pallas_kernels", "s2jax"]}
    assert all((ROOT / package / "py.typed").exists() for package in wheel["packages"])


PRIVATE = {
    "pallas_kernels/head_place.py": "core.get_axis_env",  # axes of enclosing maps, by name
    "pallas_kernels/modes.py": "config.pallas_tpu_interpret_mode_context_manager",  # the interpreter of either kind
    "pallas_kernels/mosaic_gpu/sm90/backend.py": "cuda_versions.cuda_runtime_get_version",
}
"""Private parts of JAX in use, for which it has nothing public; the tests of these files run on every supported JAX."""


def test_private_parts_of_jax_are_known():
    users = {str(path.relative_to(ROOT)): path.read_text() for path in SOURCES}
    users = {path: source for path, source in users.items() if path.split("/")[0] in LAYERS and "jax._src" in source}
    assert users.keys() == PRIVATE.keys()
    assert all(name in users[path] for path, name in PRIVATE.items())
