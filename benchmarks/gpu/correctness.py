"""Outputs and gradients at real sizes against float32, by FlashAttention's rule.

No error may exceed twice that of the plain computation in the inputs' own precision, plus one rounding. The square of
128k tokens does not fit, so rows are sampled: whole blocks, and single rows between them. The cotangent is zero outside
of these rows, so dq is zero there, and dk and dv are known whole.

The rule holds in each band of positions from a power of 4 to the next: the first rows read few keys and have large
outputs and errors, and a block forgotten far down would be lost in their tolerance.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from benchmarks.gpu.implementations import RESULTS, Arrays
from s2jax.patterns import HeadGroups, Pattern

PAIRS = 1 << 26
"""Largest number of a head's logits, in float32."""

BLOCK = 64
"""Tokens of the whole blocks among the sampled rows."""

NUM_BANDS = 16


def sample_rows(length: int, kv_length: int, pairs: int = PAIRS, seed: int = 0) -> np.ndarray:
    """Ascending rows: the first block, the last, some between, and one row in each of equal intervals."""
    number = max(1, min(length, pairs // kv_length))
    if number == length:
        return np.arange(length)
    random = np.random.default_rng(seed)
    blocks = number // (4 * BLOCK)
    last = length // BLOCK - 1
    chosen = np.unique(np.append(random.integers(0, last + 1, max(blocks - 2, 0)), [0, last][:blocks]))
    whole = (chosen[:, None].astype(int) * BLOCK + np.arange(BLOCK)).reshape(-1)
    edges = np.linspace(0, length, number - len(whole) + 1).astype(int)
    return np.union1d(whole, random.integers(edges[:-1], edges[1:]))


@jax.jit
def mask_rows(rows: Int[np.ndarray, " rows"], dout: Float[Array, "b t h e"]) -> Float[Array, "b t h e"]:
    """The cotangent, zero outside of these rows."""
    kept = jnp.zeros(dout.shape[1], bool).at[rows].set(True)
    return jnp.where(kept[None, :, None, None], dout, 0)


@dataclasses.dataclass(frozen=True)
class Check:
    """The error of a result and the error allowed, at the position where their ratio is largest."""

    name: str
    error: float
    allowed: float
    position: int

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # false for NaN


def bands(positions: np.ndarray) -> np.ndarray:
    """Band numbers, the powers of 4 that positions lie above: int32."""
    return (np.log2(positions + 1) / 2).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Truth:
    """Float32 results of the sampled rows, and the errors allowed.

    Attributes:
      rows: the sampled ones.
      results: out and dquery [b, rows, h, d], dkey and dvalue [b, s, k, d]; float32.
      allowed: float32 [bands], of each result.
    """

    rows: np.ndarray
    results: dict[str, Array]
    allowed: dict[str, np.ndarray]

    def check(self, results: tuple[Array, ...], first: Float[Array, "b t h e"] | None = None) -> list[Check]:
        """Compares results [b, t, h, d], named as in `RESULTS`, for the cotangent `mask_rows(rows, dout)`.

        Args:
          results: the output alone, or with the gradients.
          first: an output known to be right; all rows are then compared with it too.
        """
        checks = []
        for name, result in zip(RESULTS, results, strict=False):
            exact, rows = self.results[name], self.rows if name in ("out", "dquery") else None
            checks.append(self._worst(name, exact, result, rows))
            if name == "out" and first is not None:
                checks.append(self._worst(name, first, result, None))
            if name == "dquery":
                checks.append(Check("dquery outside", float(_largest_outside(self.rows, result)), 0.0, -1))
        return checks

    def _worst(self, name: str, exact: Array, result: Array, rows: np.ndarray | None) -> Check:
        positions = np.arange(exact.shape[1]) if rows is None else rows
        errors = np.asarray(_errors(exact, result if rows is None else result[:, rows]))
        allowed = self.allowed[name][bands(positions)]
        worst = int(np.argmax(errors / np.maximum(allowed, 1e-30)))
        return Check(name, float(errors[worst]), float(allowed[worst]), int(positions[worst]))


@jax.jit
def _errors(exact: Float[Array, "b t h d"], result: Float[Array, "b t h d"]) -> Float[Array, " t"]:
    """The largest difference at each position; infinite for a NaN."""
    difference = jnp.abs(exact.astype(jnp.float32) - result.astype(jnp.float32))
    return jnp.where(jnp.isnan(difference), jnp.inf, difference).max((0, 2, 3))


@jax.jit
def _largest_outside(rows: Array, result: Float[Array, "b t h d"]) -> Array:
    return jnp.abs(result.at[:, rows].set(0)).max()


def compute_truth(pattern: Pattern, arrays: Arrays, pairs: int = PAIRS) -> Truth:
    """The truth of a pattern, one head at a time."""
    rows = sample_rows(arrays.query.shape[1], arrays.key.shape[1], pairs)
    with jax.enable_x64(True):  # for the bounds of patterns
        exact, plain = _float32_and_plain(pattern, arrays, rows)
    unit, allowed = float(jnp.finfo(arrays.query.dtype).eps) / 2, {}
    for name in RESULTS:
        errors, sizes = _errors(exact[name], plain[name]), _errors(exact[name], jnp.zeros_like(plain[name]))
        band = bands(rows if name in ("out", "dquery") else np.arange(arrays.key.shape[1]))
        allowed[name] = 2 * _by_band(errors, band) + unit * _by_band(sizes, band)
    return Truth(rows, exact, allowed)


def _by_band(values: Array, band: np.ndarray) -> np.ndarray:
    """The largest value in each band; a huge number where there is none."""
    largest = np.full(NUM_BANDS, -1, np.float32)
    np.maximum.at(largest, band, np.asarray(values))
    return np.where(largest < 0, 1e30, largest)


@functools.partial(jax.jit, static_argnums=0)
def _float32_and_plain(pattern: Pattern, arrays: Arrays, rows: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    """Results in float32 and in the inputs' precision; dk and dv are summed over a group in float32."""
    batch, kv_length, num_kv_heads, _ = arrays.key.shape
    heads = HeadGroups(arrays.query.shape[2], num_kv_heads)
    group = heads.num_heads // num_kv_heads
    keys = typing.cast(typing.Any, jnp.arange(kv_length)[None])

    def of_head(sequence, kv_head, head):
        mask = jnp.broadcast_to(jnp.asarray(pattern.mask_fn(head, rows[:, None], keys, heads)), (len(rows), kv_length))
        query, dout = (each[sequence, rows, head] for each in (arrays.query, arrays.dout))
        operands = query, arrays.key[sequence, :, kv_head], arrays.value[sequence, :, kv_head], dout
        return _attention(*(each.astype(jnp.float32) for each in operands), mask), _attention(*operands, mask)

    def of_kv_head(index):
        sequence, kv_head = index // num_kv_heads, index % num_kv_heads
        both = jax.lax.map(functools.partial(of_head, sequence, kv_head), kv_head * group + jnp.arange(group))
        return tuple((out, dq, _sum_group(dk), _sum_group(dv)) for out, dq, dk, dv in both)

    def arrange(results):  # [b · k, g or 1, t, d] -> [b, t, h, d]
        split = (each.reshape(batch, -1, *each.shape[2:]).swapaxes(1, 2) for each in results)
        return dict(zip(RESULTS, split, strict=True))

    exact, plain = jax.lax.map(of_kv_head, jnp.arange(batch * num_kv_heads))
    return arrange(exact), arrange(plain)


def _sum_group(gradients: Float[Array, "g s d"]) -> Float[Array, "1 s d"]:
    return gradients.astype(jnp.float32).sum(0, keepdims=True).astype(gradients.dtype)


def _attention(
    query: Float[Array, "rows d"], key: Float[Array, "s d"], value: Float[Array, "s e"],
    dout: Float[Array, "rows e"], mask: Bool[Array, "rows s"],
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """out, dq, dk and dv of one head in the inputs' own dtype, softmax(QKᵀ)V and JAX's gradient of it."""

    def plain(query, key, value):
        # Without this, GPUs multiply float32 in fewer bits.
        product = functools.partial(jnp.einsum, precision="highest")
        logits = product("td,sd->ts", query, key) * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min / 4)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        weights = jnp.where(mask, weights, jnp.zeros((), weights.dtype))
        return product("ts,se->te", weights / weights.sum(-1, keepdims=True), value)

    out, pull = jax.vjp(plain, query, key, value)
    return out, *pull(dout)
