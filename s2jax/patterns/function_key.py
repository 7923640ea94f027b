"""What a function computes by, as a hashable value: its code, and the values that it captures.

A lambda that is written in a loop is another object in every round; by its key it is the same function, as long as
what it captures is the same.
"""

import functools
import hashlib
import types
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

MOST_VALUES = 10_000
"""Values looked at in one function; containers beyond go by identity."""


class _Identity:
    """An unhashable object, which is equal to itself alone."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self):
        return id(self.value)


def function_key(function: Callable) -> Hashable:
    """A value that is equal for functions of equal code, defaults, and captured values.

    Captured are closure cells and the module's globals that the code names, functions among them in turn. Arrays go
    by content, lists and dicts by their items, other objects by their own equality, or else by identity and the numbers
    and strings among their attributes.

    Raises:
      ValueError: it captures an array that JAX is tracing.
    """
    return _Key().of(function)


class _Key:
    def __init__(self):
        self._seen: dict[int, int] = {}  # functions and containers by identity, so that cycles end
        self._kept: list[object] = []  # as long as their identities are in use
        self._count = 0

    def of(self, value: Any) -> Hashable:
        self._count += 1
        if _is_plain(value):
            return type(value), repr(value) if isinstance(value, float) else value
        if isinstance(value, (np.ndarray, jax.Array)):
            return self._array(value)
        if isinstance(value, (types.ModuleType, type, types.BuiltinFunctionType)) or self._count > MOST_VALUES:
            return _Identity(value)
        if not isinstance(value, _COMPOUND):
            return self._object(value)
        if id(value) in self._seen:
            return "seen", self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return "method", self.of(value.__func__), self.of(value.__self__)
        if isinstance(value, functools.partial):
            return "partial", self.of(value.func), self.of(value.args), self.of(value.keywords)
        if isinstance(value, dict):
            return type(value), tuple((self.of(key), self.of(item)) for key, item in value.items())
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(self.of(item) for item in value)
        return type(value), tuple(self.of(item) for item in value)

    def _object(self, value: Any) -> Hashable:
        inner = getattr(value, "__wrapped__", None)
        if isinstance(inner, types.FunctionType):  # jax.jit and other wrappers keep what they wrap
            return type(value), self.of(inner)
        if type(value).__hash__ is object.__hash__:
            attributes = getattr(value, "__dict__", {}).items()
            return _Identity(value), tuple((name, self.of(each)) for name, each in attributes if _is_plain(each))
        try:
            hash(value)
        except TypeError:
            return _Identity(value)
        return type(value), value

    def _array(self, value: np.ndarray | jax.Array) -> Hashable:
        if isinstance(value, Tracer):
            raise ValueError(
                f"the function captures an array of shape {list(value.shape)} that JAX is tracing, and a pattern is "
                "compiled before it is run: capture a concrete array; for documents known at run time only there are "
                "query_segment_ids and kv_segment_ids, for blocks chosen at run time s2jax.BlockSelection"
            )
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            return _Identity(value)
        found = np.asarray(value)
        if found.dtype.hasobject:
            return _Identity(value)
        digest = hashlib.blake2b(np.ascontiguousarray(found), digest_size=16).digest()
        return type(value), found.dtype.str, found.shape, digest

    def _function(self, function: types.FunctionType) -> Hashable:
        cells = function.__closure__ or ()
        return (
            function.__code__,
            tuple(self._cell(cell) for cell in cells),
            self.of(function.__defaults__),
            self.of(function.__kwdefaults__),
            tuple((name, self.of(function.__globals__[name])) for name in _global_names(function)),
        )

    def _cell(self, cell: types.CellType) -> Hashable:
        try:
            value = cell.cell_contents
        except ValueError:  # a name that is not bound yet
            return "empty"
        return self.of(value)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic))


_COMPOUND = (
    types.FunctionType, types.MethodType, functools.partial, dict, set, frozenset, list, tuple,
)  # fmt: skip


def _global_names(function: types.FunctionType) -> list[str]:
    """Names of globals that the code, or a function within it, mentions; attributes of the same name count too."""
    names, codes = set(), [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return sorted(names & function.__globals__.keys())
