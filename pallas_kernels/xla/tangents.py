"""Forward-mode derivatives of attention by gathered blocks, in plain XLA.

With P the weights and dl the tangent of the logits, the tangents are dlse = Σ P ∘ dl and dout = Σ (P ∘ dl) v + Σ P dv
- dlse · out: sums over the blocks that a query reads, as in the forward pass, but with lse known beforehand.
"""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.xla.forward import RowPass


def attend_tangents(queries: RowPass, moved: RowPass, lse: Array, *, bounded: bool = False) -> tuple[Array, Array]:
    """Σ (P ∘ dl) v + Σ P dv, [b, t, h, e], and Σ P ∘ dl, [b, t, h], in the accumulation dtype.

    Args:
      moved: the same pass over the tangents of queries, keys and values.
      lse: [b, t, h], sinks included; inf where a row reads nothing.
    """
    layout, grid = queries.layout, queries.grid
    rows = [layout.rows(grid, each.layout.operands.query) for each in (queries, moved)]
    lse_rows = layout.rows(grid, lse[..., None], jnp.inf)
    features = layout.operands.value.shape[-1]

    def tile(units, fold):
        query, dquery = (layout.tiles_of(each, units) for each in rows)
        lse = layout.tiles_of(lse_rows, units)

        def body(carry, step):
            out, total = carry
            key, value, allowed = queries.gather(units, step)
            dkey, dvalue, _ = moved.gather(units, step)
            logits, slope = layout.logits(layout.product("umd,und->umn", query, key))
            change = layout.product("umd,und->umn", dquery, key) + layout.product("umd,und->umn", query, dkey)
            change = change * jnp.asarray(layout.problem.scale, change.dtype)
            change = change if slope is None else change * slope
            weights = jnp.exp(logits - lse)
            # The mask goes on last: a hidden logit may be NaN.
            change, weights = jnp.where(allowed, weights * change, 0), jnp.where(allowed, weights, 0)
            out = out + layout.product("umn,une->ume", change.astype(value.dtype), value)
            out = out + layout.product("umn,une->ume", weights.astype(value.dtype), dvalue)
            return out, total + change.sum(-1)

        out, total = fold(body, (layout.full((*query.shape[:2], features)), layout.full(query.shape[:2])))
        return out, total[..., None]

    out, total = queries.run(tile, bounded=bounded)
    return layout.from_rows(grid, out), layout.from_rows(grid, total)[..., 0]
