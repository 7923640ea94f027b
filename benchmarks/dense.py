"""The baseline on a CPU: dense causal attention in chunks that skip the upper triangle."""

import jax
import jax.numpy as jnp


def chunked_causal(query, key, value, chunk: int = 512):
    """Dense causal attention, [b, t, h, d]; each chunk of queries multiplies the keys up to its own end only.

    The backward pass recomputes the logits. On a CPU this is about twice as fast as `jax.nn.dot_product_attention`,
    which computes the whole square.
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
        l = weights.sum(-1, keepdims=True)
        out = jnp.einsum("bkgts,bkse->bkgte", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return (out / l).astype(query.dtype)

    outs = []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        outs.append(attend(query[:, :, :, start:end], key[:, :, :end], value[:, :, :end]))
    out = jnp.concatenate(outs, 3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, -1)
