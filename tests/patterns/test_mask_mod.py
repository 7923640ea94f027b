"""Functions and bool arrays as patterns: what they read, when they are equal, what they refuse."""

import copy
import functools
import tracemalloc
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2jax import (
    FirstTokens,
    KVCache,
    Local,
    MaskMod,
    PatternWarning,
    PerHead,
    TokenMask,
    as_pattern,
    attention,
    compile_cache,
    compile_schedule,
    plotting,
)
from s2jax.compiler import forget_schedules
from s2jax.patterns import HeadGroups
from tests.patterns.test_statistics import check_statistics

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")

DOCUMENTS = np.repeat([0, 1, 2], [30, 50, 60])
DILATIONS = [1, 1, 3, 3]


def dilated(head, query, key):
    return (query - key) % 2 == 0


def by_numpy(head, query, key):
    return np.mod(query - key, 3) == 0


def by_list(head, query, key):
    return (query - key) % DILATIONS[head] == 0


def by_pair_of_heads(head, query, key):
    return (query - key) % (head // 2 + 2) == 0


def by_branch(head, query, key):
    return jnp.where(head < 2, query - key < 9, query - key < 40)


def documents(head, query, key):
    return DOCUMENTS[query] == DOCUMENTS[key]


def far_products(head, query, key):
    """Overflows 32 bits."""
    return (query + 100_000) * (key + 100_000) % 7 < 3


FUNCTIONS = [
    dilated,
    by_numpy,
    by_list,
    by_pair_of_heads,
    by_branch,
    documents,
    far_products,
    jax.jit(by_pair_of_heads),
]


def token_mask(function, heads: int, rows: int, columns: int, offset: int = 0, causal: bool = True) -> np.ndarray:
    """The mask straight from the function, pair by pair."""
    found = np.zeros((heads, rows, columns), bool)
    for place in np.ndindex(found.shape):
        head, query, key = place[0], place[1] + offset, place[2]
        read = function(head, np.array([query]), np.array([key]))
        found[place] = bool(np.asarray(read)[0]) and (key <= query or not causal)
    return found


def compiled(pattern, heads=(4, 2), rows=100, columns=90, offset=0):
    return compile_schedule(
        pattern, num_heads=heads[0], num_kv_heads=heads[1],
        query_length=rows, kv_length=columns, query_offset=offset,
    )  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda each: each.__name__)
def test_a_function_reads_what_it_says(function, causal):
    pattern = MaskMod(function, 16, causal)
    plain = getattr(function, "__wrapped__", function)
    position = np.arange(140)
    with jax.enable_x64(True):
        expected = np.stack(
            [np.broadcast_to(np.asarray(plain(head, position[:, None], position)), (140, 140)) for head in range(4)]
        )
    if causal:
        expected = expected & (position <= position[:, None])
    np.testing.assert_array_equal(pattern.token_mask(4, 2, 140, 140), expected)
    np.testing.assert_array_equal(
        compiled(pattern, rows=37, columns=139, offset=101).token_mask(), expected[:, 101:138, :139]
    )
    check_statistics(pattern, HeadGroups(4, 2), 139)


@pytest.mark.parametrize(
    ("function", "unique_heads"),
    [(dilated, 1), (by_numpy, 1), (documents, 1), (by_pair_of_heads, 2), (by_branch, 2), (by_list, 2)],
)
def test_heads_that_agree_share_a_walker(function, unique_heads):
    assert compiled(MaskMod(function, 16)).lists.num_unique_heads == unique_heads


@pytest.mark.parametrize(("function", "keys"), [(dilated, 1), (by_numpy, 1), (by_pair_of_heads, 2), (by_branch, 2)])
def test_heads_that_agree_are_evaluated_once(function, keys):
    assert len({MaskMod(function).head_key(HeadGroups(4, 2), head) for head in range(4)}) == keys


def test_masks_are_stored_once():
    assert len(compiled(MaskMod(dilated, 16), rows=1600, columns=1600).token_masks) == 4


