"""What the KV cache does when misused, compiled in unusual ways, or given numbers that are none."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2jax import Dense, KVCache, Local, LocalStride
from s2jax.cache.step import Tables
from tests.s2jax.cache_cases import BOUNDED, STRIDE, arrays, cache_for, check, cut, extend, reference

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")


def test_one_compilation_serves_all_lengths():
    tokens, cache = arrays(), cache_for(STRIDE)
    step = jax.jit(lambda cache, *tokens: cache.extend(*tokens))
    _, cache = cache.prefill(*cut(tokens, 0, 30), implementation="xla")
    for at in range(30, 150, 7):
        _, cache = step(cache, *cut(tokens, at, at + 1))
    assert step._cache_size() == 1


def test_scan():
    tokens = arrays()
    _, cache = cache_for(STRIDE).prefill(*cut(tokens, 0, 80), implementation="xla")

    def step(cache, token):
        out, cache = cache.extend(*(array[:, None] for array in token))
        return cache, out[:, 0]

    _, out = jax.lax.scan(step, cache, tuple(array[:, 80:130].swapaxes(0, 1) for array in tokens))
    check(out.swapaxes(0, 1), reference(tokens, STRIDE)[:, 80:130])


def test_gradients():
    """Through what is kept too; by a prompt, a chunk and a token."""
    tokens = cut(arrays(), 0, 46)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 46, 4, 8)), jnp.float32)

    @jax.jit
    def gradients(tokens):
        def loss(tokens):
            first, cache = cache_for(STRIDE).prefill(*cut(tokens, 0, 20), implementation="reference")
            second, cache = cache.extend(*cut(tokens, 20, 45))
            third, _ = cache.extend(*cut(tokens, 45, 46))
            return (jnp.concatenate([first, second, third], 1) * weights).sum()

        return jax.grad(loss)(tokens)

    expected = jax.grad(lambda tokens: (reference(tokens, STRIDE) * weights).sum())(tokens)
    jax.tree.map(check, gradients(tokens), expected)


def test_vmap():
    tokens, cache = arrays(), cache_for(STRIDE)
    _, cache = extend(cache, *cut(tokens, 0, 20))
    caches, new = jax.tree.map(lambda *each: jnp.stack(each), cache, cache), cut(tokens, 20, 21)
    out, _ = jax.vmap(KVCache.extend)(caches, *(jnp.stack([array, array]) for array in new))
    check(out[0], reference(tokens, STRIDE)[:, 20:21])
    check(out[1], out[0], 1e-6)


@pytest.mark.parametrize("name", BOUNDED)
def test_streams_as_far_as_positions_are_counted(name):
    """As it does near the beginning: what is held is made out to stand half a billion tokens on."""
    tokens, pattern = arrays(), BOUNDED[name]
    _, cache = extend(cache_for(pattern, max_length=None), *cut(tokens, 0, 150))
    size, common = cache.layout.block_size, math.lcm(cache.layout.period, int(cache.layout.num_slots[0]))
    blocks = 2**29 // size // common * common
    buffers = tuple(
        dataclasses.replace(each, block_ids=jnp.where(each.block_ids >= 0, each.block_ids + blocks, -1))
        for each in cache.buffers
    )
    lengths, max_lengths = cache.lengths + blocks * size, cache.max_lengths + blocks * size
    cache = dataclasses.replace(cache, buffers=buffers, lengths=lengths, max_lengths=max_lengths)
    for start, stop in ((150, 151), (151, 180)):
        out, cache = extend(cache, *cut(tokens, start, stop))
        check(out, reference(tokens, pattern)[:, start:stop])


def test_a_chunk_may_be_written_in_any_order():
    """What is dropped before it is read goes nowhere: XLA does not say which of two writes to one place is the last."""
    cache = cache_for(STRIDE)
    layout, buffer = Tables.of(cache.layout, None, 1).layouts[0], cache.buffers[0]
    _, key, value = cut(arrays(), 0, 150)
    positions, end = jnp.tile(jnp.arange(150), (2, 1)), jnp.array([150, 90])
    order = np.random.default_rng(1).permutation(150)
    ascending = layout.append(buffer, key, value, positions, end, None)
    shuffled = layout.append(buffer, key[:, order], value[:, order], positions[:, order], end, None)
    jax.tree.map(np.testing.assert_array_equal, ascending, shuffled)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_nan_that_is_not_read_again_is_gone(dtype):
    """Its block is dropped, or still stands in its slot: neither reaches a result."""
    pattern = Local(2, block_size=16)
    query, key, value = arrays()
    bad = key.at[:, 20].set(jnp.nan), value.at[:, 20].set(jnp.inf)
    _, cache = cache_for(pattern, dtype=dtype).prefill(*cut((query, *bad), 0, 50), implementation="xla")
    clean = cache_for(pattern, dtype=dtype).prefill(*cut((query, key, value), 0, 50), implementation="xla")[1]
    assert not cache.all_finite.any()
    for at in range(50, 70):
        out, cache = extend(cache, *cut((query, *bad), at, at + 1))
        expected, clean = extend(clean, *cut((query, key, value), at, at + 1))
        check(out, expected, 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_nan_in_a_block_of_which_others_are_read(dtype):
    pattern = Local(tokens=5)
    query, key, value = arrays()
    tokens = query, key.at[:, 20].set(jnp.nan), value.at[:, 20].set(jnp.nan)
    cache, clean = cache_for(pattern, dtype=dtype), cache_for(pattern, dtype=dtype)
    _, cache = cache.prefill(*cut(tokens, 0, 24), implementation="reference")
    _, clean = clean.prefill(*cut((query, key, value), 0, 24), implementation="reference")
    out, cache = extend(cache, *cut(tokens, 24, 25))
    assert jnp.isnan(out).all()
    _, clean = extend(clean, *cut((query, key, value), 24, 25))
    for at in range(25, 28):
        out, cache = extend(cache, *cut(tokens, at, at + 1))
        expected, clean = extend(clean, *cut((query, key, value), at, at + 1))
        check(out, expected, 1e-6)


def test_a_value_too_large_for_the_cache_is_infinite_there():
    query, key, value = arrays()
    tokens, pattern = (query, key, value.at[:, 20].set(1e6)), Local(tokens=5)
    _, cache = cache_for(pattern, dtype="float16").prefill(*cut(tokens, 0, 26), implementation="reference")
    check(extend(cache, *cut(tokens, 26, 27))[0], reference(tokens, pattern)[:, 26:27], 1e-2)


def test_a_nan_that_is_read_is_seen():
    query, key, value = arrays()
    tokens = query, key, value.at[:, 20].set(jnp.nan)
    _, cache = cache_for(Dense()).prefill(*cut(tokens, 0, 50), implementation="xla")
    assert jnp.isnan(extend(cache, *cut(tokens, 50, 51))[0]).all()


def test_tokens_beyond_the_cache_give_nan_and_harm_nobody():
    tokens = arrays()
    counts = jnp.array([100, 60])
    _, cache = cache_for(STRIDE, max_length=101).prefill(*cut(tokens, 0, 100), counts=counts, implementation="xla")
    expected = reference(tokens, STRIDE)
    for step in range(4):
        mine = [jnp.stack([array[0, 100 + step], array[1, 60 + step]])[:, None] for array in tokens]
        out, cache = extend(cache, *mine)
        check(out[1, 0], expected[1, 60 + step])
        assert jnp.isnan(out[0]).all() == (step > 0)


@pytest.mark.parametrize("count", [-1, 4])
def test_counts_that_cannot_be_give_nan_and_harm_nobody(count):
    tokens, cache = arrays(), cache_for(STRIDE)
    expected, counts = reference(tokens, STRIDE), jnp.array([2, count])
    begun = jax.jit(lambda cache, *tokens: cache.prefill(*tokens, counts=counts, implementation="reference"))
    step = jax.jit(lambda cache, *tokens: cache.extend(*tokens, counts=counts))
    for out, after in (begun(cache, *cut(tokens, 0, 3)), step(cache, *cut(tokens, 0, 3))):
        check(out[0, :2], expected[0, :2])
        out, _ = extend(after, *cut(tokens, 2, 3))
        check(out[0], expected[0, 2:3])
        assert jnp.isnan(out[1]).all()
    assert jnp.isnan(step(cache, *cut(tokens, 0, 3))[0][1]).all()


@pytest.mark.slow
def test_lost_sequences_stay_lost_until_they_begin_anew():
    tokens, cache = arrays(), cache_for(BOUNDED["blocks"], max_length=None, max_rollback=8)
    _, cache = extend(cache, *cut(tokens, 0, 20))
    cache = jax.jit(KVCache.rollback)(cache, jnp.array([0, 9])).rollback(3)
    out, cache = extend(cache, *cut(tokens, 17, 18))
    check(out[0], reference(tokens, BOUNDED["blocks"])[0, 17:18])
    assert jnp.isnan(out[1]).all()
    out, _ = extend(cache.reset(jnp.ones(2, bool)), *cut(tokens, 0, 1))
    check(out, reference(tokens, BOUNDED["blocks"])[:, :1])


def test_rollback_counts_from_the_largest_length():
    tokens, cache = arrays(), cache_for(STRIDE, max_rollback=8)
    _, cache = extend(cache, *cut(tokens, 0, 40))
    _, cache = extend(cache.rollback(8), *cut(tokens, 32, 33))
    kept, lost, ahead = cache.rollback(1), cache.rollback(2), cache.rollback(jnp.array([-1, -1]))
    check(extend(kept, *cut(tokens, 32, 33))[0], reference(tokens, STRIDE)[:, 32:33])
    assert jnp.isnan(extend(lost, *cut(tokens, 31, 32))[0]).all()
    assert jnp.isnan(extend(ahead, *cut(tokens, 34, 35))[0]).all()


def test_rollback_of_a_fork_ends_where_the_prefix_does():
    tokens, cache = arrays(), cache_for(STRIDE, max_rollback=8)
    _, cache = extend(cache, *cut(tokens, 0, 38))
    fork = cache.fork(1, 30)
    kept, lost = fork.rollback(6), fork.rollback(7)
    check(extend(kept, *cut(tokens, 32, 33))[0], reference(tokens, STRIDE)[:, 32:33])
    assert jnp.isnan(extend(lost, *cut(tokens, 31, 32))[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_donation(dtype):
    """From wherever a cache comes: XLA takes no array that is given twice."""
    step = jax.jit(KVCache.extend, donate_argnums=0)
    tokens = arrays()
    twice = tuple(jnp.repeat(array, 2, 0) for array in tokens)
    cache = cache_for(STRIDE, dtype=dtype, max_rollback=1)
    expected, (out, cache) = reference(tokens, STRIDE)[:, :1], step(cache, *cut(tokens, 0, 1))
    check(out, expected, 2e-2 if dtype == "int8" else 2e-5)
    counts = jnp.array([20, 20], jnp.int32)
    _, cache = cache.prefill(*cut(tokens, 0, 20), counts=counts, implementation="reference")
    _, cache = step(cache, *cut(tokens, 20, 21))
    _, cache = step(cache.rollback(1), *cut(tokens, 20, 21))
    _, cache = step(cache.fork(2, 20), *cut(twice, 21, 22))
    assert cache.lengths.tolist() == [22] * 4
    assert counts.tolist() == [20, 20]


@pytest.mark.slow
def test_what_stays_as_it_is_is_not_copied():
    """Outside of any `jit`, by the addresses of keys and values; and no array stands twice in a cache."""

    def places(tree) -> list[int]:
        return [array.unsafe_buffer_pointer() for array in jax.tree.leaves(tree)]

    def content(buffers) -> list[int]:
        return places([(buffer.key, buffer.value) for buffer in buffers])

    tokens, cache = arrays(), cache_for(STRIDE, max_rollback=2)
    _, cache = extend(cache, *cut(tokens, 0, 20))
    fork = cache.fork(2, 4)
    _, later = extend(fork, *(jnp.repeat(each, 2, 0) for each in cut(tokens, 20, 21)))
    assert content(cache.rollback(1).buffers) == content(cache.buffers)
    assert content(cache.reset(jnp.array([True, False])).buffers) == content(cache.buffers)
    assert content(fork.prefix.buffers) == content(later.prefix.buffers) == content(cache.buffers)
    for each in (cache, fork, later):
        assert len(set(places(each))) == len(places(each))


@pytest.mark.optimised
def test_chunks_take_memory_of_the_cache_and_themselves():
    """Not of their product: four times the chunk takes no more than four times the memory."""

    def temporary(chunk: int) -> int:
        pattern, heads = LocalStride(64, 4, 8), {"num_heads": 8, "num_kv_heads": 8, "head_dim": 64}
        cache = jax.eval_shape(
            lambda: KVCache.create(pattern, batch=1, max_length=64 << 10, dtype=jnp.float32, **heads)
        )
        new = jax.ShapeDtypeStruct((1, chunk, 8, 64), jnp.float32)
        compiled = jax.jit(KVCache.extend, donate_argnums=0).lower(cache, new, new, new).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(512), temporary(2048)
    cache = 8 * 132 * 64 * 128 * 4
    assert large < 4 * max(small, cache)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, t: c.prefill(*cut(t, 0, 0)), r"query must have shape \[2, tokens, 4, 16\].* got \[2, 0"),
        (lambda c, t: c.prefill(*t), "a prompt of 180 tokens does not fit into a cache for 100"),
        (lambda c, t: c.extend(*cut(t, 0, 0)), r"query must have shape"),
        (lambda c, t: c.extend(t[0][:, :2], *cut(t[1:], 0, 3)), r"key must have shape .* got \[2, 3, 2, 16\]"),
        (lambda c, t: c.extend(t[0], t[1].astype("bfloat16"), t[2]), "of one floating dtype, got float32, bfloat16"),
        (lambda c, t: c.prefill(*cut(t, 0, 9), query_offset=5), "prefill takes no query_offset"),
        (lambda c, t: c.share_lengths_with(c.fork(1, 5)), "with one of its own arrangement alone"),
        (lambda c, t: c.fork(1, 5).share_lengths_with(c.fork(1, 40)), "with one of its own arrangement alone"),
        (lambda c, t: c.fork(2, 5).fork(2, 5), "a fork cannot be forked again"),
        (lambda c, t: c.fork(2, 5).reset(jnp.ones(4, bool)), "cannot be reset alone"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(cache_for(STRIDE, max_length=100), arrays())
