"""What both gradient kernels compute of a step, whichever way round their tiles are.

With P = exp(logits - lse) and dP = dO · Vᵀ, the gradient of the logits is dS = P ∘ (dP - delta).
"""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.plan import LOG2E, Plan


def weights_and_gradient(
    plan: Plan, products: Array, dweights: Array, lse: Array, delta: Array, seen: Array | None
) -> tuple[Array, Array]:
    """P, and dS before the scale of the logits; zero where nothing is seen, whatever stands there.

    Args:
      products: of queries and keys, neither scaled nor capped.
      dweights: dP.
      lse: times log2(e); inf where there is no query.
      seen: bool, or None where everything is.
    """
    if plan.soft_cap is None:
        weights = jnp.exp2(products * (plan.scale * LOG2E) - lse)
        gradient = weights * (dweights - delta)
    else:
        capped = jnp.tanh(products * (plan.scale / plan.soft_cap))
        weights = jnp.exp2(capped * (plan.soft_cap * LOG2E) - lse)
        gradient = weights * (1 - capped * capped) * (dweights - delta)
    if seen is None:
        return weights, gradient
    return jnp.where(seen, weights, 0.0), jnp.where(seen, gradient, 0.0)
