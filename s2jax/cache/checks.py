"""Checks of what is given to a KV cache: one clear error each."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from pallas_kernels.checks import as_dtype, clipped, kind_of
from s2jax.cache.buffers import Buffer
from s2jax.cache.layout import CacheLayout
from s2jax.cache.sharding import ShardHeads
from s2jax.cache.step import INVALID_LENGTH, same_counts
from s2jax.messages import shown
from s2jax.patterns.checks import is_integer


def check_tokens(
    heads: ShardHeads, buffer: Buffer, batch: int, query: Array, key: Array, value: Array, counts
) -> Int32[Array, " b"] | None:
    """The counts as int32; raises ValueError if tokens do not fit a cache for `batch` sequences."""
    head_dim, value_dim = buffer.key.shape[-1], buffer.value.shape[-1]
    length = query.shape[1] if getattr(query, "ndim", None) == 4 else 0
    for name, array, count, features in (
        ("query", query, heads.query, head_dim),
        ("key", key, heads.kv, head_dim),
        ("value", value, heads.kv, value_dim),
    ):
        dtype, shape, came = kind_of(array)
        if dtype is None or shape != (batch, length, count, features) or not length:
            raise ValueError(
                f"{name} must have shape [{batch}, tokens, {count}, {features}] in this cache, with one number of "
                f"tokens for all three and at least one, got {list(shape) or came}"
            )
        if array.dtype != query.dtype or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"query, key and value must be of one floating dtype, got {query.dtype}, {array.dtype}")
        if array.dtype == jnp.float64:
            raise ValueError("a cache computes in float32, got float64: cast query, key and value")
    return None if counts is None else _per_sequence("counts", counts, batch, ((batch,),))


def check_removed(tokens, max_rollback: int, batch: int) -> Int32[Array, " b"]:
    """The tokens to take back of every sequence; raises ValueError unless they are integers up to `max_rollback`."""
    if is_integer(tokens):
        if not 0 <= tokens <= max_rollback:
            raise ValueError(
                f"from 0 to max_rollback={max_rollback} tokens can be taken back, got {shown(tokens)}; see "
                "KVCache.create"
            )
        return same_counts(batch, int(tokens))
    return _per_sequence("tokens", tokens, batch, ((), (1,), (batch,)))


def _per_sequence(name: str, given, batch: int, shapes: tuple[tuple[int, ...], ...]) -> Int32[Array, " b"]:
    """A number of tokens for every sequence; raises ValueError unless they are integers of one of the shapes."""
    array = _as_array(given)
    dtype, shape, _ = kind_of(array)
    if dtype is None or shape not in shapes or not jnp.issubdtype(dtype, jnp.integer):
        integers = "integers" if () not in shapes else "an integer or integers"
        raise ValueError(
            f"{name} must be {integers} of shape [{batch}], one for each sequence, got {kind_of(given)[2]}"
        )
    if isinstance(array, np.ndarray):
        array = jnp.asarray(np.clip(array, -1, INVALID_LENGTH))  # beyond int32, it is no count all the same
    return array if array.dtype == jnp.int32 and array.shape == (batch,) else clipped(array, batch)


def check_which(which, batch: int) -> Bool[Array, " b"]:
    """The sequences that are chosen by True; raises ValueError unless it is a bool for each of them."""
    array = _as_array(which)
    dtype, shape, _ = kind_of(array)
    if dtype is None or shape != (batch,) or not jnp.issubdtype(dtype, jnp.bool_):
        raise ValueError(f"which must be bool of shape [{batch}], one for each sequence, got {kind_of(which)[2]}")
    return jnp.asarray(array)


def _as_array(given):
    """The array of a list or the like; arrays and values that make none are returned unchanged."""
    if isinstance(given, jax.Array | np.ndarray):
        return given
    try:
        return jnp.asarray(given)
    except (TypeError, ValueError, OverflowError):
        return given


def check_dtype(given) -> np.dtype:
    """The dtype of what a cache stores; raises ValueError if it is none of these."""
    dtype = as_dtype(given)
    if dtype is None or dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.int8):
        came = shown(given) if dtype is None else dtype
        raise ValueError(f"dtype must be bfloat16, float16, float32 or int8, got {came}")
    return dtype


def check_prompt(layout: CacheLayout, length: int, is_forked: bool, options: dict) -> None:
    """Raises ValueError if a prompt of so many tokens, or an option of `attention`, does not fit a cache."""
    refused = {"query_offset", "query_segment_ids", "kv_segment_ids"} & options.keys()
    if refused:
        names = ", ".join(sorted(refused))
        raise ValueError(f"a prompt begins its sequence's one context: prefill takes no {names}")
    for name in {"query_spec", "head_axis", "heads"} & options.keys():
        raise ValueError(f"prefill takes no {name}: how the cache is split is said once, in KVCache.create")
    if is_forked:
        raise ValueError("prefill begins anew, but the sequences share a prefix: prefill before fork")
    if layout.max_length is not None and length > layout.max_length:
        raise ValueError(
            f"a prompt of {length} tokens does not fit into a cache for {layout.max_length}: create it with a larger "
            "max_length"
        )
