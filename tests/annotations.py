"""Run-time check of jaxtyping annotations: an import hook that decorates the functions of the packages.

A function is checked after it returned, so that bad input meets the library's own errors first. Arrays are checked for
dtype and shape, whichever class they have; other values are left to pyright.
"""

import ast
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable

import jaxtyping

PACKAGES = ("pallas_kernels", "s2jax", "models", "training")


class AnnotationError(AssertionError):
    """An array whose dtype or shape is not the annotated one."""


def install() -> None:
    """Checks the packages that are imported from now on."""
    loaded = [name for name in sys.modules if name.split(".")[0] in PACKAGES]
    assert not loaded, f"imported before the annotations are checked: {loaded}"
    sys.meta_path.insert(0, Finder())


class Finder(importlib.abc.MetaPathFinder):
    """Finds the packages' modules as Python does, and loads them with the decorator."""

    def find_spec(self, fullname, path, target=None):
        if fullname.split(".")[0] not in PACKAGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


class Loader(importlib.machinery.SourceFileLoader):
    """Compiles a module with `checked` around each function that annotates the shape of an array."""

    def get_code(self, fullname):
        path = self.get_filename(fullname)
        # By `get_data`, through which a fault is planted.
        source = importlib.util.decode_source(self.get_data(path))
        return compile(decorated(source), path, "exec", dont_inherit=True)


def decorated(source: str) -> ast.Module:
    """The syntax tree of a module whose annotated functions are checked."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(map(_has_shape, _annotations(node))):
            node.decorator_list.append(ast.parse(f"__import__({__name__!r}, fromlist=['_']).checked", mode="eval").body)
    return ast.fix_missing_locations(tree)


def _annotations(node: ast.FunctionDef) -> list[ast.expr | None]:
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    return [*(each.annotation for each in arguments), node.returns]


def _has_shape(annotation: ast.expr | None) -> bool:
    """True for an annotation like Float[Array, "b t"]."""
    nodes = [] if annotation is None else ast.walk(annotation)
    return any(
        isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Tuple)
        and isinstance(node.slice.elts[-1], ast.Constant)
        and isinstance(node.slice.elts[-1].value, str)
        for node in nodes
    )


def checked[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """The function, which raises AnnotationError if it took or returned an array unlike its annotation."""
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, typing.Any]:
        return typing.get_type_hints(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        result = function(*args, **kwargs)
        with jaxtyping.jaxtyped("context"):
            given = signature.bind(*args, **kwargs).arguments
            for name, value in [*given.items(), ("return", result)]:
                if name in hints():
                    _check(f"{function.__qualname__}: {name}", value, hints()[name])
        return result

    # Frames are told apart by their files: those that warnings skip include this one.
    wrapper.__code__ = wrapper.__code__.replace(co_filename=function.__code__.co_filename)
    return wrapper


def _check(name: str, value, hint) -> None:
    """Raises AnnotationError unless arrays in the value are as the hint says."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if _is_annotation(hint):
        if _is_array(value) and not isinstance(value, _any_class(hint)):
            raise AnnotationError(f"{name} must be {hint.__name__}, got {value.dtype}{list(value.shape)}")
    elif origin in (typing.Union, types.UnionType):
        _check_any(name, value, parts)
    elif origin is tuple and isinstance(value, tuple) and Ellipsis not in parts and len(parts) == len(value):
        for index, (each, part) in enumerate(zip(value, parts, strict=True)):
            _check(f"{name}[{index}]", each, part)


def _check_any(name: str, value, hints) -> None:
    """Raises AnnotationError if every hint of a union that may stand for the value refuses it."""
    if _is_array(value):
        hints = [hint for hint in hints if _is_annotation(hint) or (isinstance(hint, type) and isinstance(value, hint))]
    errors = []
    for hint in hints:
        try:
            return _check(name, value, hint)
        except AnnotationError as error:
            errors.append(str(error))
    if errors:
        raise AnnotationError("; ".join(errors))


def _is_array(value) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_annotation(hint) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


@functools.cache
def _any_class(hint) -> typing.Any:
    """The annotation for arrays of every class."""
    return hint.dtype[typing.Any, hint.dim_str]
