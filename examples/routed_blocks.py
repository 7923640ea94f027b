"""Blocks chosen under `jit`: a gate scores the key blocks for every block of queries, and each reads the best k.

    python -m examples.routed_blocks

The gate here is the mean query times the mean key of each block. The queries look for keys like themselves, so the gate
finds most of the attention's weight in a few blocks. Random blocks do not.
"""

import functools

import jax
import jax.numpy as jnp

import s2jax

LENGTH, HEADS, WIDTH, BLOCK = 2048, 2, 32, 64
BLOCKS = LENGTH // BLOCK


def gate(query, key):
    """Scores of every key block for every block of queries: [b, h, rows, blocks]."""
    rows, blocks = (array.reshape(1, BLOCKS, BLOCK, HEADS, WIDTH).mean(2) for array in (query, key))
    return jnp.einsum("brhd,bchd->bhrc", rows, blocks)


@functools.partial(jax.jit, static_argnums=4)
def routed(query, key, value, scores, k):
    own = jnp.eye(BLOCKS) * 1e9  # every block reads itself
    selection = s2jax.BlockSelection.top_k(scores + own, k, block_size=BLOCK, query_block=BLOCK)
    return s2jax.attention(query, key, value, selection)


# Tokens of a block share a topic, out of eight; the topics recur.
keys = jax.random.split(jax.random.key(0), 4)
topics = 4 * jax.random.normal(keys[0], (8, HEADS, WIDTH)) / WIDTH**0.25
topic = jnp.repeat(topics[jax.random.randint(keys[1], (BLOCKS,), 0, 8)], BLOCK, 0)[None]
query, key = topic + jax.random.normal(keys[2], (2, 1, LENGTH, HEADS, WIDTH))
value = jax.random.normal(keys[3], (1, LENGTH, HEADS, WIDTH))

dense = s2jax.attention(query, key, value, s2jax.Dense())
chance = jax.random.normal(jax.random.key(1), (1, HEADS, BLOCKS, BLOCKS))
for k in (2, 4, 8):
    errors = [
        jnp.linalg.norm(routed(query, key, value, scores, k) - dense) / jnp.linalg.norm(dense)
        for scores in (gate(query, key), chance)
    ]
    print(f"{k} of {BLOCKS} blocks: off by {errors[0]:.0%} with the gate, by {errors[1]:.0%} at random")
