"""The yardstick on a CPU: dense causal attention in chunks that skip what lies above the diagonal."""

import jax
import jax.numpy as jnp


def chunked_causal(query, key, value, chunk: int = 512):
    """Each chunk of queries multiplies only the keys up to its own end; its backward recomputes the logits.

    About twice as fast on a CPU as `jax.nn.dot_product_attention`, which computes the whole square. [b, t, h, d].
    """
    batch, length, num_heads, dim = query.shape
    num_kv_heads = key.shape[2]
    query = query.reshape(batch, length, num_kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)

    @jax.checkpoint
    def attend(query, key, value):
        end, rows = key.shape[2], query.shape[3]
        logits = jnp.einsum("bkgtd,bksd->bkgts", query, key, preferred_element_type=jnp.float32) * dim**-0.5
        visible = jnp.arange(end) <= end - rows + jnp.arange(rows)[:, None]
        logits = jnp.where(visible, logits, -jnp.inf)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum("bkgts,bkse->bkgte", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return (out / total).astype(query.dtype)

    outs = []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        outs.append(attend(query[:, :, :, start:end], key[:, :, :end], value[:, :, :end]))
    out = jnp.concatenate(outs, 3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, -1)
