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
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from benchmarks.gpu.sides import RESULTS, Arrays
from s2jax.patterns import HeadGroups, Pattern

NAMES = RESULTS["forward + backward"]
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


@jax.jit
def only(rows: Int[np.ndarray, " rows"], dout: Float[Array, "b t h e"]) -> Float[Array, "b t h e"]:
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


def _errors(exact: Array, found: Array, which: Array, number: int) -> Array:
    """The largest difference in each band; a NaN differs without bound. Positions are the first axis."""
    difference = jnp.abs(exact - found.astype(jnp.float32))
    by_position = jnp.where(jnp.isnan(difference), jnp.inf, difference).max(range(1, difference.ndim))
    return jnp.zeros(number, jnp.float32).at[which].max(by_position)


@functools.partial(jax.jit, static_argnums=4)
def _errors_in(exact: Array, found: Float[Array, "b t h d"], positions: Array, which: Array, number: int) -> Array:
    """Of a whole result, at some positions."""
    return _errors(exact, found[:, positions].swapaxes(0, 1).reshape(exact.shape), which, number)


@jax.jit
def _largest_but_in(rows: Array, found: Float[Array, "b t h d"]) -> Array:
    return jnp.abs(found.at[:, rows].set(0)).max()


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

    def check(self, found: tuple[Array, ...], names: tuple[str, ...] = NAMES) -> list[Check]:
        """Compares results [b, t, h, d] of these names, as many as there are, given `only(rows, dout)`."""
        checks = []
        for name, array in zip(names, found, strict=False):
            exact = self.results[name]
            positions = self.rows if name in ("out", "dquery") else np.arange(len(exact))
            checks.append(self._worst(name, exact, array, positions))
            if name == "dquery":
                # Rows without a cotangent have no gradient.
                checks.append(Check("dquery elsewhere", float(_largest_but_in(self.rows, array)), 0.0, "unsampled"))
        return checks

    def alike(self, one: Float[Array, "b t h e"], other: Float[Array, "b t h e"]) -> Check:
        """Compares two outputs with each other, in all rows: they may differ as much as one of them may be wrong."""
        exact = one.astype(jnp.float32).swapaxes(0, 1)
        return self._worst("out", exact, other, np.arange(one.shape[1]))

    def _worst(self, name: str, exact: Array, found: Array, positions: np.ndarray) -> Check:
        allowed = self.allowed[name]
        errors = np.asarray(_errors_in(exact, found, positions, bands(positions), len(allowed)))
        worst = int(np.argmax(errors / np.maximum(allowed, 1e-30)))
        return Check(name, float(errors[worst]), float(allowed[worst]), f"{4**worst - 1} to {4 ** (worst + 1) - 2}")


def truth(pattern: Pattern, arrays: Arrays, pairs: int = PAIRS) -> Truth:
    """The truth of a pattern, one sequence and KV head at a time."""
    batch, length, num_heads, _ = arrays.query.shape
    kv_length, num_kv_heads = arrays.key.shape[1:3]
    heads, group = HeadGroups(num_heads, num_kv_heads), num_heads // num_kv_heads
    rows = sample_rows(length, kv_length, pairs)
    bands_of_rows, bands_of_keys = bands(rows), bands(np.arange(kv_length))
    found, errors = [], []
    for sequence, kv_head in itertools.product(range(batch), range(num_kv_heads)):
        pairs_of_group = []
        for head in range(kv_head * group, (kv_head + 1) * group):
            mask = _mask(pattern, heads, kv_length, head, rows)
            pairs_of_group.append(_both(arrays, mask, rows, sequence, head, kv_head))
        exact, *sizes = _of_group(pairs_of_group, bands_of_rows, bands_of_keys, _number(rows), _number([kv_length - 1]))
        found.append(exact)
        errors.append(sizes)
    unit = float(jnp.finfo(arrays.query.dtype).eps) / 2
    allowed = {}
    for name in NAMES:
        of_plain, sizes = (np.max([np.asarray(each[kind][name]) for each in errors], 0) for kind in (0, 1))
        allowed[name] = 2 * of_plain + unit * sizes
    return Truth(rows, _together(found), allowed)


def _number(positions) -> int:
    return int(bands(np.asarray(positions)).max()) + 1


def _mask(pattern: Pattern, heads: HeadGroups, kv_length: int, head: int, rows: np.ndarray) -> Bool[Array, "rows s"]:
    """The pattern's definition, computed where the arrays are; its bounds need 64 bits."""
    with jax.enable_x64(True):
        return _reads(pattern, heads, kv_length, head, rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _reads(pattern: Pattern, heads: HeadGroups, kv_length: int, head: typing.Any, rows: typing.Any) -> Array:
    """The head is traced: one compilation does for all."""
    read = pattern.mask_fn(head, rows[:, None], typing.cast(typing.Any, jnp.arange(kv_length)[None]), heads)
    return jnp.broadcast_to(jnp.asarray(read), (len(rows), kv_length))


@jax.jit
def _both(arrays: Arrays, mask: Array, rows: Array, sequence: int, head: int, kv_head: int):
    """Results of one head in float32, and in the inputs' own precision."""
    operands = (
        arrays.query[sequence, rows, head], arrays.key[sequence, :, kv_head],
        arrays.value[sequence, :, kv_head], arrays.dout[sequence, rows, head],
    )  # fmt: skip
    return _attention(*(each.astype(jnp.float32) for each in operands), mask), _attention(*operands, mask)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _of_group(found: list, bands_of_rows: Array, bands_of_keys: Array, row_bands: int, key_bands: int):
    """The float32 results of a group's heads, each [rows or s, heads, d]; by band, how far the plain ones are from
    them, and how large they are. dk and dv are summed over the group in float32.
    """
    exact, errors, sizes = {}, {}, {}
    for place, name in enumerate(NAMES):
        wide, plain = ([each[kind][place] for each in found] for kind in (0, 1))
        dtype = plain[0].dtype
        if name in ("out", "dquery"):
            exact[name], rounded, where = jnp.stack(wide, 1), jnp.stack(plain, 1), (bands_of_rows, row_bands)
        else:
            exact[name] = functools.reduce(jnp.add, wide)[:, None]
            rounded = functools.reduce(jnp.add, (each.astype(jnp.float32) for each in plain)).astype(dtype)[:, None]
            where = bands_of_keys, key_bands
        errors[name] = _errors(exact[name], rounded, *where)
        sizes[name] = _errors(exact[name], jnp.zeros_like(rounded), *where)
    return exact, errors, sizes


@jax.jit
def _together(found: list[dict[str, Array]]) -> dict[str, Array]:
    return {name: jnp.concatenate([each[name] for each in found], 1) for name in NAMES}


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
