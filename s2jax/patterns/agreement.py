"""Comparison of a pattern's closed form with its definition, `mask_fn`, on a sample of tokens."""

import math
from collections.abc import Hashable, Iterator

import numpy as np

from pallas_kernels.caching import bounded_cache
from s2jax.patterns.bands import UNBOUNDED, Band
from s2jax.patterns.checks import check_count
from s2jax.patterns.evaluation import evaluated, outside_traces
from s2jax.patterns.head_groups import HeadGroups
from s2jax.patterns.rule import Rule

CACHED_BYTES = 1 << 28
"""Bytes of patterns' masks, and of what is compiled from patterns, that each cache keeps for later calls."""

EXHAUSTIVE = 1 << 16
"""Pairs of tokens up to which all are compared."""

QUERIES, TILES = 48, 64
"""Query positions of larger inputs that are compared in each head, and pairs of blocks without a closed form."""

MOST_BANDS = 64
"""Bands of a head whose edges are compared."""


def checked_heads(pattern: Rule, num_heads: int, num_kv_heads: int, length: int) -> HeadGroups:
    """The head groups of a pattern over `length` tokens.

    Raises:
      ValueError: the pattern does not fit these heads or this length, or contradicts itself.
    """
    heads = HeadGroups(num_heads, num_kv_heads)
    check_count("length", length, at_least=1)
    pattern.check(heads, length, length, 0)
    check_agreement(pattern, heads, 0, length, length)
    return heads


@bounded_cache(512, CACHED_BYTES, lambda _: 0)
def check_agreement(pattern: Rule, heads: HeadGroups, query_start: int, query_stop: int, kv_stop: int) -> None:
    """Compares the closed form of every distinct head, and heads of one key with each other, on a sample.

    The sample is all pairs of a small input. For larger ones it is the edges of blocks, of bands and of the input at
    some queries, and random pairs, the same each time.

    Raises:
      ValueError: `mask_fn` and the closed form differ, or that of a causal pattern reads a later token.
    """
    _check(pattern, heads, query_start, query_stop, kv_stop)


