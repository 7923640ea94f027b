"""Generation with a KV cache: a prompt, then token by token, with a small random model.

    python -m examples.generation

The model is a hybrid decoder: its first layer is dense and keeps every token, the others keep a window and their
stripes. The tokens are those of a whole forward pass for each token, which needs no cache.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from models import Transformer, TransformerConfig
from s2jax import LocalStride

config = TransformerConfig(
    vocab_size=100,
    num_layers=3,
    d_model=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    d_ff=128,
    pattern=LocalStride(block_size=16, local_blocks=2, vert_stride=4),
    dense_layers=(0,),
    dtype="float32",
)
model = Transformer(config, rngs=nnx.Rngs(0))
graph, state = nnx.split(model)
prompt = jax.random.randint(jax.random.key(1), (2, 200), 0, config.vocab_size)
NEW = 16


@jax.jit
def begin(state, prompt, caches):
    logits, caches = nnx.merge(graph, state).prefill(prompt, caches)
    return logits[:, -1].argmax(-1), caches


@functools.partial(jax.jit, donate_argnums=2)  # the caches are updated in place
def step(state, token, caches):
    logits, caches = nnx.merge(graph, state).extend(token[:, None], caches)
    return logits[:, -1].argmax(-1), caches


caches = model.create_caches(batch=2, max_length=prompt.shape[1] + NEW)
print("bytes of the layers' caches:", [cache.nbytes for cache in caches])
token, caches = begin(state, prompt, caches)
tokens = [token]
for _ in range(NEW - 1):
    token, caches = step(state, token, caches)
    tokens.append(token)
generated = jnp.stack(tokens, 1)
print("generated:", generated[0].tolist())

text = jnp.concatenate([prompt, generated], 1)
expected = nnx.jit(lambda model, tokens: model(tokens))(model, text[:, :-1]).argmax(-1)[:, -NEW:]
print("the same without a cache:", bool((generated == expected).all()))
