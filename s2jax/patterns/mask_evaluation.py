"""Evaluation of a mask function in tiles: compiled if JAX can trace it, else by numpy."""

import functools
import typing
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun
from jaxtyping import Bool

from s2jax.messages import shown
from s2jax.patterns.evaluation import on_cpu, tile_positions

TILE_PAIRS = 1 << 21
"""Pairs of tokens evaluated at once: some tens of megabytes of intermediate results."""

NUMPY_PAIRS = 1 << 16
"""The same for numpy, whose operations all go through memory: as many as a core's cache holds."""

PAIRS = (1 << 12, 1 << 18)
"""Pairs evaluated at once outside of tiles; few sizes, as each is compiled."""

CANNOT_TRACE = (TypeError, ValueError, AttributeError, IndexError, KeyError)
"""Errors of functions that cannot be traced: numpy's functions, `if`, indices into lists, keys of dicts."""


_EXAMPLE = jax.ShapeDtypeStruct((2, 3, 1), np.int64), jax.ShapeDtypeStruct((2, 1, 5), np.int64)
"""Positions with which a function is tried."""


class MaskEvaluator:
    """Evaluates one mask function: with a traced head, with traced positions, or by numpy.

    Args:
      mask_mod: the function.
      name: name of the pattern in errors.

    Raises:
      ValueError: the function raises, or returns anything but bools of the broadcast shape.
    """

    def __init__(self, mask_mod: Callable[[Any, Any, Any], Any], name: str):
        self._mask_mod, self._name = mask_mod, name
        self._closed = self._traced()
        self._traces = self._closed is not None or self._traces_positions()
        self._needs_head = self._traces or self._looks_at_head(*(np.zeros(each.shape, np.int64) for each in _EXAMPLE))
        self._head_values = None if self._closed is None else _head_values(self._closed)
        self._functions: dict[tuple, Callable[..., jax.Array]] = {}

    # Ways to call the function.

    def _traced(self) -> typing.Any | None:
        """The function's jaxpr over a traced head, or None if it cannot be traced."""
        scalar = jax.ShapeDtypeStruct((), np.int64)
        try:
            return jax.make_jaxpr(self._apply)(scalar, *_EXAMPLE)
        except _WrongResult as error:
            raise ValueError(str(error)) from None
        except CANNOT_TRACE:
            return None

    def _traces_positions(self) -> bool:
        try:
            jax.eval_shape(functools.partial(self._apply, 0), *_EXAMPLE)
        except (_WrongResult, *CANNOT_TRACE):
            return False
        return True

    def _apply(self, head, query, key):
        """The function's result, checked and broadcast."""
        found = self._mask_mod(head, query, key)
        shape = np.broadcast_shapes(query.shape, key.shape)
        came, dtype = getattr(found, "shape", None), getattr(found, "dtype", None)
        if not came or dtype is None or dtype.kind != "b" or not _broadcasts(came, shape):
            what = shown(found) if came is None else f"{dtype} {list(came)}"
            raise _WrongResult(
                f"{self._name}: expected bools of the shape that the two positions broadcast to, here {list(shape)}, "
                f"got {what}; compute with arrays throughout, as in (head < 2) & (key_position <= query_position)"
            )
        xp = np if isinstance(found, np.ndarray) else jnp
        return xp.broadcast_to(found, shape)

    def head_key(self, head: int) -> Hashable:
        """A key that is equal for heads for which the function computes the same, as far as its code shows."""
        if self._head_values is None:
            return head if self._needs_head else None
        with on_cpu():
            return tuple(np.asarray(value).tobytes() for value in self._head_values(np.int64(head)))

    # Evaluation.

    def tiles(
        self, head: int, size: int, rows: np.ndarray, columns: np.ndarray, query_stop: int, kv_stop: int, causal: bool
    ) -> Bool[np.ndarray, "n size size"]:
        """The token masks of pairs of blocks."""
        step = max(1, (TILE_PAIRS if self._traces else NUMPY_PAIRS) // size**2)
        found = np.empty((len(rows), size, size), bool)
        for start in range(0, len(rows), step):
            row, column = rows[start : start + step], columns[start : start + step]
            if self._traces:
                # One shape is compiled: the last block stands for those that are missing.
                padded = [np.pad(each, (0, step - len(each)), mode="edge") for each in (row, column)]
                with on_cpu():
                    masks = self._compiled(head, (size, causal), *padded, np.int64(query_stop), np.int64(kv_stop))
                found[start : start + step] = np.asarray(masks)[: len(row)]
            else:
                query, key = tile_positions(size, row, column, query_stop, kv_stop)
                tile = self._by_numpy(head, query, key)
                found[start : start + step] = tile & (key <= query) if causal else tile
        return found

    def pairs(self, head: int, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        """The mask over positions that broadcast."""
        shape = np.broadcast_shapes(query.shape, key.shape)
        found = np.empty(int(np.prod(shape)), bool)
        query, key = (np.broadcast_to(each, shape) for each in (query, key))
        step = next((each for each in PAIRS if found.size <= each), PAIRS[-1])
        for start in range(0, found.size, step):
            part = slice(start, min(start + step, found.size))
            flat = (np.asarray(each.flat[part], np.int64) for each in (query, key))
            if self._traces:
                padded = [np.pad(each, (0, step - len(each)), mode="edge") for each in flat]
                with on_cpu():
                    found[part] = np.asarray(self._compiled(head, None, *padded))[: part.stop - start]
            else:
                found[part] = self._by_numpy(head, *flat)
        return found.reshape(shape)

    def _compiled(self, head: int, tile: tuple[int, bool] | None, *arrays) -> jax.Array:
        if self._closed is None:
            return self._function(head, tile)(*arrays)
        return self._function(None, tile)(np.int64(head), *arrays)

    def _function(self, head: int | None, tile: tuple[int, bool] | None) -> Callable[..., jax.Array]:
        """The compiled function over tiles of (block size, causality) or over pairs, of one head or of any."""
        if (head, tile) not in self._functions:
            over = functools.partial(_over_pairs, self._apply)
            if tile is not None:
                over = functools.partial(_over_tiles, self._apply, *tile)
            self._functions[head, tile] = jax.jit(over if head is None else functools.partial(over, head))
        return self._functions[head, tile]

    def _looks_at_head(self, query: np.ndarray, key: np.ndarray) -> bool:
        head = _Unseen()
        try:
            self._mask_mod(head, query, key)
        except CANNOT_TRACE:
            return True
        return head.seen

    def _by_numpy(self, head: int, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        unseen = None if self._needs_head else _Unseen()
        try:
            return np.asarray(self._apply(head if unseen is None else unseen, query, key))
        except _WrongResult as error:
            raise ValueError(str(error)) from None
        except (*CANNOT_TRACE, ArithmeticError) as error:
            if unseen is not None and unseen.seen:
                raise ValueError(f"{self._name} uses the head for some positions only; use it for all") from None
            last = f"query positions up to {query.max()}, key positions up to {key.max()}"
            raise ValueError(
                f"{self._name} raised {type(error).__name__} for head {head}, {last}: {shown(str(error))}; "
                "it is called with integer arrays that broadcast (no `if` on them; captured arrays reach as far)"
            ) from error


class _WrongResult(Exception):
    """Raised if the result of a function is no mask."""


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def _over_pairs(apply, head, query, key):
    """The mask of each pair alone, which differs from that of tiles if the function mixes pairs."""
    return jax.vmap(lambda q, k: apply(head, q[None], k[None])[0])(query, key)


def _over_tiles(apply, size: int, causal: bool, head, rows, columns, query_stop, kv_stop):
    """The mask over the tokens of pairs of blocks; padding has the position of the last token."""
    token = jnp.arange(size, dtype=jnp.int64)
    query = jnp.minimum(rows[:, None, None] * size + token[:, None], query_stop - 1)
    key = jnp.minimum(columns[:, None, None] * size + token, kv_stop - 1)
    found = apply(head, query, key)
    return found & (key <= query) if causal else found


def _head_values(closed) -> Callable[[Any], list] | None:
    """A function of the head that computes all values of a jaxpr through which its result depends on the head.

    These values are computed from the head alone, and enter operations on positions. Heads of equal values have equal
    masks; if there are no such values, all heads have.
    """
    closed = _unwrapped(closed)
    jaxpr = closed.jaxpr
    head, *positions = jaxpr.invars
    of_head, of_positions = {head}, set(positions)
    equations, leaving = [], {}
    for equation in jaxpr.eqns:
        inputs = [each for each in equation.invars if not isinstance(each, Literal)]
        if of_positions.intersection(inputs):
            of_positions.update(equation.outvars)
            leaving.update((each, None) for each in inputs if each in of_head)
        else:
            equations.append(equation)
            if of_head.intersection(inputs):
                of_head.update(equation.outvars)
    leaving.update((each, None) for each in jaxpr.outvars if not isinstance(each, Literal) and each in of_head)
    if not leaving:
        return lambda head: []
    if jaxpr.effects:
        return None
    names = jaxpr.debug_info._replace(arg_names=("head",), result_paths=tuple(f"[{i}]" for i in range(len(leaving))))
    found = jaxpr.replace(invars=[head], outvars=list(leaving), eqns=equations, debug_info=names)
    return jax.jit(jaxpr_as_fun(closed.replace(jaxpr=found)))


def _unwrapped(closed):
    """The inner jaxpr, if the whole function is wrapped by `jax.jit`."""
    jaxpr = closed.jaxpr
    while len(jaxpr.eqns) == 1 and jaxpr.eqns[0].primitive.name in ("jit", "pjit"):
        (equation,) = jaxpr.eqns
        if list(equation.invars) != list(jaxpr.invars) or list(equation.outvars) != list(jaxpr.outvars):
            break
        closed = equation.params["jaxpr"]
        jaxpr = closed.jaxpr
    return closed


class _Unseen:
    """A stand-in for a head that raises, and records, any use of it."""

    def __init__(self):
        self.seen = False


def _refuse(self, *arguments, **named):
    self.seen = True
    raise TypeError("the head is looked at")


_REFUSED = {each for each in dir(int) if each.startswith("__") and not hasattr(type, each)}
_REFUSED |= {"__getattr__", "__iter__", "__len__", "__getitem__", "__array__", "__format__", "__repr__", "__str__"}
_REFUSED |= {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__"}
for _name in _REFUSED:
    setattr(_Unseen, _name, _refuse)
