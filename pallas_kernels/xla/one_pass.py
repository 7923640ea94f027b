"""The gradients of attention in one pass over queries' lists: each weight is computed once, for dq, dk and dv alike.

Five matrix products where two passes take seven. dk and dv are added up in place, which gives the same bits every time
only where a scatter goes through its updates in order, as on a CPU.
"""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.xla.backward import weights_and_gradient
from pallas_kernels.xla.forward import RowPass


def all_gradients(queries: RowPass, dout: Array, lse: Array, delta: Array) -> tuple[Array, Array, Array]:
    """dq [b, t, h, d], dk [b, s, k, d] and dv [b, s, k, e] in the accumulation dtype.

    Args:
      dout: [b, t, h, e].
      lse, delta: [b, t, h].
    """
    layout, grid = queries.layout, queries.grid
    rows = tuple(layout.rows(grid, array) for array in (layout.operands.query, dout))
    rows += layout.rows(grid, lse[..., None], jnp.inf), layout.rows(grid, delta[..., None])

    def tile(totals, units, fold):
        query, dout, lse, delta = (layout.tiles_of(array, units) for array in rows)
        # Keys by queries: the products for dk and dv then contract what lies together.
        lse, delta = lse.swapaxes(1, 2), delta.swapaxes(1, 2)

        def body(carry, step):
            dquery, *totals = carry
            key, value, allowed = queries.gather(units, step)
            products = layout.product("und,umd->unm", key, query)
            dweights = layout.product("une,ume->unm", value, dout)
            allowed = allowed.swapaxes(1, 2)
            weights, dlogits = weights_and_gradient(layout, products, allowed, lse, dweights, delta)
            dlogits = dlogits.astype(key.dtype)
            dkey = layout.product("unm,umd->und", dlogits, query)
            dvalue = layout.product("unm,ume->une", weights.astype(dout.dtype), dout)
            dquery = dquery + layout.product("unm,und->umd", dlogits, key)
            totals = (queries.add(total, units, step, part) for total, part in zip(totals, (dkey, dvalue), strict=True))
            return dquery, *totals

        dquery, *totals = fold(body, (layout.full(query.shape), *totals))
        return totals, dquery

    totals = [layout.full(columns.shape) for columns in (queries.keys, queries.values)]
    totals, dquery = queries.run_carrying(tile, totals)
    dkey, dvalue = (layout.from_columns(total) for total in totals)
    return layout.from_rows(grid, dquery), dkey, dvalue
