"""Checks of the op's arguments: one clear error each, that says what was expected, what came and how to mend it."""

import functools
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from pallas_kernels.head_place import (
    UNNAMED,
    HeadPlace,
    all_heads,
    head_place,
    possible_head_axes,
    refuse_unknown_heads,
)
from pallas_kernels.problem import Operands
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection

DTYPES = ("bfloat16", "float16", "float32", "float64")


def check_number(name: str, value, above: float | None = None, most: float = math.inf) -> float:
    """The value as a float; raises ValueError unless it is a finite number, greater than `above`, at most `most`."""
    scalar = isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iuf"
    if isinstance(value, bool) or not (scalar or isinstance(value, numbers.Real)):
        raise ValueError(f"{name} must be a number known while tracing, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        value = number = math.inf
    if not math.isfinite(number) or (above is not None and number <= above):
        bound = "a finite number" if above is None else f"a finite number greater than {above:g}"
        raise ValueError(f"{name} must be {bound}, got {value!r}")
    if number > most:
        raise ValueError(f"{name} must be a number of at most {most:g}, got {number:g}")
    return number


def check_flag(name: str, value) -> bool:
    """The value as a bool; raises ValueError unless it is one, as every text would count as true."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def kind_of(value) -> tuple[np.dtype | None, tuple[int, ...], str]:
    """dtype and shape of a number or an array, and both in words; no dtype if the value is neither."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return value.dtype, value.shape, f"{value.dtype} {value.shape}"
    if isinstance(value, int | float):
        kind = next(kind for kind in (bool, int, float) if isinstance(value, kind))
        return np.dtype(kind), (), f"{value!r}"[:100]  # of an int beyond 64 bits, too
    return None, (), f"{type(value).__name__} {value!r}"[:100]


def as_dtype(value) -> np.dtype | None:
    """The dtype that a value names; None if it names none."""
    if value is None or isinstance(value, numbers.Number | np.ndarray | jax.Array):
        return None
    try:
        return jnp.dtype(value)
    except (TypeError, ValueError):
        return None


def check_operands(
    schedule, query, key, value, query_offset, query_segment_ids, kv_segment_ids, sinks, head_axis, heads
) -> tuple[Operands, Bool[Array, ""] | None]:
    """The arguments of the op as operands; raises ValueError where they do not fit together.

    Returns:
      The operands; and False if a first head came at run time that is none, None if that cannot be.
    """
    check_tensors(query, key, value)
    batch, query_length, num_heads, _ = query.shape
    kv_length, num_kv_heads = key.shape[1:3]
    offset = None if query_offset is None else _offsets(query_offset, batch)
    if isinstance(schedule, BlockSelection):
        _check_selection(schedule, batch, query_length, num_heads, num_kv_heads)
    elif isinstance(schedule, BlockSchedule):
        _check_schedule(schedule, query, key, offset is not None, all_heads(head_axis, heads, num_heads, num_kv_heads))
        if head_axis is None and heads is None:
            refuse_unknown_heads(possible_head_axes(query), schedule.heads_differ, "this schedule")
    else:
        raise ValueError(f"schedule must be a BlockSchedule or a BlockSelection, got {type(schedule).__name__}")
    segments = _segments(query_segment_ids, kv_segment_ids, (batch, query_length), (batch, kv_length))
    place = HeadPlace(None, None)
    if isinstance(schedule, BlockSchedule):
        place = head_place(head_axis, heads, num_heads, num_kv_heads)
    sinks = check_sinks(sinks, num_heads)
    operands = Operands(query, key, value, schedule, sinks, segments[0], segments[1], offset, place.first)
    return operands, place.fits


def check_tensors(query, key, value) -> None:
    named = {"query": query, "key": key, "value": value}
    for name, array in named.items():
        if not hasattr(array, "dtype") or getattr(array, "ndim", None) != 4:
            shape = getattr(array, "shape", type(array).__name__)
            raise ValueError(f"{name} must be an array [batch, length, heads, features], got {shape}")
        if 0 in array.shape[1:]:
            raise ValueError(f"{name} has an axis of length 0: {array.shape}; only the batch may be empty")
    dtypes = {str(array.dtype) for array in named.values()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        came = ", ".join(f"{name} {array.dtype}" for name, array in named.items())
        raise ValueError(f"query, key and value must have one dtype among {', '.join(DTYPES)}, got {came}")
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"query, key and value must have one batch size, got {shapes}")
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(f"key and value must have the same length and heads, got {shapes}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have the same head dim, got {shapes}")
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"query heads must be a multiple of KV heads, got {query.shape[2]} and {key.shape[2]}: {shapes}"
        )


