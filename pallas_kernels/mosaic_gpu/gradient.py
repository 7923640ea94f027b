"""What both gradient kernels compute of a step, whichever way round their tiles are.

With P = exp(logits - lse) and dP = dO · Vᵀ, the gradient of the logits is dS = P ∘ (dP - delta).
"""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.plan import LOG2E, StepPlan
from pallas_kernels.mosaic_gpu.steps import Registers

REGISTERS = Registers(232, 40)
"""More to compute with than in the forward pass, and fewer to load with."""


def weights_and_slope(plan: StepPlan, products: Array, lse: Array) -> tuple[Array, Array | None]:
    """P, and the slope of the soft cap, None where there is none.

    Args:
      products: of queries and keys, neither scaled nor capped.
      lse: times log2(e); -inf in rows that read nothing, which are masked, and inf where there is no row.
    """
    if plan.soft_cap is None:
        return jnp.exp2(products * (plan.scale * LOG2E) - lse), None
    capped = jnp.tanh(products * (plan.scale / plan.soft_cap))
    return jnp.exp2(capped * (plan.soft_cap * LOG2E) - lse), 1 - capped * capped


def times(weights: Array, slope: Array | None) -> Array:
    """P times the slope: what the gradient of the logits before their scale, dS times the slope, grows with."""
    return weights if slope is None else weights * slope
