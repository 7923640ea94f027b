"""Arguments of a KV cache that are none of their kind: one line of error each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2jax import KVCache, LocalStride

SETTINGS = {
    "batch": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "max_length": 64, "max_rollback": 3,
    "dtype": jnp.float32,
}  # fmt: skip
HUGE = 10**30
COUNTS = "counts must be integers of shape [2], one for each sequence, got "
REMOVED = "tokens must be an integer or integers of shape [2], one for each sequence, got "
WHICH = "which must be bool of shape [2], one for each sequence, got "
DTYPES = "dtype must be bfloat16, float16, float32 or int8, got "


@pytest.fixture(scope="module")
def cache() -> KVCache:
    return KVCache.create(LocalStride(16, 1, 2), **SETTINGS)


def tokens(**others) -> dict:
    """Arguments of `prefill` and `extend`, two tokens for each of two sequences."""
    key = jnp.ones((2, 2, 2, 8), jnp.float32)
    return {"query": jnp.ones((2, 2, 4, 8), jnp.float32), "key": key, "value": key, **others}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(
            (name, value, f"{name} must be an integer of at least 1, got {value!r}")
            for name in ("batch", "num_heads", "num_kv_heads", "head_dim", "value_dim")
            for value in ("a", [4], 2.0, True, 0)
        ),
        *(
            (name, None, f"{name} must be an integer of at least 1, got None")
            for name in ("batch", "num_heads", "num_kv_heads", "head_dim")
        ),
        ("num_kv_heads", HUGE, f"num_kv_heads must be an integer of at most 2**40, got {HUGE}"),
        ("num_kv_heads", 3, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ("max_length", "a", "max_length must be an integer of at least 1, got 'a'"),
        ("max_length", HUGE, f"max_length must be an integer below 2**30, got {HUGE}"),
        ("max_rollback", None, "max_rollback must be an integer of at least 0, got None"),
        ("max_rollback", -1, "max_rollback must be an integer of at least 0, got -1"),
        ("max_rollback", HUGE, f"max_rollback must be an integer below 2**30, got {HUGE}"),
        ("dtype", None, f"{DTYPES}None"),
        ("dtype", "a", f"{DTYPES}'a'"),
        ("dtype", "int4", f"{DTYPES}int4"),
        ("dtype", HUGE, f"{DTYPES}{HUGE}"),
        ("dtype", [4], f"{DTYPES}[4]"),
        ("dtype", np.array(4), f"{DTYPES}array(4)"),
        ("dtype", jnp.float64, f"{DTYPES}float64"),
    ],
)
def test_create(name, value, message):
    with pytest.raises(ValueError) as error:
        jax.eval_shape(lambda: KVCache.create(LocalStride(16, 1, 2), **{**SETTINGS, name: value}))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["prefill", "extend"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("counts", "a", f"{COUNTS}str 'a'"),
        ("counts", 1, f"{COUNTS}1"),
        ("counts", HUGE, f"{COUNTS}{HUGE}"),
        ("counts", [HUGE, 1], f"{COUNTS}list [{HUGE}, 1]"),
        ("counts", [1.0, 2.0], f"{COUNTS}list [1.0, 2.0]"),
        ("counts", [[1], [1, 2]], f"{COUNTS}list [[1], [1, 2]]"),
        ("counts", np.ones(2), f"{COUNTS}float64 (2,)"),
        ("counts", np.array(["a", "b"]), f"{COUNTS}<U1 (2,)"),
        ("counts", np.ones(2, bool), f"{COUNTS}bool (2,)"),
        ("counts", np.ones(3, int), f"{COUNTS}int64 (3,)"),
        ("query", "a", "query must have shape [2, tokens, 4, 8] in this cache, with one number of"),
        ("key", None, "key must have shape [2, tokens, 2, 8] in this cache, with one number of"),
        ("value", 1.5, "value must have shape [2, tokens, 2, 8] in this cache, with one number of"),
        ("return_lse", "a", "return_lse must be True or False, got 'a'"),
        ("return_lse", 1, "return_lse must be True or False, got 1"),
        ("scale", "a", "scale must be a number known while tracing, got str"),
        ("scale", True, "scale must be a number known while tracing, got bool"),
        ("scale", float("nan"), "scale must be a finite number, got nan"),
        ("logits_soft_cap", [1], "logits_soft_cap must be a number known while tracing, got list"),
        ("logits_soft_cap", 0, "logits_soft_cap must be a finite number greater than 0, got 0"),
        ("sinks", "a", "sinks must be floats (4,), one for each query head, got str 'a'"),
        ("sinks", [0.0] * 4, "sinks must be floats (4,), one for each query head, got list [0.0, 0.0, 0.0, 0.0]"),
        ("sinks", np.zeros(2), "sinks must be floats (4,), one for each query head, got float64 (2,)"),
        ("sinks", HUGE**9, "sinks must be floats (4,), one for each query head, got 10000"),
    ],
)  # fmt: skip
def test_tokens(cache, method, name, value, message):
    with pytest.raises(ValueError) as error:
        jax.eval_shape(lambda: getattr(cache, method)(**tokens(**{name: value})))
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < 250
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("rollback", "a", f"{REMOVED}str 'a'"),
        ("rollback", None, f"{REMOVED}NoneType None"),
        ("rollback", 1.0, f"{REMOVED}1.0"),
        ("rollback", True, f"{REMOVED}True"),
        ("rollback", [1.0, 2.0], f"{REMOVED}list [1.0, 2.0]"),
        ("rollback", np.ones(2), f"{REMOVED}float64 (2,)"),
        ("rollback", np.ones(3, int), f"{REMOVED}int64 (3,)"),
        ("rollback", HUGE, f"from 0 to max_rollback=3 tokens can be taken back, got {HUGE}; see KVCache.create"),
        ("reset", "a", f"{WHICH}str 'a'"),
        ("reset", None, f"{WHICH}NoneType None"),
        ("reset", 1, f"{WHICH}1"),
        ("reset", HUGE, f"{WHICH}{HUGE}"),
        ("reset", [0, 1], f"{WHICH}list [0, 1]"),
        ("reset", [True], f"{WHICH}list [True]"),
        ("reset", np.array([0, 1]), f"{WHICH}int64 (2,)"),
        ("fork", ("a", 4), "samples must be an integer of at least 1, got 'a'"),
        ("fork", (0, 4), "samples must be an integer of at least 1, got 0"),
        ("fork", (True, 4), "samples must be an integer of at least 1, got True"),
        ("fork", (HUGE, 4), f"samples must be an integer of at most 2**40, got {HUGE}"),
        ("fork", (2, None), "max_new_tokens must be an integer of at least 1, got None"),
        ("share_lengths_with", "a", "a cache can share lengths with another KVCache alone, got str"),
    ],
)
def test_other_calls(cache, method, arguments, message):
    with pytest.raises(ValueError) as error:
        getattr(cache, method)(*(arguments if isinstance(arguments, tuple) else (arguments,)))
    assert str(error.value) == message


def test_lists_of_their_kind_are_taken(cache):
    _, begun = cache.prefill(**tokens(), counts=[1, 2])
    assert begun.lengths.tolist() == [1, 2]
    assert begun.rollback([0, 1]).lengths.tolist() == [1, 1]
    assert begun.rollback([1]).lengths.tolist() == [0, 1]
    assert begun.reset([True, False]).lengths.tolist() == [0, 2]


@pytest.mark.parametrize(("count", "x64"), [((1 << 32) + 1, False), (-(1 << 32), False), ((1 << 32) + 1, True)])
def test_counts_beyond_int32_are_not_cut_off(cache, count, x64):
    """Neither one of NumPy nor, under x64, one on the device: both are told by NaN."""
    given = np.array([count, 1])
    with jax.enable_x64(x64):
        counts = jnp.asarray(given) if x64 else given
        out, extended = cache.extend(**tokens(), counts=counts)
        assert np.isnan(np.asarray(out)).all((1, 2, 3)).tolist() == [True, False]
        again, _ = extended.rollback(counts).extend(**tokens())
        assert np.isnan(np.asarray(again)).all((1, 2, 3)).tolist() == [True, False]
