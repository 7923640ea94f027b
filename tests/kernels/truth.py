"""Attention by its definition, in numpy and float64; knows nothing of the code under test but who reads whom.

With l = cap · tanh(scale · q·k / cap), P = exp(l - lse), Z = Σ exp(l) + exp(sink), lse = log Z and out = P v:

    delta = Σ out · dout - dlse,     slope = 1 - (l / cap)²,      dl = slope ∘ P ∘ (dout vᵀ - delta)
    dq = scale · dl k,     dk = scale · dlᵀ q,     dv = Pᵀ dout,     dsink = -Σ exp(sink - lse) · delta

summed over the query heads of a group where a KV head's gradient is concerned. A row that reads nothing is zero.
"""

import dataclasses

import numpy as np

from tests.kernels.cases import Arrays, Case, Selected

NAMES = ("out", "lse", "dquery", "dkey", "dvalue", "dsinks")


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """What a backend computes, or the truth of it; `dsinks` is None without sinks."""

    out: np.ndarray
    lse: np.ndarray
    dquery: np.ndarray
    dkey: np.ndarray
    dvalue: np.ndarray
    dsinks: np.ndarray | None

    def items(self) -> list[tuple[str, np.ndarray]]:
        found = [(name, getattr(self, name)) for name in NAMES]
        return [(name, array) for name, array in found if array is not None]


def token_mask(case: Case, given: Arrays) -> np.ndarray:
    """Which keys every query reads: bool [b, h, t, s]."""
    mask = _selection_mask(case, given) if isinstance(case.pattern, Selected) else _pattern_mask(case)
    if given.query_segment_ids is not None:
        mask = mask & (given.query_segment_ids[:, None, :, None] == given.kv_segment_ids[:, None, None, :])
    return mask


def _pattern_mask(case: Case) -> np.ndarray:
    shape = case.num_heads, case.num_kv_heads, case.query_length, case.kv_length
    return np.stack([case.pattern.token_mask(*shape, offset) for offset in case.offset_of])


def _selection_mask(case: Case, given: Arrays) -> np.ndarray:
    chosen, position = case.pattern, np.arange(case.kv_length)
    mask = np.zeros((case.batch, case.num_heads, case.query_length, case.kv_length), bool)
    for b, h, t in np.ndindex(mask.shape[:3]):
        place = b % chosen.batch, h * chosen.heads // case.num_heads, t // chosen.query_block
        blocks = given.kv_blocks[place][: given.counts[place]]
        mask[b, h, t] = np.isin(position // chosen.block_size, blocks)
        if chosen.causal:
            mask[b, h, t] &= position <= case.offset_of[b] + t
    return mask


def unread(mask: np.ndarray, num_kv_heads: int) -> np.ndarray:
    """Keys that no query reads: bool [b, s, k]."""
    batch, _, _, length = mask.shape
    return ~mask.reshape(batch, num_kv_heads, -1, length).any(2).swapaxes(1, 2)


def attention(case: Case, given: Arrays, mask: np.ndarray) -> tuple[Results, Results, Results]:
    """The truth, and two magnitudes of every result.

    These are its sums if no two terms cancelled, and the change of such a sum when all logits change by their own size
    (a logit's rounding is a factor of its weight).

    float64 inputs are computed in what longer type the machine has, for the truth to be better than what is tested.
    """
    wide = np.longdouble if case.dtype == "float64" else np.float64
    q, k, v, dout, dlse = (getattr(given, name).astype(wide) for name in ("query", "key", "value", "dout", "dlse"))
    sinks = None if given.sinks is None else given.sinks.astype(wide)
    dead = unread(mask, case.num_kv_heads)[..., None]
    k, v = (np.repeat(np.where(dead, 0, array), case.group, 2) for array in (k, v))
    raw = _einsum("bthd,bshd->bhts", q, k) * case.logit_scale
    cap = case.soft_cap
    logits = raw if cap is None else cap * np.tanh(raw / cap)
    slope = 1 if cap is None else 1 - np.tanh(raw / cap) ** 2
    weights, lse, sink_weights = _softmax(logits, mask, sinks)
    out = _einsum("bhts,bshe->bthe", weights, v)
    delta = np.einsum("bthe,bthe->bht", out, dout) - dlse
    dlogits = weights * (_einsum("bthe,bshe->bhts", dout, v) - delta[..., None]) * slope * case.logit_scale
    found = Results(
        out, lse,
        _einsum("bhts,bshd->bthd", dlogits, k),
        _per_kv_head(case, _einsum("bhts,bthd->bshd", dlogits, q)),
        _per_kv_head(case, _einsum("bhts,bthe->bshe", weights, dout)),
        None if sinks is None else -(sink_weights * delta).sum((0, 2)),
    )  # fmt: skip
    sizes = [np.abs(array) for array in (q, k, v, dout, dlse)]
    raw = _einsum("bthd,bshd->bhts", *sizes[:2]) * abs(case.logit_scale)
    far = np.where(np.isneginf(lse), 0, np.abs(lse))
    extra = far if sinks is None else far + np.abs(sinks[None, :, None])
    return (
        found,
        _magnitudes(case, weights, sink_weights, far + (weights * raw).sum(-1), slope, *sizes),
        _magnitudes(case, weights * (raw + far[..., None]), sink_weights * extra, 0 * far, slope, *sizes),
    )


def _softmax(logits, mask, sinks):
    """The weights, lse, and the sinks' own weights."""
    logits = np.where(mask, logits, -np.inf)
    sink = -np.inf if sinks is None else sinks[None, :, None]
    most = np.maximum(logits.max(-1), sink)
    safe = np.where(np.isneginf(most), 0, most)
    terms, extra = np.exp(logits - safe[..., None]), np.exp(sink - safe)
    total = terms.sum(-1) + extra
    with np.errstate(divide="ignore"):
        lse = np.log(total) + safe
    total = np.where(total > 0, total, 1)
    return terms / total[..., None], lse, extra / total


def _magnitudes(case: Case, weights, sink_weights, lse, slope, q, k, v, dout, dlse) -> Results:
    out = _einsum("bhts,bshe->bthe", weights, v)
    delta = np.einsum("bthe,bthe->bht", out, dout) + dlse
    dlogits = weights * (_einsum("bthe,bshe->bhts", dout, v) + delta[..., None]) * slope * abs(case.logit_scale)
    return Results(
        out,
        lse,
        _einsum("bhts,bshd->bthd", dlogits, k),
        _per_kv_head(case, _einsum("bhts,bthd->bshd", dlogits, q)),
        _per_kv_head(case, _einsum("bhts,bthe->bshe", weights, dout)),
        (sink_weights * delta).sum((0, 2)) if case.sinks else None,
    )


def _per_kv_head(case: Case, gradient: np.ndarray) -> np.ndarray:
    batch, length, _, features = gradient.shape
    return gradient.reshape(batch, length, case.num_kv_heads, case.group, features).sum(3)


def _einsum(equation: str, *arrays: np.ndarray) -> np.ndarray:
    return np.einsum(equation, *arrays, optimize=arrays[0].dtype != np.longdouble)