def _check_schedule(schedule: BlockSchedule, query, key, has_offset: bool, heads: tuple[int, int]) -> None:
    expected = (schedule.num_heads, schedule.num_kv_heads, schedule.kv_length)
    came = (*heads, key.shape[1])
    if expected != came:
        raise ValueError(
            f"the schedule was compiled for (num_heads, num_kv_heads, kv_length) = {expected}, got {came}; "
            f"compile one for these{_hint(schedule, heads)}"
        )
    if has_offset and (schedule.query_offset or query.shape[1] > schedule.query_length):
        raise ValueError(
            "a query_offset at run time needs a schedule compiled with query_offset=0 for all positions that may come; "
            f"got one for {schedule.query_length} positions from {schedule.query_offset} on, "
            f"and {query.shape[1]} queries"
        )
    if not has_offset and query.shape[1] != schedule.query_length:
        raise ValueError(f"the schedule was compiled for {schedule.query_length} queries, got {query.shape[1]}")


def _hint(schedule: BlockSchedule, heads: tuple[int, int]) -> str:
    """A hint at `head_axis`, for callers that may have split the heads of a schedule."""
    axes = [axis for axis in possible_head_axes() if axis != UNNAMED]
    if not axes or schedule.num_heads == heads[0] or schedule.num_heads % heads[0]:
        return ""
    return f"; or give head_axis, such as {axes[-1]!r}, if these are a part of the schedule's heads"


def _check_selection(selection: BlockSelection, batch: int, query_length: int, num_heads: int, num_kv_heads: int):
    for name in ("block_size", "query_block"):
        size = getattr(selection, name)
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"a BlockSelection's {name} must be an integer of at least 1, got {size!r}")
    blocks, counts = jnp.shape(selection.kv_blocks), jnp.shape(selection.counts)
    rows = -(-query_length // selection.query_block)
    if len(blocks) != 4 or blocks[:3] != counts:
        raise ValueError(
            "a BlockSelection needs kv_blocks [b|1, h|k|1, rows, max_blocks] and counts of its first three axes, "
            f"got {blocks} and {counts}"
        )
    if blocks[0] not in (1, batch) or blocks[1] not in (1, num_heads, num_kv_heads) or blocks[2] != rows:
        raise ValueError(
            f"a BlockSelection for {batch} sequences, {num_heads} query and {num_kv_heads} KV heads and {query_length} "
            f"queries in rows of {selection.query_block} must have kv_blocks [{batch}|1, {num_heads}|{num_kv_heads}|1, "
            f"{rows}, max_blocks], got {blocks}"
        )
    for name, array in (("kv_blocks", selection.kv_blocks), ("counts", selection.counts)):
        if array.dtype != jnp.int32:
            raise ValueError(f"a BlockSelection's {name} must be int32, got {array.dtype}")


def _offsets(query_offset, batch: int):
    dtype, shape, came = kind_of(query_offset)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer) or shape not in ((), (batch,)):
        raise ValueError(
            f"query_offset must be an integer or an integer array [{batch}], one for each sequence, got {came}"
        )
    return clipped(query_offset, batch)


def clipped(integers, batch: int) -> Int32[Array, " batch"]:
    """int32 integers of at least -1, one for each sequence; what exceeds int32 is out of every range all the same."""
    most = np.iinfo(np.int32).max // 2  # lengths are added
    if isinstance(integers, int | np.integer | np.ndarray):
        integers = np.clip(integers, -1, most)
    return _clipped(integers, most, batch)


# Compiled, as are all conversions here: under JAX's transfer guard, single operations may not bring their constants.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _clipped(integers, most: int, batch: int):
    if jnp.iinfo(integers.dtype).max > most:
        integers = jnp.minimum(integers, most)
    if jnp.iinfo(integers.dtype).min < 0:
        integers = jnp.maximum(integers, -1)
    return jnp.broadcast_to(integers.astype(jnp.int32), (batch,))


