"""A layer of Flax NNX, trained for a few steps to find a value far back in the context.

    python -m examples.nnx_layer

The first token of each sequence is marked, and all tokens have to return its value. Most tokens do not see it through a
window of 16. With stripes, one of the heads reads it from everywhere.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import s2jax

LENGTH, WIDTH, HEADS = 128, 32, 4


class Model(nnx.Module):
    def __init__(self, pattern: s2jax.Pattern, rngs: nnx.Rngs):
        self.embed = nnx.Linear(2, WIDTH, rngs=rngs)
        self.attention = s2jax.nnx.S2Attention(WIDTH, HEADS, pattern, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.attention(self.embed(x)))[..., 0]


def make_batch(key):
    """Inputs [b, t, 2], a mark on the first token and random values; and the first token's value [b, 1]."""
    values = jax.random.normal(key, (16, LENGTH))
    marks = jnp.zeros_like(values).at[:, 0].set(4)
    return jnp.stack([marks, values], -1), values[:, :1]


def loss_of(model, batch):
    x, target = batch
    return ((model(x) - target) ** 2).mean()


@nnx.jit
def train_step(model, optimizer, batch):
    loss, gradients = nnx.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, gradients)
    return loss


for name, pattern in {
    "a window": s2jax.Local(1, block_size=16),
    "a window and stripes": s2jax.LocalStride(block_size=16, local_blocks=1, vert_stride=4),
}.items():
    model = Model(pattern, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    losses = [float(train_step(model, optimizer, make_batch(jax.random.key(step)))) for step in range(60)]
    print(f"{name}: loss {losses[0]:.2f} before, {sum(losses[-10:]) / 10:.2f} after {len(losses)} steps")