def test_functions_compose():
    mask = MaskMod(dilated, 32).token_mask(2, 1, 150, 150)
    window = Local(tokens=20).token_mask(2, 1, 150, 150)
    for pattern, expected in (
        (MaskMod(dilated, 32) | Local(1, block_size=16), mask | Local(1, block_size=16).token_mask(2, 1, 150, 150)),
        (dilated & Local(tokens=20), mask & window),
        (Local(tokens=20) & dilated, mask & window),
        ("Local(tokens=20)" & MaskMod(dilated), mask & window),
        (TokenMask(mask) & Local(tokens=20), mask & window),
        (mask | Local(tokens=20), mask | window),
        (jnp.asarray(mask) | Local(tokens=20), mask | window),
        (PerHead([dilated, "Local(tokens=20)"]), np.stack([mask[0], window[1]])),
    ):
        np.testing.assert_array_equal(compiled(pattern, (2, 1), 150, 150).token_mask(), expected)


def test_a_function_has_a_picture():
    assert "MaskMod(<dilated, line" in plotting.plot_text(MaskMod(dilated), 2, 1, 300)


# Equality.


def made(window: int, ids: np.ndarray, *, step=1):
    return lambda head, query, key: (query - key < window * step) & (ids[query] == ids[key])


def test_functions_of_equal_code_and_values_are_equal():
    first = MaskMod(made(5, DOCUMENTS))
    assert first == MaskMod(made(5, DOCUMENTS.copy()))
    assert hash(first) == hash(MaskMod(made(5, DOCUMENTS.copy())))
    for other in (
        made(6, DOCUMENTS),
        made(5, DOCUMENTS + 1),
        made(5, DOCUMENTS, step=2),
        made(5, DOCUMENTS.astype(float)),
    ):
        assert first != MaskMod(other)
    assert first != MaskMod(made(5, DOCUMENTS), causal=False)
    assert MaskMod(functools.partial(by_list)) == MaskMod(functools.partial(by_list))
    assert copy.deepcopy(first) == first


def test_a_lambda_in_a_loop_compiles_once():
    forget_schedules()
    schedules = {id(compiled(as_pattern(lambda head, query, key: query - key < 7))) for _ in range(3)}
    assert len(schedules) == 1


WIDTH = 5


def test_a_changed_global_is_another_function(monkeypatch):
    def window(head, query, key):
        return query - key < WIDTH

    before = MaskMod(window, 16)
    assert compiled(before).token_mask()[0, 50].sum() == 5
    monkeypatch.setitem(globals(), "WIDTH", 9)
    after = MaskMod(window, 16)
    assert after != before
    assert compiled(after).token_mask()[0, 50].sum() == 9
    with pytest.raises(ValueError, match="what its function captures has changed"):
        compiled(before, rows=99)


def test_an_array_changed_in_place_is_refused():
    ids = DOCUMENTS.copy()
    pattern = MaskMod(lambda head, query, key: ids[query] == ids[key], 16)
    ids[:] = 0
    with pytest.raises(ValueError, match="captures has changed"):
        compiled(pattern)


# Under transformations.


def test_functions_are_evaluated_apart_from_what_is_traced():
    query, key = jnp.ones((1, 20, 1, 4)), jnp.ones((1, 20, 1, 4))
    ids = jnp.asarray(DOCUMENTS)

    def attend(query):
        return attention(query, key, key, lambda head, q, k: ids[q] == ids[k], implementation="reference").sum()

    expected = attend(query)
    for transformed in (jax.jit(attend), lambda query: jax.vmap(attend)(query[None])[0]):
        forget_schedules()
        np.testing.assert_allclose(transformed(query), expected, rtol=1e-6)
    forget_schedules()
    assert jax.grad(attend)(query).shape == query.shape


