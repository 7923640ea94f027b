"""The plain computation in the inputs' own precision, softmax(QKᵀ)V and JAX's gradient of it: it sets the tolerances.

FlashAttention's rule: a kernel may err at most twice as much as that, in the largest error of each result.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.kernels.cases import EPS, Arrays, Case
from tests.kernels.truth import Results, attention, unread


def tolerances(case: Case, given: Arrays, mask: np.ndarray) -> tuple[Results, dict[str, float]]:
    """The truth, and how far each result may be from it."""
    exact, terms, moved = attention(case, given, mask)
    found = dict(computed(case, given, mask).items())
    if case.dtype in ("bfloat16", "float16"):
        # lse is float32 by contract, whatever the inputs: the plain computation of it is in float32 too.
        found["lse"] = _float32_lse(case, given, mask)
    wide = EPS["float64" if case.dtype == "float64" else "float32"]
    allowed = {}
    for name, array in exact.items():
        # The plain computation may be exact by luck, as with one key. A kernel may still round every term of a sum
        # once, by half a unit for each of its two factors: so much of the sum without its cancellations. And it may
        # round the logits, which are computed in float32 whatever the inputs.
        precision = wide if name == "lse" else EPS[case.dtype]
        largest = (float(getattr(each, name).max(initial=0)) for each in (terms, moved))
        floor = sum(size * unit for size, unit in zip(largest, (precision, wide), strict=True))
        allowed[name] = 2 * error(array, found[name]) + floor
    return exact, allowed


def error(exact: np.ndarray, found: np.ndarray) -> float:
    """The largest absolute difference; equal infinities do not differ, a NaN does without bound."""
    found = np.asarray(found).astype(exact.dtype)
    with np.errstate(invalid="ignore"):
        difference = np.where(exact == found, 0, np.abs(exact - found))
    return float(np.where(np.isnan(difference), np.inf, difference).max(initial=0))


def computed(case: Case, given: Arrays, mask: np.ndarray) -> Results:
    """out, lse and gradients of the plain computation."""
    dead = unread(mask, case.num_kv_heads)[..., None]
    key, value = (np.where(dead, np.zeros_like(array), array) for array in (given.key, given.value))
    sinks = None if given.sinks is None else given.sinks.astype(case.dtype)
    inputs, dlse = (given.query, key, value, sinks), given.dlse.astype(case.dtype)
    found = _plain_and_gradients(case.logit_scale, case.soft_cap, inputs, mask, given.dout, dlse)
    return Results(*(None if array is None else np.asarray(array) for array in found))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _plain_and_gradients(scale, cap, inputs, mask, dout, dlse):
    results, pull = jax.vjp(functools.partial(plain, scale, cap, mask), *inputs)
    return *results, *pull((dout, dlse))


def plain(scale, cap, mask, query, key, value, sinks):
    dtype, group = query.dtype, query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, group, 2), jnp.repeat(value, group, 2)
    logits = jnp.einsum("bthd,bshd->bhts", query, key) * jnp.asarray(scale, dtype)
    if cap is not None:
        logits = jnp.asarray(cap, dtype) * jnp.tanh(logits / jnp.asarray(cap, dtype))
    # The usual finite stand-in for -inf, so that empty rows have gradients.
    logits = jnp.where(mask, logits, jnp.finfo(dtype).min / 4)
    most = logits.max(-1, keepdims=True)
    sink = None if sinks is None else sinks[None, :, None, None]
    most = jax.lax.stop_gradient(most if sink is None else jnp.maximum(most, sink))
    terms = jnp.where(mask, jnp.exp(logits - most), jnp.asarray(0, dtype))
    total = terms.sum(-1, keepdims=True)
    total = total if sink is None else total + jnp.exp(sink - most)
    reads = total > 0
    safe = jnp.where(reads, total, jnp.asarray(1, dtype))
    out = jnp.einsum("bhts,bshe->bthe", terms / safe, value)
    return out, jnp.where(reads, jnp.log(safe) + most, -jnp.inf)[..., 0]


def _float32_lse(case: Case, given: Arrays, mask: np.ndarray) -> np.ndarray:
    query, key = given.query.astype(np.float32), np.repeat(given.key.astype(np.float32), case.group, 2)
    key = np.where(np.repeat(unread(mask, case.num_kv_heads), case.group, 2)[..., None], np.float32(0), key)
    logits = np.einsum("bthd,bshd->bhts", query, key, optimize=True) * np.float32(case.logit_scale)
    if case.soft_cap is not None:
        logits = np.float32(case.soft_cap) * np.tanh(logits / np.float32(case.soft_cap))
    logits = np.where(mask, logits, -np.inf)
    if given.sinks is not None:
        sinks = np.broadcast_to(given.sinks[None, :, None, None], (*logits.shape[:3], 1))
        logits = np.concatenate([logits, sinks], -1)
    most = logits.max(-1, keepdims=True)
    safe = np.where(np.isneginf(most), np.float32(0), most)
    with np.errstate(divide="ignore"):
        return (np.log(np.exp(logits - safe).sum(-1, keepdims=True)) + safe)[..., 0]
