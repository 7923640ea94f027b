"""The bare kernel in a library that s2jax knows nothing of: an attention module of Equinox.

    python -m examples.equinox_attention

The module compiles its schedule once for the length that it is made for. `pallas_kernels` then needs neither patterns
nor Flax; `s2jax.attention` would do both steps in one.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

import s2jax
from pallas_kernels import BlockSchedule, block_sparse_attention

LENGTH, WIDTH, HEADS, KV_HEADS = 256, 64, 4, 2


class SparseAttention(eqx.Module):
    query: eqx.nn.Linear
    key_value: eqx.nn.Linear
    out: eqx.nn.Linear
    schedule: BlockSchedule = eqx.field(static=True)

    def __init__(self, pattern: s2jax.Pattern, key):
        keys, features = jax.random.split(key, 3), WIDTH // HEADS
        self.query = eqx.nn.Linear(WIDTH, HEADS * features, use_bias=False, key=keys[0])
        self.key_value = eqx.nn.Linear(WIDTH, 2 * KV_HEADS * features, use_bias=False, key=keys[1])
        self.out = eqx.nn.Linear(HEADS * features, WIDTH, use_bias=False, key=keys[2])
        shape = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "query_length": LENGTH, "kv_length": LENGTH}
        self.schedule = s2jax.compile_schedule(pattern, **shape)

    def __call__(self, x):  # [t, f]: Equinox maps over the batch outside
        query = jax.vmap(self.query)(x).reshape(1, LENGTH, HEADS, -1)
        key, value = jax.vmap(self.key_value)(x).reshape(LENGTH, 2, KV_HEADS, -1).swapaxes(0, 1)[:, None]
        heads = block_sparse_attention(query, key, value, self.schedule)
        return jax.vmap(self.out)(heads.reshape(LENGTH, -1))


@eqx.filter_jit
@eqx.filter_value_and_grad
def loss_and_gradient(model, x):
    return ((jax.vmap(model)(x) - x) ** 2).mean()


model = SparseAttention(s2jax.LocalStride(block_size=16, local_blocks=2, vert_stride=2), jax.random.key(0))
x = jax.random.normal(jax.random.key(1), (8, LENGTH, WIDTH))
print("output:", jax.vmap(model)(x).shape)
for step in range(20):
    loss, gradient = loss_and_gradient(model, x)
    if step in (0, 19):
        print(f"loss at step {step}: {loss:.3f}")
    model = eqx.apply_updates(model, jax.tree.map(lambda each: -30 * each, gradient))
print("parameters:", sum(array.size for array in jax.tree.leaves(eqx.filter(model, eqx.is_array))))
assert jnp.isfinite(loss)
