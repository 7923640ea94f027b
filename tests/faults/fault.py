"""A planted fault: an invariant of the library, the change that breaks it, and the test that fails on it."""

import ast
import builtins
import dataclasses
import importlib.machinery
import importlib.util
import pathlib
import typing

from tests.faults.operators import Operator

ROOT = pathlib.Path(__file__).parents[2]

type Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


@dataclasses.dataclass(frozen=True)
class Fault:
    """A change of one definition, on which a test fails.

    Attributes:
      invariant: what holds without the fault; also its name.
      where: "package:qualified name" of a function, class or constant, in whichever file of the package it stands.
      how: the change.
      test: node id of the test that fails, below `tests/`.
      unseen: why no test on a machine without a GPU fails; None if the test does.
    """

    invariant: str
    where: str
    how: Operator
    test: str
    unseen: str | None = None

    def plant(self, root: pathlib.Path = ROOT) -> tuple[pathlib.Path, str]:
        """The file of the definition, and its source with the fault.

        Raises:
          ValueError: there is not exactly one such definition, or the operator does not hit what it says.
        """
        package, _, name = self.where.partition(":")
        folder = root.joinpath(*package.split("."))
        paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
        trees = {path: ast.parse(path.read_text()) for path in paths}
        found = [(path, each) for path, tree in trees.items() for each in definitions(tree, name.split("."))]
        if len(found) != 1:
            raise ValueError(f"{self.invariant}: {len(found)} definitions of {name} in {package}")
        path, definition = found[0]
        known = names(trees[path])
        try:
            self.how.plant(definition)
        except ValueError as error:
            raise ValueError(f"{self.invariant}: {self.where} {error}") from None
        if unknown := names(trees[path]) - known - vars(builtins).keys() - {"result"}:
            raise ValueError(f"{self.invariant}: {self.where} {self.how.text}: the module has no {sorted(unknown)}")
        return path, ast.unparse(ast.fix_missing_locations(trees[path]))


def names(tree: ast.AST) -> set[str]:
    """Names and arguments that stand in a tree."""
    found = (getattr(node, "id", None) or getattr(node, "arg", None) for node in ast.walk(tree))
    return {each for each in found if isinstance(each, str)}


def definitions(tree: ast.AST, names: list[str]) -> list[Definition]:
    """The functions, classes and assignments of a qualified name, such as ["Class", "method"]."""
    here = [node for node in _statements(tree) if names[0] in _defined(node)]
    return here if len(names) == 1 else [each for node in here for each in definitions(node, names[1:])]


def _statements(tree: ast.AST) -> typing.Iterator[typing.Any]:
    """The statements of a body, with those of branches and loops, without those of definitions inside it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.stmt):
            yield node
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield from _statements(node)


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return []
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [each.id for each in targets if isinstance(each, ast.Name)]


class Import:
    """Makes Python import a file with other source, once the context is entered.

    It stands below whatever import hooks there are: they read the source through it.

    Attributes:
      happened: True once the file was imported.
    """

    def __init__(self, path: pathlib.Path, source: str):
        self.path, self.source, self.happened = str(path), source, False

    def __enter__(self) -> "Import":
        loader = importlib.machinery.SourceFileLoader
        self.kept = loader.get_data, loader.set_data

        def get_data(this, path):
            if path == self.path:
                self.happened = True
                return self.source.encode()
            if this.path == self.path:
                raise OSError(f"{path} is compiled from the source without the fault")
            return self.kept[0](this, path)

        def set_data(this, path, data, **options):
            if this.path != self.path:
                self.kept[1](this, path, data, **options)

        loader.get_data, loader.set_data = get_data, set_data
        return self

    def __exit__(self, *_) -> None:
        loader = importlib.machinery.SourceFileLoader
        loader.get_data, loader.set_data = self.kept
