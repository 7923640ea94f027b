"""Evaluation of patterns on the host, in 64-bit integers, outside of any trace of the caller."""

import contextlib
import functools
import threading
import typing
from collections.abc import Callable, Iterator

import jax
import numpy as np

from s2jax.patterns.head_groups import HeadGroups
from s2jax.patterns.rule import Rule

_thread = threading.local()


def outside_traces[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function so that its arrays are concrete, even if the caller is being traced.

    Under `jax.jit` or in a `shard_map` every operation of jax.numpy is traced, even on constants. A thread of its own
    has no trace, no mesh and none of the caller's settings (dtype and rank promotion, 32-bit integers).
    """

    @functools.wraps(function)
    def apart(*args: P.args, **kwargs: P.kwargs) -> R:
        if getattr(_thread, "apart", False):
            return function(*args, **kwargs)
        outcome: list[tuple[R | None, BaseException | None]] = []

        def run() -> None:
            _thread.apart = True
            try:
                with _plain_settings():
                    outcome.append((function(*args, **kwargs), None))
            except BaseException as error:  # handed to the caller's thread, which raises it
                outcome.append((None, error))

        thread = threading.Thread(target=run, name="s2jax pattern", daemon=True)
        thread.start()
        thread.join()
        value, error = outcome[0]
        if error is not None:
            raise error
        return typing.cast(R, value)

    return apart


@contextlib.contextmanager
def _plain_settings() -> Iterator[None]:
    """A context with 64-bit positions, which cannot overflow, and JAX's default promotion for captured arrays."""
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.transfer_guard("allow"),
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):
        yield


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """A context that computes masks on the host, if JAX has a CPU backend."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        yield
        return
    with jax.default_device(device):
        yield


def tile_positions(
    block_size: int, rows: np.ndarray, columns: np.ndarray, query_stop: int, kv_stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the tokens of pairs of blocks: int64 [n, block_size, 1] and [n, 1, block_size].

    Padding has the position of the last token, so that `mask_fn` never gets a position that does not exist.
    """
    token = np.arange(block_size)
    query = np.asarray(rows, np.int64)[:, None, None] * block_size + token[:, None]
    key = np.asarray(columns, np.int64)[:, None, None] * block_size + token
    return np.minimum(query, query_stop - 1), np.minimum(key, kv_stop - 1)


def evaluated(pattern: Rule, heads: HeadGroups, head: int, query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The result of `pattern.mask_fn`, bool, broadcast to the shape of the two positions.

    Raises:
      ValueError: `mask_fn` returns anything but bools that broadcast to that shape.
    """
    found = np.asarray(pattern.mask_fn(head, query, key, heads))
    shape = np.broadcast_shapes(query.shape, key.shape)
    if found.dtype != bool:
        raise ValueError(f"{type(pattern).__name__}.mask_fn must return bool, got {found.dtype}")
    try:
        return np.broadcast_to(found, shape)
    except ValueError:
        raise ValueError(
            f"{type(pattern).__name__}.mask_fn must return an array that broadcasts to {list(shape)}, as the positions "
            f"do; got {list(found.shape)}"
        ) from None
