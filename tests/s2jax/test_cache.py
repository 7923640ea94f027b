"""The KV cache against the op without one: the same tokens, appended in any portions, give the same results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2jax import KVCache
from tests.s2jax.cache_cases import (
    BOUNDED,
    PATTERNS,
    STRIDE,
    arrays,
    cache_for,
    check,
    cut,
    extend,
    reference,
    slow_but,
)

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")


class TestEqualsTheOp:
    @pytest.mark.parametrize("name", slow_but(("local stride", "nothing", "any mask")))
    def test_prompt_then_tokens(self, name):
        tokens, cache = arrays(), cache_for(PATTERNS[name])
        expected = reference(tokens, PATTERNS[name])
        out, cache = cache.prefill(*cut(tokens, 0, 75), implementation="xla")
        check(out, expected[:, :75])
        for at in range(75, 130):
            out, cache = extend(cache, *cut(tokens, at, at + 1))
            check(out, expected[:, at : at + 1])
        assert cache.lengths.tolist() == [130, 130]

    @pytest.mark.parametrize("name", slow_but(("by head",)))
    def test_chunks(self, name):
        tokens, cache = arrays(), cache_for(PATTERNS[name])
        expected = reference(tokens, PATTERNS[name])
        for start, stop in ((0, 50), (50, 100), (100, 103), (103, 153)):
            out, cache = extend(cache, *cut(tokens, start, stop))
            check(out, expected[:, start:stop])

    @pytest.mark.parametrize("name", slow_but(("tokens", "stripes"), BOUNDED))
    def test_streams_without_end(self, name):
        length = 400
        tokens, cache = arrays(length=length), cache_for(BOUNDED[name], max_length=None)
        expected = reference(tokens, BOUNDED[name])
        out, cache = cache.prefill(*cut(tokens, 0, 30), implementation="xla")
        check(out, expected[:, :30])
        stops = [*range(90, 331, 60), *range(331, length)]
        for start, stop in zip([30, *stops], stops, strict=False):
            out, cache = extend(cache, *cut(tokens, start, stop))
            check(out, expected[:, start:stop])

    def test_options(self):
        options = {"scale": 0.4, "logits_soft_cap": 2.0, "sinks": jnp.array([0.5, -1.0, 3.0, 0.0])}
        tokens, cache = arrays(), cache_for(PATTERNS["rows that read nothing"])
        expected, lse = reference(tokens, PATTERNS["rows that read nothing"], return_lse=True, **options)
        (out, found), cache = cache.prefill(*cut(tokens, 0, 40), return_lse=True, implementation="xla", **options)
        check(out, expected[:, :40])
        check(found, lse[:, :, :40])
        step = jax.jit(functools.partial(KVCache.extend, return_lse=True, **options))
        for start, stop in ((40, 90), (90, 91)):
            (out, found), cache = step(cache, *cut(tokens, start, stop))
            check(out, expected[:, start:stop])
            check(found, lse[:, :, start:stop])

    def test_in_parts_where_a_chunk_meets_much(self, monkeypatch):
        monkeypatch.setattr("s2jax.cache.attention.PAIRS_AT_ONCE", 2 * 40 * 4 * 16 * 3)
        tokens, cache = arrays(), cache_for(STRIDE)
        expected = reference(tokens, STRIDE)
        for start in range(0, 160, 40):
            out, cache = jax.jit(KVCache.extend)(cache, *cut(tokens, start, start + 40))
            check(out, expected[:, start : start + 40])

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_low_precision(self, dtype):
        """FlashAttention's rule: at most twice the error of the op itself in that precision."""
        tokens = arrays(dtype=dtype)
        exact = reference(tuple(array.astype(jnp.float32) for array in tokens), STRIDE)
        plain = np.abs(reference(tokens, STRIDE).astype(jnp.float32) - exact).max()
        out, cache = cache_for(STRIDE, dtype=dtype).prefill(*cut(tokens, 0, 100), implementation="xla")
        assert out.dtype == dtype
        for start, stop in ((100, 150), (150, 151), (151, 152)):
            out, cache = extend(cache, *cut(tokens, start, stop))
            assert out.dtype == dtype
            assert np.abs(out.astype(jnp.float32) - exact[:, start:stop]).max() <= 2 * plain

    @pytest.mark.slow
    def test_int8_is_attention_over_rounded_keys_and_values(self):
        query, *kept = arrays()
        rounded = []
        for array in kept:
            scale = jnp.abs(array).max(-1, keepdims=True) / 127
            rounded.append(jnp.round(array / scale) * scale)
        _, cache = cache_for(STRIDE, dtype=jnp.int8).prefill(*cut((query, *kept), 0, 100), implementation="xla")
        expected = reference((query, *rounded), STRIDE)
        for at in range(100, 140):
            out, cache = extend(cache, *cut((query, *kept), at, at + 1))
            check(out, expected[:, at : at + 1])
        whole = cache_for(STRIDE)
        assert cache.nbytes < 0.5 * whole.nbytes


