"""Time of a decoded token over a sparse cache and over a dense one.

    python -m benchmarks.decode                # a CPU will do; about 3 minutes

The attention of one layer with Phi-3's heads (32 query, 8 KV, head dim 128) in float32: a token is appended to every
sequence of a batch and attends. Both caches go through `KVCache.extend`, jitted, warm, donated and in turn. The ratio
of the times is compared with the share, the sparse cache's number of slots over the dense one's.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import CASES
from benchmarks.record import parser, save, table
from s2jax import Dense, KVCache, Pattern
from s2jax.cache.step import Tables

PHI3 = next(case for case in CASES if case.name == "phi3-8k")
NEW = 64
"""Room for decoded tokens; not all of it is used."""


def filled(pattern: Pattern, batch: int, tokens: int) -> KVCache:
    """A cache that holds a prompt of random keys and values; no attention is computed."""
    heads, kv_heads, head_dim = PHI3.num_heads, PHI3.num_kv_heads, PHI3.head_dim
    cache = KVCache.create(
        pattern, batch=batch, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, max_length=tokens + NEW,
        dtype=jnp.float32,
    )  # fmt: skip
    key = jax.random.normal(jax.random.key(0), (1, tokens, kv_heads, head_dim))
    lengths = jnp.full(batch, tokens, jnp.int32)
    key = jnp.broadcast_to(key, (batch, *key.shape[1:]))
    layouts = Tables.of(cache.layout, None, shards=1).layouts
    buffers = tuple(each.of_prompt(each.take(key), each.take(key), lengths, key.dtype) for each in layouts)
    return dataclasses.replace(cache, buffers=buffers, lengths=lengths, max_lengths=lengths.copy())


def measure(batch: int, tokens: int, repeats: int) -> dict:
    patterns = {"dense": Dense(), "sparse": PHI3.pattern()}
    caches = {name: jax.block_until_ready(filled(pattern, batch, tokens)) for name, pattern in patterns.items()}
    keys = jax.random.split(jax.random.key(1), 2)
    query = jax.random.normal(keys[0], (batch, 1, PHI3.num_heads, PHI3.head_dim))
    key = jax.random.normal(keys[1], (batch, 1, PHI3.num_kv_heads, PHI3.head_dim))
    step, times = jax.jit(KVCache.extend, donate_argnums=0), {name: [] for name in caches}
    for repeat in range(repeats + 2):
        for name in caches:
            start = time.perf_counter()
            out, caches[name] = step(caches[name], query, key, key)
            jax.block_until_ready((out, caches[name]))
            if repeat > 1:  # compiled, and the arrays touched
                times[name].append(time.perf_counter() - start)
    dense, sparse = (float(np.median(times[name])) * 1e3 for name in ("dense", "sparse"))
    share = caches["sparse"].nbytes / caches["dense"].nbytes
    return {
        "tokens": tokens, "batch": batch, "cache MiB": caches["sparse"].nbytes / 2**20,
        "dense MiB": caches["dense"].nbytes / 2**20, "share": share, "ms": sparse, "dense ms": dense,
        "GB/s": caches["sparse"].nbytes / sparse / 1e6, "dense GB/s": caches["dense"].nbytes / dense / 1e6,
        "time over share of dense": sparse / dense / share,
    }  # fmt: skip


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=40, help="decoded tokens; the median time counts")
    given = arguments.parse_args()
    rows = [measure(batch, tokens, given.repeats) for tokens in (8 << 10, 32 << 10) for batch in (1, 8)]
    print(table(rows, list(rows[0])))
    save("decode", rows, given.folder)


if __name__ == "__main__":
    main()
