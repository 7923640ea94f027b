"""The same layer in Flax Linen: initialised, differentiated, and given the weights of the NNX layer.

python -m examples.linen_layer
"""

import jax
import jax.numpy as jnp
from flax import nnx

import s2jax

pattern = s2jax.LocalStride(block_size=16, local_blocks=2, vert_stride=2) | s2jax.FirstTokens(4)
settings = {"num_heads": 4, "num_kv_heads": 2, "pattern": pattern, "rope_theta": 10000.0, "qk_norm": True}
x = jax.random.normal(jax.random.key(0), (2, 200, 64))

layer = s2jax.linen.S2Attention(**settings)
variables = layer.init(jax.random.key(1), x)
for path, array in jax.tree_util.tree_leaves_with_path(variables["params"]):
    print(jax.tree_util.keystr(path, simple=True, separator="."), array.shape)


@jax.jit
@jax.grad
def gradient(variables):
    return (layer.apply(variables, x) ** 2).mean()


norms = jax.tree.map(jnp.linalg.norm, gradient(variables))
print("gradients are finite:", all(bool(jnp.isfinite(norm)) for norm in jax.tree.leaves(norms)))

# Parameters have the same names and shapes in both libraries, so weights go either way.
twin = s2jax.nnx.S2Attention(64, **settings, rngs=nnx.Rngs(0))
nnx.update(twin, variables["params"])
print("the NNX layer gives the same:", bool(jnp.allclose(twin(x), layer.apply(variables, x), atol=1e-5)))
