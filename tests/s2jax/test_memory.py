"""Memory of a process that meets many patterns outside of `jit`: programs and schedules are kept within bounds."""

import functools
import gc
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import caching, op
from pallas_kernels.caching import bounded_cache, bounded_jit
from s2jax import BlockMask, FirstTokens, KVCache, Local, PerHead, TokenMask, attention
from s2jax.cache import sharding
from s2jax.patterns import Pattern

MEGABYTE = 1 << 20


def programs() -> int:
    """Compiled programs that the process holds."""
    gc.collect()
    return len(jax.devices()[0].client.live_executables())


def use(pattern: Pattern, gradient: bool = False) -> None:
    """Attends by a pattern, and decodes, outside of `jit`."""
    tokens = jnp.ones((1, 20, 2, 8))
    attention(tokens, tokens, tokens, pattern)
    if gradient:
        jax.grad(lambda query: attention(query, tokens, tokens, pattern).sum())(tokens)
    shapes = {"batch": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "dtype": jnp.float32}
    cache = KVCache.create(pattern, max_length=40, **shapes)
    _, cache = cache.prefill(tokens, tokens, tokens)
    cache.extend(*[tokens[:, :1]] * 3)[0].block_until_ready()


class TestBoundedJit:
    def test_least_recently_used_programs_are_freed(self, monkeypatch):
        monkeypatch.setattr(caching, "PROGRAMS", 3)
        traced = []

        @bounded_jit(1)
        def scaled(factor: int, x):
            traced.append(factor)
            return x * factor

        x, before = jnp.arange(3.0), programs()
        for factor in (1, 2, 3, 4, 5, 3, 6, 3):
            np.testing.assert_array_equal(scaled(factor, x), x * factor)
        assert traced == [1, 2, 3, 4, 5, 6]
        assert programs() <= before + 3 + 1  # and `x * factor` outside of jit
        scaled(1, x)
        assert traced[-1] == 1
        scaled.cache_clear()
        assert programs() <= before + 1

    def test_names_in_profiles_are_the_functions(self):
        @bounded_jit(1)
        def scaled(factor: int, x):
            return x * factor

        assert "name=scaled" in str(jax.make_jaxpr(functools.partial(scaled, 2))(1.0))


class TestBoundedCache:
    def test_bounds_in_number_and_bytes(self):
        made = []

        @bounded_cache(3, 100)
        def zeros(size: int) -> np.ndarray:
            made.append(size)
            return np.zeros(size, np.uint8)

        for size in (1, 2, 3, 1, 4, 1):
            assert zeros(size).nbytes == size
        assert made == [1, 2, 3, 4]
        zeros(2)  # was used longest ago
        assert made[4:] == [2]
        for size in (95, 2, 95, 200, 200, 1):
            zeros(size)
        assert made[5:] == [95, 200, 1]
        zeros(200)  # alone it is more than all may have
        assert made[8:] == [200]
        zeros.cache_clear()
        zeros(200)
        assert made[9:] == [200]

    def test_the_arguments_count(self):
        made = []

        @bounded_cache(9, 3000, lambda _: 0)
        def seen(pattern: Pattern) -> None:
            made.append(pattern.nbytes)

        masks = [TokenMask(np.eye(32, dtype=bool)[None], query_offset=offset) for offset in range(3)]
        for mask in (*masks, masks[0], masks[2]):
            seen(mask)
        assert made == [1024] * 4


def test_patterns_know_their_bytes():
    blocks, tokens = BlockMask(np.ones((2, 4, 4), bool)), TokenMask(np.ones((1, 9, 9), bool))
    assert (blocks.nbytes, tokens.nbytes, Local(2).nbytes) == (32, 81, 0)
    assert ((blocks | tokens) & Local(2)).nbytes == 113
    assert PerHead([blocks, tokens | Local(2), blocks]).nbytes == 113


def test_programs_of_a_pattern_are_freed_with_their_entries():
    """Those of the op, of its gradient and of a cache; what is left belongs to no pattern."""
    use(Local(tokens=2), gradient=True)
    caches = [op._attend, sharding._compiled]
    for each in caches:
        each.cache_clear()
    before = programs()
    use(Local(tokens=3) | FirstTokens(1), gradient=True)
    assert programs() > before + 4
    for each in caches:
        each.cache_clear()
    assert programs() <= before


GROWTH = """
import sys
from tests.s2jax.test_memory import growth
growth(int(sys.argv[1]))
"""


def growth(count: int) -> None:
    """Prints the resident megabytes of the process after each tenth of so many patterns."""
    jax.config.update("jax_disable_most_optimizations", True)
    for number in range(count):
        use(Local(tokens=number + 2) | FirstTokens(1))
        if (number + 1) % (count // 10) == 0:
            gc.collect()
            with open("/proc/self/statm") as file:
                print(int(file.read().split()[1]) * 4096 / MEGABYTE, flush=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_three_hundred_patterns_do_not_grow_the_process():
    """Without bounds, they take 10 MB each."""
    done = subprocess.run([sys.executable, "-c", GROWTH, "300"], check=True, capture_output=True, text=True)
    sizes = [float(line) for line in done.stdout.split()]
    assert len(sizes) == 10
    assert sizes[-1] - sizes[2] < 150