def test_a_traced_capture_is_refused():
    query = jnp.ones((1, 40, 2, 8))

    def attend(query, ids):
        return attention(query, query, query, lambda head, q, k: ids[q] == ids[k])

    with pytest.raises(ValueError, match=r"captures an array of shape .40. that JAX is tracing"):
        jax.jit(attend)(query, jnp.zeros(40, int))
    with pytest.raises(ValueError, match="a mask that JAX is tracing cannot be a pattern"):
        jax.jit(lambda mask: attention(query, query, query, mask))(jnp.ones((1, 40, 40), bool))


# Caches.


def test_cached_decoding_equals_attention():
    random = np.random.default_rng(0)
    query, key, value = (jnp.asarray(random.normal(size=(2, 80, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    mask = jnp.asarray(MaskMod(documents).token_mask(4, 2, 80, 80))[None]
    expected = jax.nn.dot_product_attention(query, key, value, mask=mask)
    cache = KVCache.create(
        documents, batch=2, num_heads=4, num_kv_heads=2, head_dim=8, max_length=80, dtype=jnp.float32
    )
    outs, extend = [], jax.jit(lambda cache, *arrays: cache.extend(*arrays))
    out, cache = cache.prefill(query[:, :35], key[:, :35], value[:, :35])
    outs.append(out)
    for start in range(35, 80, 15):
        out, cache = extend(cache, *(array[:, start : start + 15] for array in (query, key, value)))
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), expected, atol=2e-6)


def test_a_cache_keeps_what_a_function_will_read():
    window = compile_cache(MaskMod(lambda head, q, k: q - k < 20, 16), num_heads=2, num_kv_heads=2, max_length=320)
    assert (
        window.num_slots.tolist()
        == compile_cache(
            Local(tokens=20) | Local(1, block_size=16), num_heads=2, num_kv_heads=2, max_length=320
        ).num_slots.tolist()
    )
    with pytest.raises(ValueError, match="needs max_length"):
        compile_cache(MaskMod(dilated), num_heads=2, num_kv_heads=2)
    with pytest.raises(ValueError, match="needs a causal"):
        compile_cache(MaskMod(dilated, causal=False), num_heads=2, num_kv_heads=2, max_length=99)


# Bool arrays.


def test_a_bool_array_reads_what_it_says():
    random = np.random.default_rng(1)
    mask = random.random((4, 50, 60)) < 0.3
    query, key, value = (
        jnp.asarray(random.normal(size=(1, n, h, 8)), jnp.float32) for n, h in ((50, 4), (60, 2), (60, 2))
    )
    for given in (mask, jnp.asarray(mask), mask[:1], np.asfortranarray(mask)):
        expected = jax.nn.dot_product_attention(query, key, value, mask=jnp.asarray(given)[None])
        for offset in (0, 10):
            out = attention(query, key, value, given, query_offset=offset)
            np.testing.assert_allclose(out, expected, atol=2e-6)
    with pytest.raises(ValueError, match="leave query_offset at 0"):
        attention(query, key, value, mask, query_offset=jnp.int32(3))


def test_token_masks_go_by_content_and_may_reach_further():
    mask = np.tri(100, 120, dtype=bool)[None]
    pattern = TokenMask(mask, 16)
    assert pattern == TokenMask(jnp.asarray(mask), 16) != TokenMask(~mask, 16)
    assert hash(pattern) == hash(TokenMask(mask.copy(), 16))
    assert pattern.causal
    assert not TokenMask(~mask).causal
    assert TokenMask(np.ones((1, 3, 9), bool), query_offset=8).causal
    np.testing.assert_array_equal(
        compiled(pattern, rows=70, columns=90).token_mask(), np.tri(70, 90, dtype=bool)[None].repeat(4, 0)
    )
    check_statistics(pattern, HeadGroups(4, 2), 99)
    with pytest.raises(ValueError, match=r"queries 0 to 99, the input has 40 to 100"):
        compiled(pattern, rows=61, offset=40)
    with pytest.raises(ValueError, match=r"is for 120 keys, the input has 121"):
        compiled(pattern, columns=121)


def test_heads_of_equal_masks_share_a_walker():
    mask = np.random.default_rng(0).random((1, 64, 64)) < 0.5
    assert compiled(np.concatenate([mask, ~mask, mask, mask]), rows=64, columns=64).lists.num_unique_heads == 2


# What is refused.

BAD = {
    "no function": (lambda: MaskMod(3), "takes a function .*got 3"),
    "two positions": (lambda: MaskMod(lambda q, k: q >= k), r"got one that takes \(q, k\)"),
    "the batch too": (lambda: MaskMod(lambda b, h, q, k: q >= k), "takes the batch index first"),
    "block size": (lambda: MaskMod(dilated, 24), "power of two from 16.*got 24"),
    "a shape of its own": (lambda: compiled(MaskMod(lambda h, q, k: jnp.ones(7, bool))), "here .* got bool"),
    "nothing": (lambda: compiled(MaskMod(lambda h, q, k: None)), "got None"),
    "two results": (lambda: compiled(MaskMod(lambda h, q, k: (q < k, k < q))), "expected bools"),
    "short array": (lambda: compiled(MaskMod(lambda h, q, k: DOCUMENTS[q] == 0), rows=200), "IndexError .*up to 199"),
    "by the shape": (
        lambda: compiled(MaskMod(lambda h, q, k: jax.random.bernoulli(jax.random.key(0), 0.5, (q + k).shape), 16)),
        "contradicts itself at query",
    ),
    "by a neighbour": (lambda: compiled(lambda h, q, k: (q % 5 == 0).any() & (k >= 0)), "contradicts itself"),
    "an integer mask": (lambda: TokenMask(np.ones((1, 4, 4), int)), "got int64"),
    "a flat mask": (lambda: TokenMask(np.ones((4, 4), bool)), r"pass mask\[None\]"),
    "no pattern": (lambda: as_pattern(3.5), "pattern must be .*got float 3.5"),
    "a class": (lambda: as_pattern(Local), "got the class Local: call it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_was_expected_and_what_came(name):
    make, text = BAD[name]
    with pytest.raises(ValueError, match=text):
        make()


# Time and memory.


@pytest.mark.slow
def test_32k_tokens_in_seconds_and_within_memory():
    """The target: 5 s on two cores, and 256 MB."""
    import time

    for function in (dilated, lambda head, q, k: (abs(q // 128 - k // 128) <= 4) & (abs(q % 128 - k % 128) <= 4)):
        forget_schedules()
        begin = time.process_time()
        schedule = compiled(MaskMod(function), (1, 1), 1 << 15, 1 << 15)
        assert time.process_time() - begin < 10
        assert schedule.nbytes < 4e6


def test_memory_is_that_of_a_tile():
    tracemalloc.start()
    compiled(MaskMod(by_numpy), (1, 1), 4096, 4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


def test_a_function_warns_where_a_query_does_not_read_its_own_block():
    with warnings.catch_warnings(record=True, action="always", category=PatternWarning) as caught:
        MaskMod(lambda head, q, k: k < 4).warn_if_incomplete(2, 1, 300)
        MaskMod(dilated).warn_if_incomplete(2, 1, 300)
        (MaskMod(lambda head, q, k: k < 4) | Local(1) | FirstTokens(3)).warn_if_incomplete(2, 1, 300)
    assert ["own block" in str(each.message) for each in caught] == [True]
    assert caught[0].filename == __file__


def test_a_warning_names_the_line_of_the_caller():
    query = jnp.ones((1, 130, 2, 8))
    with warnings.catch_warnings(record=True, action="always", category=PatternWarning) as caught:
        attention(query, query, query, "Strided(64, 9)", implementation="reference")
        KVCache.create("Strided(64, 10)", batch=1, num_heads=1, num_kv_heads=1, head_dim=8, max_length=130)
        compiled("Strided(64, 11)")
    assert {each.filename for each in caught} == {__file__}