class TestSequences:
    def test_stand_at_lengths_of_their_own(self):
        tokens, cache = arrays(), cache_for(STRIDE)
        expected = reference(tokens, STRIDE)
        counts = jnp.array([64, 37])
        out, cache = cache.prefill(*cut(tokens, 0, 64), counts=counts, implementation="xla")
        check(out[1, :37], expected[1, :37])
        # The second one catches up: what is beyond its count is padding.
        lengths = counts
        for step in ([1, 1], [5, 30], [0, 30], [30, 3]):
            longest = max(step)
            mine = [
                jnp.stack([jnp.roll(array[b], -int(lengths[b]), 0)[:longest] for b in range(2)]) for array in tokens
            ]
            out, cache = jax.jit(KVCache.extend)(cache, *mine, counts=jnp.array(step))
            for b in range(2):
                check(out[b, : step[b]], expected[b, int(lengths[b]) : int(lengths[b]) + step[b]])
            lengths = lengths + jnp.array(step)
            assert cache.lengths.tolist() == lengths.tolist()

    def test_reset(self):
        first, second, cache = arrays(seed=0), arrays(seed=1), cache_for(STRIDE)
        _, cache = cache.prefill(*cut(first, 0, 100), implementation="xla")
        cache = cache.reset(jnp.array([False, True]))
        assert cache.lengths.tolist() == [100, 0]
        expected = [reference(each, STRIDE) for each in (first, second)]
        for step in range(20):
            mine = [jnp.stack([a[0, 100 + step], b[1, step]])[:, None] for a, b in zip(first, second, strict=True)]
            out, cache = extend(cache, *mine)
            check(out[0, 0], expected[0][0, 100 + step])
            check(out[1, 0], expected[1][1, step])

    @pytest.mark.parametrize("name", slow_but(("local stride",)))
    def test_rollback(self, name):
        """Drafts of 20 tokens, of which some are taken back and others come in their place."""
        pattern, draft = PATTERNS[name], arrays(seed=1)
        tokens, cache = arrays(), cache_for(pattern, max_rollback=20)
        expected = reference(tokens, pattern)
        _, cache = cache.prefill(*cut(tokens, 0, 41), implementation="xla")
        at = 41
        for kept in (1, 16, 3, 20, 11, 0, 19, 2):
            mixed = [
                jnp.concatenate([a[:, at : at + kept], b[:, : 20 - kept]], 1)
                for a, b in zip(tokens, draft, strict=True)
            ]
            out, cache = extend(cache, *mixed)
            check(out[:, :kept], expected[:, at : at + kept])
            cache = cache.rollback(20 - kept)
            at += kept
            assert cache.lengths.tolist() == [at, at]
            out, cache = extend(cache, *cut(tokens, at, at + 1))
            check(out, expected[:, at : at + 1])
            at += 1

    @pytest.mark.slow
    def test_rollback_of_what_is_gone(self):
        tokens, cache = arrays(), cache_for(STRIDE, max_rollback=8)
        _, cache = cache.prefill(*cut(tokens, 0, 100), implementation="xla")
        with pytest.raises(ValueError, match="from 0 to max_rollback=8 tokens can be taken back, got 9"):
            cache.rollback(9)
        twice = cache.rollback(5).rollback(5)
        out, _ = twice.extend(*cut(tokens, 90, 91))
        assert jnp.isnan(out).all()
        at_run_time = jax.jit(KVCache.rollback)(cache, jnp.array([3, 9]))
        out, _ = at_run_time.extend(*cut(tokens, 97, 98))
        check(out[0], reference(tokens, STRIDE)[0, 97:98])
        assert jnp.isnan(out[1]).all()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "prompt", "new"),
        [
            ("local stride", 100, 60),
            pytest.param("local stride", 96, 20, marks=pytest.mark.slow),
            pytest.param("local stride", 5, 170, marks=pytest.mark.slow),
            pytest.param("by head", 100, 60, marks=pytest.mark.slow),
            ("by head", 96, 20),
            pytest.param("by head", 5, 170, marks=pytest.mark.slow),
        ],
    )
    def test_fork(self, name, prompt, new):
        pattern, samples = PATTERNS[name], 3
        tokens = arrays()
        _, cache = cache_for(pattern).prefill(*cut(tokens, 0, prompt), implementation="xla")
        forked = cache.fork(samples, new)
        assert forked.lengths.tolist() == [prompt] * 6
        shared = jax.tree.leaves([(b.key, b.value) for b in forked.prefix.buffers])
        assert all(
            a is b for a, b in zip(shared, jax.tree.leaves([(b.key, b.value) for b in cache.buffers]), strict=True)
        )
        others = arrays(batch=6, seed=2)
        whole = [
            jnp.concatenate([jnp.repeat(a[:, :prompt], samples, 0), b[:, prompt:]], 1)
            for a, b in zip(tokens, others, strict=True)
        ]
        expected, at = reference(tuple(whole), pattern), prompt
        for count in (1, 1, 10, 1, 2, 1, 1):
            out, forked = extend(forked, *cut(whole, at, at + count))
            check(out, expected[:, at : at + count])
            at += count
        out, forked = extend(forked, *cut(whole, at, prompt + new))
        check(out, expected[:, at : prompt + new])
