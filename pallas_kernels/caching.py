"""Caches with bounds: JAX keeps every compiled program, and `functools.lru_cache` every array, that it once made."""

import collections
import functools
import operator
import threading
import typing
from collections.abc import Callable

import jax

PROGRAMS = 64
"""Combinations of static arguments whose programs a function keeps."""


class Cached[**P, R](typing.Protocol):
    """A function with a cache."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def cache_clear(self) -> None: ...


def bounded_jit[**P, R](num_static: int) -> Callable[[Callable[P, R]], Cached[P, R]]:
    """Decorates a function like `jax.jit` whose first `num_static` arguments are static, with bounded memory.

    `jax.jit` keeps the programs of all static arguments that it has met, a few megabytes each. Here, each combination
    of static arguments is a function of its own, and the least recently used one is dropped, with its programs.
    """

    def decorate(function: Callable[P, R]) -> Cached[P, R]:
        @functools.lru_cache(maxsize=PROGRAMS)
        def of_static(*static):
            return jax.jit(functools.partial(function, *static))

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return of_static(*args[:num_static])(*args[num_static:], **kwargs)

        return _with_clear(call, of_static.cache_clear)

    return decorate


def bounded_cache[**P, R](
    maxsize: int, max_bytes: int, size: Callable[[R], int] = operator.attrgetter("nbytes")
) -> Callable[[Callable[P, R]], Cached[P, R]]:
    """Decorates a function of hashable positional arguments like `functools.lru_cache`, bounded in bytes as well.

    Args:
      maxsize: the most results that are kept.
      max_bytes: the most bytes that the results but the last one hold, with the arguments' `nbytes`.
      size: bytes of a result.
    """

    def decorate(function: Callable[P, R]) -> Cached[P, R]:
        kept: collections.OrderedDict[tuple, tuple[R, int]] = collections.OrderedDict()
        lock = threading.Lock()

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with lock:
                if args in kept:
                    kept.move_to_end(args)
                    return kept[args][0]
            result = function(*args, **kwargs)
            nbytes = size(result) + sum(getattr(each, "nbytes", 0) for each in args)
            with lock:
                kept[args] = result, nbytes
                while len(kept) > 1 and (len(kept) > maxsize or sum(each for _, each in kept.values()) > max_bytes):
                    kept.popitem(last=False)
            return result

        return _with_clear(call, kept.clear)

    return decorate


def _with_clear(function, cache_clear: Callable[[], None]) -> typing.Any:
    function.cache_clear = cache_clear
    return function
