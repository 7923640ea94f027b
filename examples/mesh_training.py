"""Training on a mesh: the batch is split over `data`, the heads over `tensor`, on eight devices.

    python -m examples.mesh_training

Eight devices are simulated on the CPU. Each shard attends with the block lists of its own heads, and attention itself
does not communicate. The losses are those of one device.
"""

import os

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import s2jax

PATTERN = s2jax.LocalStride(block_size=16, local_blocks=2, vert_stride=4)
HEADS = P("data", None, "tensor", None)
X = jax.random.normal(jax.random.key(0), (8, 256, 64))


def losses(layer, x, steps=5):
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train_step(layer, optimizer, x):
        loss, gradients = nnx.value_and_grad(lambda layer: ((layer(x) - x) ** 2).mean())(layer)
        optimizer.update(layer, gradients)
        return loss

    return [float(train_step(layer, optimizer, x)) for _ in range(steps)]


def make_layer(query_spec=None):
    return s2jax.nnx.S2Attention(64, 8, PATTERN, query_spec=query_spec, rngs=nnx.Rngs(0))


mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
with jax.set_mesh(mesh):
    layer = make_layer(HEADS)
    by_heads = {"query": P(None, "tensor"), "key": P(None, "tensor"), "value": P(None, "tensor"), "out": P("tensor")}
    for name, spec in by_heads.items():
        kernel = getattr(layer, name).kernel
        kernel.set_value(jax.device_put(kernel[...], NamedSharding(mesh, spec)))
    split = losses(layer, jax.device_put(X, NamedSharding(mesh, P("data"))))
    print("a device's part of the query kernel:", layer.query.kernel[...].addressable_shards[0].data.shape)

alone = losses(make_layer(), X)
print("losses:", [round(loss, 4) for loss in split])
print("those of one device:", bool(jnp.allclose(jnp.array(split), jnp.array(alone), rtol=1e-4)))
