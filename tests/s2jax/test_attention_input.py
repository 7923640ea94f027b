"""What `attention` says to input that does not fit: what was expected, what came, how to mend it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from s2jax import (
    BlockMask,
    BlockSelection,
    Dense,
    LocalStride,
    PerHead,
    XlaConfig,
    attention,
    block_sparse_attention,
    compile_schedule,
)

pytestmark = [pytest.mark.filterwarnings("ignore::s2jax.PatternWarning"), pytest.mark.usefixtures("strict_dtypes")]


def zeros(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


QUERY, KEY, VALUE = zeros(2, 40, 4, 8), zeros(2, 50, 2, 8), zeros(2, 50, 2, 6)
IDS = {"query_segment_ids": zeros(2, 40, dtype="int32"), "kv_segment_ids": zeros(2, 50, dtype="int32")}


def selection(blocks=(2, 4, 3, 2), counts=None, dtype="int32", **options) -> BlockSelection:
    return BlockSelection(zeros(*blocks, dtype=dtype), zeros(*(counts or blocks[:3]), dtype="int32"), 16, 16, **options)


def assert_raises(message: str, **changed):
    """`message` stands in the error, in this order, whatever lies between its parts ("…")."""
    arguments = {"query": QUERY, "key": KEY, "value": VALUE, "pattern": Dense(), **changed}
    expected = ".*".join(map(re.escape, message.split("…")))
    with pytest.raises(ValueError, match=f"(?s){expected}"):
        jax.eval_shape(lambda: attention(**arguments))


TENSORS = {
    "no batch": ({"query": QUERY[0]}, "query must be an array [batch, length, heads, features], got (40, 4, 8)"),
    "a list": ({"key": [[1.0]]}, "key must be an array [batch, length, heads, features], got list"),
    "values of three axes": ({"value": VALUE[0]}, "value must be an array…got (50, 2, 6)"),
    "no queries": ({"query": QUERY[:, :0]}, "query_length must be an integer of at least 1, got 0"),
    "no keys": ({"key": KEY[:, :0], "value": VALUE[:, :0]}, "kv_length must be an integer of at least 1, got 0"),
    "another batch": ({"query": QUERY[:1]}, "one batch size, got query (1, 40, 4, 8), key (2, 50, 2, 8), value"),
    "values of another length": ({"value": VALUE[:, 1:]}, "same length and heads, got…value (2, 49, 2, 6)"),
    "values of other heads": ({"value": VALUE[:, :, :1]}, "same length and heads, got…value (2, 50, 1, 6)"),
    "another head dim": ({"query": QUERY[..., :7]}, "same head dim, got query (2, 40, 4, 7), key (2, 50, 2, 8)"),
    "h % k": ({"query": QUERY[:, :, :3]}, "multiple of…got 3 and 2"),
    "mixed dtypes": ({"key": KEY.astype("bfloat16")}, "one dtype among…got query float32, key bfloat16, value float32"),
    "integers": (
        {
            name: zeros(*array.shape, dtype="int32")
            for name, array in (("query", QUERY), ("key", KEY), ("value", VALUE))
        },
        "one dtype among bfloat16, float16, float32, float64, got query int32",
    ),
}

OPTIONS = {
    "one segment array": ({"query_segment_ids": IDS["query_segment_ids"]}, "go together, got no kv_segment_ids"),
    "the other": ({"kv_segment_ids": IDS["kv_segment_ids"]}, "go together, got no query_segment_ids"),
    "segments of another length": (
        IDS | {"kv_segment_ids": zeros(2, 49, dtype="int32")},
        "kv_segment_ids must be integers (2, 50), got int32 (2, 49)",
    ),
    "segments that are floats": (
        IDS | {"query_segment_ids": zeros(2, 40)},
        "query_segment_ids must be integers (2, 40), got float32 (2, 40)",
    ),
    "sinks for other heads": (
        {"sinks": zeros(2)},
        "sinks must be floats (4,), one for each query head, got…(2,)",
    ),
    "sinks that are integers": ({"sinks": zeros(4, dtype="int32")}, "sinks must be floats (4,)…got int32 (4,)"),
    "a cap of zero": ({"logits_soft_cap": 0}, "logits_soft_cap must be a finite number greater than 0, got 0"),
    "a cap below zero": ({"logits_soft_cap": -2.0}, "logits_soft_cap must be a finite number greater than 0, got -2.0"),
    "no scale": ({"scale": float("nan")}, "scale must be a finite number, got nan"),
    "a traced scale": ({"scale": jnp.ones(())}, "scale must be a number known while tracing"),
    "a scale in words": ({"scale": "small"}, "scale must be a number known while tracing, got str"),
    "an offset of floats": (
        {"query_offset": zeros(2)},
        "query_offset must be an integer…got float32 (2,)",
    ),
    "an offset in floats": ({"query_offset": 3.0}, "query_offset must be an integer…got 3.0"),
    "offsets for others": (
        {"query_offset": zeros(3, dtype="int32")},
        "query_offset must be an integer or an integer array [2], one for each sequence, got int32 (3,)",
    ),
    "an offset in words": (
        {"query_offset": "a"},
        "query_offset must be an integer or an integer array [2]…got str 'a'",
    ),
    "a list of offsets": ({"query_offset": [1, 2]}, "query_offset must be an integer…got list [1, 2]"),
    "an array of words": ({"query_offset": np.array("a")}, "query_offset must be an integer…got <U1 ()"),
    "an offset that is a bool": ({"query_offset": True}, "query_offset must be an integer…got True"),
    "an offset beyond int32": (
        {"query_offset": 1 << 31},
        "query_offset must be an integer below 2**30, got 2147483648",
    ),
    "sinks in words": ({"sinks": "a"}, "sinks must be floats (4,), one for each query head, got str 'a'"),
    "a list of sinks": ({"sinks": [0.0] * 4}, "sinks must be floats (4,)…got list [0.0, 0.0, 0.0, 0.0]"),
    "segments in words": (
        {"query_segment_ids": "a", "kv_segment_ids": "a"},
        "query_segment_ids must be integers (2, 40), got str 'a'",
    ),
    "a scale that is a bool": ({"scale": True}, "scale must be a number known while tracing, got bool"),
    "an array of words as scale": ({"scale": np.array("a")}, "scale must be a number known while tracing, got ndarray"),
    "a scale beyond floats": ({"scale": 10**400}, "scale must be a finite number, got inf"),
    "a flag in words": ({"return_lse": "no"}, "return_lse must be True or False, got 'no'"),
    "a negative offset": ({"query_offset": -1}, "query_offset must be an integer of at least 0, got -1"),
    "an unknown backend": (
        {"implementation": "triton"},
        "implementation must be among…xla…reference…got 'triton'",
    ),
    "an unknown backend in a list": ({"implementation": ["cuda", "xla"]}, "implementation must be among…got 'cuda'"),
    "no backend at all": (
        {"implementation": []},
        "implementation must name at least one of mosaic_gpu, mosaic_tpu, xla, reference, got []",
    ),
    "no features": (
        {"query": QUERY[..., :0], "key": KEY[..., :0]},
        "query…length 0: (2, 40, 4, 0)…only the batch may be empty",
    ),
    "a config of another backend": (
        {"implementation": "reference", "config": XlaConfig()},
        "config for 'reference' must be NoneType, got XlaConfig",
    ),
    "a config that is none": ({"implementation": "xla", "config": 128}, "config for 'xla' must be XlaConfig, got int"),
    "a spec without a mesh": ({"query_spec": P("data")}, "query_spec…needs a mesh; set it with jax.set_mesh(mesh)"),
    "a spec that is none": ({"query_spec": "data"}, "query_spec must be a PartitionSpec, got str"),
}

PATTERNS = {
    "a mask without heads": (
        {"pattern": np.ones((40, 50), bool)},
        "got bool [40, 50]; pass mask[None]",
    ),
    "a mask for each sequence": ({"pattern": np.ones((2, 1, 40, 50), bool)}, "got bool [2, 1, 40, 50]…one mask serves"),
    "a mask that is too long": ({"pattern": np.ones((1, 41, 50), bool)}, "t=40 queries, s=50 keys, got [1, 41, 50]"),
    "a mask that is too short": (
        {"pattern": np.ones((1, 40, 49), bool)},
        "t=40 queries, s=50 keys, got [1, 40, 49]",
    ),
    "a token mask for other heads": (
        {"pattern": np.ones((3, 40, 50), bool)},
        "this mask is for 3 heads, got 4 query heads",
    ),
    "a bias": ({"pattern": np.zeros((1, 40, 50))}, "bool [heads or 1, t, s], got float64 [1, 40, 50]"),
    "no pattern": ({"pattern": None}, "pattern must be one such as…got NoneType None"),
    "a pattern's class": ({"pattern": Dense}, "got the class Dense: call it, as in Dense(...)"),
    "a pattern's name": ({"pattern": "causal"}, "expected a pattern such as…got 'causal'"),
    "FlexAttention's mask_mod": ({"pattern": lambda b, h, q, k: q >= k}, "(b, h, q, k)…takes the batch index first"),
    "a function of scalars": ({"pattern": lambda h, q, k: k <= q and q < 9}, "no `if` on them"),
    "a function that counts": ({"pattern": lambda h, q, k: q - k}, "expected bools…got int64"),
    "a function that sums up": ({"pattern": lambda h, q, k: (q >= k).any()}, "expected bools…got bool []"),
    "another head count": ({"pattern": PerHead([Dense()] * 3)}, "expected one for each of 4 query heads or 2 KV heads"),
    "too many dense heads": ({"pattern": LocalStride(num_dense_heads=3)}, "expected at most 2, got 3"),
    "a short mask": ({"pattern": BlockMask(np.ones((1, 3, 3), bool), 16)}, "reaches 48 tokens…expected at least 50"),
    "a mask for other heads": (
        {"pattern": BlockMask(np.ones((2, 9, 9), bool), 16)},
        "is for 2 heads, got 4 query heads",
    ),
    "a mask too short for any offset": (
        {"pattern": BlockMask(np.ones((1, 4, 4), bool), 16), "query_offset": zeros(2, dtype="int32")},
        "reaches 64 tokens…expected at least 90",
    ),
    "rows": (
        {"pattern": selection((2, 4, 2, 2))},
        "40 queries in rows of 16 must have kv_blocks [2|1, 4|2|1, 3",
    ),
    "heads": ({"pattern": selection((2, 3, 3, 2))}, "must have kv_blocks [2|1, 4|2|1, 3…got (2, 3, 3, 2)"),
    "counts": (
        {"pattern": selection(counts=(2, 4, 1))},
        "counts of…three axes, got (2, 4, 3, 2) and (2, 4, 1)",
    ),
    "axes": (
        {"pattern": selection((3, 2), counts=(3,))},
        "[b|1, h|k|1, rows, max_blocks]…got (3, 2) and (3,)",
    ),
    "dtype": ({"pattern": selection(dtype="float32")}, "kv_blocks must be int32, got float32"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name):
    changed, message = TENSORS[name]
    assert_raises(message, **changed)


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    changed, message = OPTIONS[name]
    assert_raises(message, **changed)


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name):
    changed, message = PATTERNS[name]
    assert_raises(message, **changed)


@pytest.mark.parametrize("size", [0, -16, 8, 24, 100, 16.0, "16"])
def test_block_sizes(size):
    for make in (lambda: LocalStride(block_size=size), lambda: BlockMask(np.ones((1, 4, 4), bool), size)):
        with pytest.raises(ValueError, match=r"block_size must be a power of two .*16.*, got"):
            make()


@pytest.mark.parametrize("option", ["dropout_rate", "bias", "mask", "is_causal", "local_window_size"])
def test_options_of_other_attentions_raise(option):
    with pytest.raises(TypeError, match=option):
        attention(QUERY, KEY, VALUE, Dense(), **{option: None})


@pytest.mark.parametrize("value", [0, -1, 1.5, "128"])
def test_config(value):
    with pytest.raises(ValueError, match="block_q must be an integer of at least 1, got"):
        XlaConfig(block_q=value)


@pytest.mark.parametrize("block_size", [0, -8, 1.5])
@pytest.mark.parametrize("name", ["block_size", "query_block"])
def test_selections(name, block_size):
    blocks, counts = zeros(1, 1, 3, 2, dtype="int32"), zeros(1, 1, 3, dtype="int32")
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got"):
        jax.eval_shape(lambda: attention(QUERY, KEY, VALUE, BlockSelection(blocks, counts, **{name: block_size})))


@pytest.mark.parametrize("k", [0, -1, 6])
def test_top_k(k):
    with pytest.raises(ValueError, match=f"k must be between 1 and the number of blocks, 5, got {k}"):
        BlockSelection.top_k(zeros(1, 1, 3, 5), k)


class TestOneLevelDown:
    """`block_sparse_attention`, with a schedule that was compiled for something else."""

    @staticmethod
    def assert_raises(message, schedule, **options):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda: block_sparse_attention(QUERY, KEY, VALUE, schedule, **options))

    @staticmethod
    def schedule(num_heads=4, num_kv_heads=2, query_length=40, kv_length=50, query_offset=0):
        return compile_schedule(
            Dense(), num_heads=num_heads, num_kv_heads=num_kv_heads,
            query_length=query_length, kv_length=kv_length, query_offset=query_offset,
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"num_heads": 2}, r"kv_length\) = \(2, 2, 50\), got \(4, 2, 50\); compile one for these"),
            ({"num_kv_heads": 1}, r"= \(4, 1, 50\), got \(4, 2, 50\)"),
            ({"kv_length": 51}, r"= \(4, 2, 51\), got \(4, 2, 50\)"),
            ({"query_length": 41}, "compiled for 41 queries, got 40"),
        ],
    )
    def test_another_shape(self, changed, message):
        self.assert_raises(message, self.schedule(**changed))

    def test_an_offset_that_comes_twice(self):
        message = "needs a schedule compiled with query_offset=0 .* 90 positions from 3 on"
        self.assert_raises(message, self.schedule(query_length=90, query_offset=3), query_offset=zeros(dtype="int32"))

    def test_too_few_positions(self):
        message = "for all positions that may come; got one for 30 positions .* 40 queries"
        self.assert_raises(message, self.schedule(query_length=30), query_offset=zeros(dtype="int32"))

    def test_a_pattern_for_a_schedule(self):
        self.assert_raises("schedule must be a BlockSchedule or a BlockSelection, got Dense", Dense())