def _segments(query_segment_ids, kv_segment_ids, query_shape, kv_shape):
    given = {"query_segment_ids": (query_segment_ids, query_shape), "kv_segment_ids": (kv_segment_ids, kv_shape)}
    missing = [name for name, (ids, _) in given.items() if ids is None]
    if len(missing) == 1:
        raise ValueError(f"query_segment_ids and kv_segment_ids go together, got no {missing[0]}")
    for name, (ids, shape) in given.items():
        if ids is None:
            continue
        dtype, given_shape, came = kind_of(ids)
        if dtype is None or given_shape != shape or not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(f"{name} must be integers {shape}, got {came}")
    if any(isinstance(ids, jax.Array) for ids in (query_segment_ids, kv_segment_ids)):
        return _ids_on_device(query_segment_ids, kv_segment_ids)
    return _ids_on_host(query_segment_ids, kv_segment_ids)


def _ids_on_host(query_ids, kv_ids) -> tuple:
    """int32 ids that are equal where the given ones are, in their order."""
    if query_ids is None:
        return None, None
    arrays = [np.asarray(ids) for ids in (query_ids, kv_ids)]
    if not all(np.can_cast(ids.dtype, np.int32) for ids in arrays):
        limits, flat = np.iinfo(np.int32), [ids.reshape(-1).astype(object) for ids in arrays]
        if any(ids.size and (ids.min() < limits.min or ids.max() > limits.max) for ids in arrays):
            ranks = np.unique(np.concatenate(flat), return_inverse=True)[1]
            arrays = [
                each.reshape(ids.shape) for each, ids in zip(np.split(ranks, [flat[0].size]), arrays, strict=True)
            ]
    return tuple(jnp.asarray(ids.astype(np.int32)) for ids in arrays)


def _ids_on_device(query_ids, kv_ids) -> tuple:
    for name, ids in (("query_segment_ids", query_ids), ("kv_segment_ids", kv_ids)):
        dtype = getattr(ids, "dtype", np.dtype(np.int32))
        if dtype.itemsize > 4 and not jax.config.jax_enable_x64:
            raise ValueError(f"{name} would be cut off to 32 bits, got {dtype}; cast with .astype(np.int32)")
    if all(jnp.result_type(ids) == jnp.int32 for ids in (query_ids, kv_ids)):
        return query_ids, kv_ids
    return _as_int32(query_ids, kv_ids)


@jax.jit
def _as_int32(query_ids, kv_ids) -> tuple:
    """int32 ids that are equal where the given ones are, in their order: ranks, where they may not fit."""
    if all(np.can_cast(ids.dtype, np.int32) for ids in (query_ids, kv_ids)):
        return query_ids.astype(jnp.int32), kv_ids.astype(jnp.int32)
    wide = jnp.uint64 if jnp.uint64 in (query_ids.dtype, kv_ids.dtype) else jnp.int64
    if not jax.config.jax_enable_x64:
        wide = jnp.uint32
    signed = [jnp.issubdtype(ids.dtype, jnp.signedinteger) for ids in (query_ids, kv_ids)]
    # Negative numbers stand before the others, in an unsigned type as well.
    half = wide(1 << (jnp.iinfo(wide).bits - 1)) if jnp.issubdtype(wide, jnp.unsignedinteger) else None
    arrays = [
        ids.astype(wide) if half is None else ids.astype(wide) ^ (half if is_signed else wide(0))
        for ids, is_signed in zip((query_ids, kv_ids), signed, strict=True)
    ]
    if half is not None and signed[0] != signed[1]:
        raise ValueError(
            f"query_segment_ids and kv_segment_ids must have one dtype, got {query_ids.dtype} and {kv_ids.dtype}"
        )
    every = jnp.sort(jnp.concatenate(arrays, 1), axis=1)
    return tuple(jax.vmap(jnp.searchsorted)(every, ids).astype(jnp.int32) for ids in arrays)


def check_sinks(sinks, num_heads: int) -> Array | None:
    """The sinks as an array; raises ValueError unless they are floats, one for each query head."""
    if sinks is None:
        return None
    dtype, shape, came = kind_of(sinks)
    if dtype is None or shape != (num_heads,) or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"sinks must be floats ({num_heads},), one for each query head, got {came}")
    return sinks if isinstance(sinks, jax.Array) else jnp.asarray(sinks)