@outside_traces
def _check(pattern: Rule, heads: HeadGroups, query_start: int, query_stop: int, kv_stop: int) -> None:
    size = pattern.schedule_block_size()
    shape = -(-query_stop // size), -(-kv_stop // size)
    first: dict[Hashable, tuple[int, np.ndarray, np.ndarray, np.ndarray]] = {}
    for head in range(heads.num_heads):
        key = pattern.head_key(heads, head)
        if key in first:
            other, q, k, rule = first[key]
            mine = evaluated(pattern, heads, head, q, k)
            _compare(pattern, q, k, mine, rule, f"head {head}", f"head {other}, whose head_key is equal,")
            continue
        bands = pattern.bands(heads, head, size, *shape)
        q, k = _sample(bands, size, query_start, query_stop, kv_stop)
        rule = evaluated(pattern, heads, head, q, k)
        later = rule & (k > q)
        if pattern.causal and later.any():
            at = int(np.argmax(later))
            raise ValueError(
                f"{pattern!r} says that it is causal, but through head {head} its rule lets query {q[at]} read the "
                f"later key {k[at]}; add `& (key_position <= query_position)` to the rule, or set causal=False"
            )
        if bands is not None:
            closed = _mask_by_bands(bands, size, q, k)
        else:
            closed, known = _mask_by_blocks(pattern, heads, head, size, query_stop, kv_stop, q, k)
            q, k, rule, closed = (each[known] for each in (q, k, rule, closed))
        _compare(pattern, q, k, rule, closed, f"the rule of head {head}", "its closed form")
        first[key] = head, q, k, rule


def _compare(pattern: Rule, q, k, rule: np.ndarray, closed: np.ndarray, one: str, other: str) -> None:
    wrong = rule != closed
    if wrong.any():
        at = int(np.argmax(wrong))
        verbs = ("reads", "does not read") if rule[at] else ("does not read", "reads")
        raise ValueError(
            f"{pattern!r} contradicts itself at query {q[at]}, key {k[at]}: {one} {verbs[0]} it, {other} {verbs[1]} "
            "it. `mask_fn` is the definition, decided by head and positions alone; bands, block states and head_key "
            "have to agree with it"
        )


def _mask_by_bands(bands: tuple[Band, ...], size: int, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """The mask by bands, pair by pair."""
    i, j, apart = q // size, k // size, q - k
    found = np.zeros(q.shape, bool)
    for band in bands:
        found |= (
            (band.block_low <= i - j) & (i - j < band.block_high)
            & (band.token_low <= apart) & (apart < band.token_high)
            & (k % size < band.columns[i % band.period, j])
        )  # fmt: skip
    return found


def _mask_by_blocks(pattern, heads, head, size, query_stop, kv_stop, q, k) -> tuple[np.ndarray, np.ndarray]:
    """The mask by block states and tiles at some pairs of blocks, and True where it was looked up."""
    columns = -(-kv_stop // size)
    pairs, which = np.unique(q // size * columns + k // size, return_inverse=True)
    chosen = pairs[np.linspace(0, len(pairs) - 1, min(TILES, len(pairs))).astype(int)]
    known = np.isin(pairs, chosen)[which]
    row, column = chosen // columns, chosen % columns
    rows, place = np.unique(row, return_inverse=True)
    states = pattern.block_states(heads, head, size, rows, columns)[place, column]
    tiles = np.repeat(states == 2, size * size).reshape(-1, size, size)
    partial = np.flatnonzero(states == 1)
    if len(partial):
        tiles[partial] = pattern.token_tiles(heads, head, size, row[partial], column[partial], query_stop, kv_stop)
    found = np.zeros(q.shape, bool)
    found[known] = tiles[np.searchsorted(chosen, pairs[which[known]]), q[known] % size, k[known] % size]
    return found, known


def _sample(
    bands: tuple[Band, ...] | None, size: int, query_start: int, query_stop: int, kv_stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of queries and keys, int64 [n] each."""
    rows = query_stop - query_start
    if rows * kv_stop <= EXHAUSTIVE:
        query, key = np.divmod(np.arange(rows * kv_stop), kv_stop)
        return query + query_start, key
    random = np.random.default_rng(rows * 31 + kv_stop)
    ends = np.array([0, 1, size - 1, size, rows - size, rows - 2, rows - 1])
    some = np.concatenate([ends, np.arange(2, 6) * size - 1, random.integers(0, rows, QUERIES)])
    query = query_start + np.unique(some[(some >= 0) & (some < rows)])
    key = np.concatenate(
        [np.broadcast_to(each, (len(query), 1)) for each in _keys(bands, size, query, kv_stop, random)], 1
    )
    query = np.broadcast_to(query[:, None], key.shape)
    there = (key >= 0) & (key < kv_stop)
    return query[there], key[there]


def _keys(bands, size: int, query: np.ndarray, kv_stop: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Keys to compare for every query, each int64 [n, 1] or [1, 1]; some lie outside of the input."""
    q = query[:, None]
    block = q // size
    for apart in (0, 1, 2, 3, 5, 8, size - 1, size, size + 1):
        yield q - apart
        yield q + apart
    for power in range(2, math.ceil(math.log2(kv_stop)) + 1):
        yield q - (1 << power)
        yield (block - (1 << power)) * size
    for position in (0, 1, 2, 3, 4, 7, size - 1, size, 2 * size, kv_stop - 1):
        yield np.full((1, 1), position)
    for _ in range(24):
        yield random.integers(0, kv_stop, q.shape)
        yield q - random.integers(0, 4 * size, q.shape)
    for band in (bands or ())[:MOST_BANDS]:
        for distance in (band.block_low - 1, band.block_low, band.block_high - 1, band.block_high):
            if abs(distance) < UNBOUNDED // 2:
                yield (block - distance) * size
                yield (block - distance) * size + size - 1
        for distance in (band.token_low - 1, band.token_low, band.token_high - 1, band.token_high):
            if abs(distance) < UNBOUNDED // 2:
                yield q - distance
        column = random.integers(0, band.columns.shape[1], q.shape)
        limit = band.columns[block % band.period, column]
        yield column * size + limit - 1
        yield column * size + limit
