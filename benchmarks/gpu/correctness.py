"""Outputs and gradients at real sizes against float32, by FlashAttention's rule.

No error may be more than twice that of the plain computation in the inputs' own precision, plus one rounding. The truth
of a whole square of 128k tokens is out of reach, but not that of some of its rows: a row of queries needs its own keys
only. The cotangent is zero but in those rows. So dq is known there and zero elsewhere, and dk and dv, which collect
what the sampled rows give, are known whole. The rows are whole blocks and single ones between them, all over the
sequence; where a square is small enough they are all rows.

The rule holds in each band of positions by itself, from a power of 4 to the next: the first rows read few keys and have
large outputs and errors, and a block forgotten at the end of a long sequence would be lost in their tolerance.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gpu.sides import Arrays
from s2jax.patterns import Heads, Pattern

NAMES = ("out", "dquery", "dkey", "dvalue")
PAIRS = 1 << 26
"""Logits held at once, in float32."""

BLOCK = 64
"""Whole blocks among the sampled rows."""


def sample_rows(length: int, kv_length: int, pairs: int = PAIRS, seed: int = 0) -> np.ndarray:
    """Ascending rows: the first and the last block and some between, and one row in each of equal stretches."""
    number = max(1, min(length, pairs // kv_length))
    if number == length:
        return np.arange(length)
    random = np.random.default_rng(seed)
    blocks = number // (4 * BLOCK)
    last = length // BLOCK - 1
    chosen = np.unique(np.append(random.integers(0, last + 1, max(blocks - 2, 0)), [0, last][:blocks]))
    whole = (chosen[:, None].astype(int) * BLOCK + np.arange(BLOCK)).reshape(-1)
    edges = np.linspace(0, length, number - len(whole) + 1).astype(int)
    single = random.integers(edges[:-1], edges[1:])
    return np.unique(np.concatenate([whole, single]))


def only(rows: np.ndarray, dout: Float[Array, "b t h e"]) -> Float[Array, "b t h e"]:
    """The cotangent, zero but in these rows."""
    kept = jnp.zeros(dout.shape[1], bool).at[rows].set(True)
    return jnp.where(kept[None, :, None, None], dout, 0)


@dataclasses.dataclass(frozen=True)
class Check:
    """How far a result is from the truth, and how far it may be, in the band of positions where it does worst."""

    name: str
    error: float
    allowed: float
    band: str

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # false for NaN


def bands(positions: np.ndarray) -> np.ndarray:
    """Which power of 4 a position lies above: int32."""
    return (np.log2(positions + 1) / 2).astype(np.int32)


@functools.partial(jax.jit, static_argnums=3)
def _errors(exact: Array, found: Array, which: Array, number: int) -> Array:
    """The largest difference in each band; a NaN differs without bound. Positions are the first axis."""
    difference = jnp.abs(exact - found.astype(jnp.float32))
    by_position = jnp.where(jnp.isnan(difference), jnp.inf, difference).max(range(1, difference.ndim))
    return jnp.zeros(number, jnp.float32).at[which].max(by_position)


@dataclasses.dataclass(frozen=True)
class Truth:
    """Float32 results of the sampled rows, and what errors the plain computation's allow.

    Attributes:
      rows: the sampled ones.
      results: out and dq [rows, b·h, d], dk and dv [s, b·k, d]; float32.
      allowed: float32 [bands], of each result.
    """

    rows: np.ndarray
    results: dict[str, Array]
    allowed: dict[str, np.ndarray]

    def check(self, found: tuple[Array, ...]) -> list[Check]:
        """Compares out [b, t, h, d], and dq, dk and dv if they are there, given `only(rows, dout)`."""
        checks = []
        for name, array in zip(NAMES, found, strict=False):
            of_rows = name in ("out", "dquery")
            exact, allowed = self.results[name], self.allowed[name]
            compared = array[:, self.rows] if of_rows else array
            compared = compared.swapaxes(0, 1).reshape(exact.shape)
            positions = self.rows if of_rows else np.arange(len(exact))
            errors = np.asarray(_errors(exact, compared, jnp.asarray(bands(positions)), len(allowed)))
            worst = int(np.argmax(np.nan_to_num(errors / np.maximum(allowed, 1e-30), nan=np.inf)))
            band = f"{4**worst - 1} to {4 ** (worst + 1) - 2}"
            checks.append(Check(name, float(errors[worst]), float(allowed[worst]), band))
            if name == "dquery":
                # Rows without a cotangent have no gradient.
                rest = float(jnp.abs(array.at[:, self.rows].set(0)).max())
                checks.append(Check("dquery elsewhere", rest, 0.0, "unsampled"))
        return checks


def truth(pattern: Pattern, arrays: Arrays, pairs: int = PAIRS) -> Truth:
    """The truth of a pattern, one sequence and KV head at a time."""
    batch, length, num_heads, _ = arrays.query.shape
    kv_length, num_kv_heads = arrays.key.shape[1:3]
    heads, group = Heads(num_heads, num_kv_heads), num_heads // num_kv_heads
    rows = sample_rows(length, kv_length, pairs)
    exact: dict[str, list[Array]] = {name: [] for name in NAMES}
    errors: dict[str, list[Array]] = {name: [] for name in NAMES}
    sizes: dict[str, list[Array]] = {name: [] for name in NAMES}
    of_rows, of_keys = ((jnp.asarray(bands(each)), int(bands(each).max()) + 1) for each in (rows, np.arange(kv_length)))
    which = dict(zip(NAMES, (of_rows, of_rows, of_keys, of_keys), strict=True))
    for sequence, kv_head in itertools.product(range(batch), range(num_kv_heads)):
        members = range(kv_head * group, (kv_head + 1) * group)
        key, value = (array[sequence, :, kv_head] for array in (arrays.key, arrays.value))
        wide, plain = [], []
        for head in members:
            mask = _mask(pattern, heads, head, rows, kv_length)
            operands = arrays.query[sequence, rows, head], key, value, arrays.dout[sequence, rows, head]
            wide.append(_attention(*(each.astype(jnp.float32) for each in operands), mask))
            plain.append(_attention(*operands, mask))
        found, coarse = _of_group(wide), _of_group(plain)
        for name in NAMES:
            exact[name].append(found[name])
            rounded = coarse[name].astype(arrays.query.dtype)
            errors[name].append(_errors(found[name], rounded, *which[name]))
            sizes[name].append(_errors(found[name], jnp.zeros_like(rounded), *which[name]))
    unit = float(jnp.finfo(arrays.query.dtype).eps) / 2
    allowed = {
        name: np.asarray(2 * jnp.stack(errors[name]).max(0) + unit * jnp.stack(sizes[name]).max(0)) for name in NAMES
    }
    return Truth(rows, {name: jnp.concatenate(exact.pop(name), 1) for name in NAMES}, allowed)


def _mask(pattern: Pattern, heads: Heads, head: int, rows: np.ndarray, kv_length: int) -> Bool[Array, "rows s"]:
    """The pattern's definition, computed where the arrays are; its bounds need 64 bits."""
    with jax.enable_x64(True):
        read = pattern.reads(heads, head, jnp.asarray(rows)[:, None], jnp.arange(kv_length)[None])
        return jnp.broadcast_to(jnp.asarray(read), (len(rows), kv_length))


def _of_group(found: list[tuple[Array, ...]]) -> dict[str, Array]:
    """Out and dq of the heads of a group, dk and dv summed over it in float32: each [rows or s, heads, d]."""
    out, dquery, dkey, dvalue = zip(*found, strict=True)
    together = {"out": jnp.stack(out, 1), "dquery": jnp.stack(dquery, 1)}
    for name, parts in (("dkey", dkey), ("dvalue", dvalue)):
        together[name] = functools.reduce(jnp.add, (part.astype(jnp.float32) for part in parts))[:, None]
    return together


@jax.jit
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
