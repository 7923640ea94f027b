"""A hashable key of a function: its code, and the values that it captures.

A lambda in a loop is another object in every iteration. Its key is the same as long as the captured values are.
"""

import functools
import hashlib
import inspect
import types
import typing
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

MOST_VALUES = 10_000
"""Values visited in one function; containers beyond compare by identity."""


class _Identity:
    """A hashable stand-in for an object that is equal to itself alone."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self):
        return id(self.value)


def function_key(function: Callable) -> Hashable:
    """A value that is equal for functions of equal code, defaults, and captured values.

    Captured values are closure cells and the module's globals that the code names, functions among them in turn. Arrays
    compare by content, lists and dicts by their items, hashable objects by their own equality. Other objects and
    classes compare by identity and by the attributes and methods that the code names; modules by identity and by the
    data that it names.

    Raises:
      ValueError: it captures an array that JAX is tracing.
    """
    return _Key().of(function)


class _Key:
    def __init__(self):
        self._seen: dict[Hashable, int] = {}  # functions and containers by identity, so that cycles end
        self._kept: list[object] = []  # as long as their identities are in use
        self._count = 0
        self._names = CALLED  # attributes that the visited code mentions

    def of(self, value: Any) -> Hashable:
        self._count += 1
        if _is_plain(value):
            return type(value), repr(value) if isinstance(value, float) else value
        if not isinstance(value, type) and (array := _as_array(value)) is not None:
            return self._array(array)
        if isinstance(value, types.BuiltinFunctionType) or self._count > MOST_VALUES:
            return _Identity(value)
        if isinstance(value, _WRAPPERS):
            return type(value), self.of(typing.cast(Any, value).__wrapped__)
        if not isinstance(value, (*_COMPOUND, types.ModuleType, type)) and _has_equality(value):
            return type(value), value
        known = id(value), self._names
        if known in self._seen:
            return "seen", self._seen[known]
        self._seen[known] = len(self._seen)
        self._kept.append(value)
        return self._items(value) if isinstance(value, _COMPOUND) else self._object(value)

    def _items(self, value: Any) -> Hashable:
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            names, self._names = self._names, self._names | _names(value.__func__)
            found = "method", self.of(value.__func__), self.of(value.__self__)
            self._names = names
            return found
        if isinstance(value, functools.partial):
            return "partial", self.of(value.func), self.of(value.args), self.of(value.keywords)
        if isinstance(value, dict):
            return type(value), tuple((self.of(key), self.of(item)) for key, item in value.items())
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(self.of(item) for item in value)
        return type(value), tuple(self.of(item) for item in value)

    def _object(self, value: Any) -> Hashable:
        """The key of an object, class or module: its identity, and the attributes that the code mentions."""
        names = self._names
        self._names = _with_methods(value, names)
        found = tuple((name, self.of(each)) for name, each in _mentioned(value, self._names))
        self._names = names
        return _Identity(value), found

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
        names, self._names = self._names, self._names | _names(function)
        cells = function.__closure__ or ()
        found = (
            function.__code__,
            tuple(self._cell(cell) for cell in cells),
            self.of(function.__defaults__),
            self.of(function.__kwdefaults__),
            tuple(
                (name, self.of(function.__globals__[name]))
                for name in sorted(_names(function) & function.__globals__.keys())
            ),
        )
        self._names = names
        return found

    def _cell(self, cell: types.CellType) -> Hashable:
        try:
            value = cell.cell_contents
        except ValueError:  # a name that is not bound yet
            return "empty"
        return self.of(value)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic))


def _mentioned(value: object, names: frozenset[str]) -> list[tuple[str, Any]]:
    """Attributes of these names, methods and properties as functions; of a module, its data only."""
    found = []
    for name in sorted(names):
        each = inspect.getattr_static(value, name, None)
        if isinstance(each, types.MemberDescriptorType):  # of __slots__
            each = getattr(value, name, None)
        each = each.fget if isinstance(each, property) else getattr(each, "__func__", each)
        if each is not None and (_is_data(each) or not isinstance(value, types.ModuleType)):
            found.append((name, each))
    return found


def _with_methods(value: object, names: frozenset[str]) -> frozenset[str]:
    """The names, and those that an object's methods of these names mention in turn."""
    more = names.union(*(_names(each) for _, each in _mentioned(value, names)))
    return names if more == names else _with_methods(value, more)


def _is_data(value: object) -> bool:
    return _is_plain(value) or isinstance(value, (np.ndarray, jax.Array, dict, set, frozenset, list, tuple))


def _as_array(value: Any) -> np.ndarray | jax.Array | None:
    """The array of a value that is one or holds one, as Flax's variables and other libraries' tensors do."""
    if isinstance(value, (np.ndarray, jax.Array)):
        return value
    if hasattr(value, "__jax_array__"):
        return value.__jax_array__()
    return np.asarray(value) if hasattr(value, "__array__") else None


def _has_equality(value: object) -> bool:
    if type(value).__hash__ is object.__hash__:
        return False
    try:
        hash(value)
    except TypeError:
        return False
    return True


CALLED = frozenset({"__call__", "__getitem__"})
"""Methods that code calls without naming them."""

_COMPOUND = (
    types.FunctionType, types.MethodType, functools.partial, dict, set, frozenset, list, tuple,
)  # fmt: skip

_WRAPPERS = type(jax.jit(lambda: None)), type(functools.lru_cache(lambda: None))
"""Wrappers that compute what they wrap, and nothing else."""


def _names(function: Any) -> frozenset[str]:
    """Names of globals and attributes that a function's code, or a function within it, mentions."""
    code = getattr(function, "__code__", None)
    return frozenset() if code is None else _names_in(code)


@functools.lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> frozenset[str]:
    inner = (_names_in(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset(code.co_names).union(*inner)
