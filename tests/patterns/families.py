"""Random patterns, heads and lengths for the property tests."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from s2jax import patterns as p


def examples(times: int):
    """So many times the examples that a test has by default: these are quick ones."""
    return settings(max_examples=times * settings().max_examples, deadline=None)


BLOCK_SIZES = st.sampled_from([16, 32, 64])
FLAGS = st.booleans()


def extents(most: int, causal: bool, least: int = 0):
    side = st.integers(least, most)
    return side if causal else st.one_of(side, st.tuples(side, side))


@st.composite
def head_parameters(draw):
    return {
        "block_size": draw(BLOCK_SIZES),
        "head_step": draw(st.one_of(st.none(), st.integers(0, 5))),
        "head_offset": draw(st.integers(0, 5)),
        "homo_head": draw(FLAGS),
        "num_dense_heads": draw(st.sampled_from([0, 0, 1])),
        "residues": draw(st.sampled_from(["kv_head", "query_head"])),
    }


@st.composite
def ranges(draw):
    bounds = sorted(draw(st.sets(st.integers(1, 9), max_size=2)))
    strides = draw(st.lists(st.integers(1, 6), min_size=len(bounds) + 1, max_size=len(bounds) + 1))
    end = draw(st.sampled_from([None, 11]))
    return tuple(zip([*bounds, end], strides, strict=True))


@st.composite
def striped(draw):
    causal, stride = draw(FLAGS), draw(st.integers(1, 7))
    kind = draw(st.sampled_from(["LocalStride", "Strided", "Ranges", "RelativeStride"]))
    shared = {**draw(head_parameters()), "causal": causal}
    match kind:
        case "LocalStride":
            return p.LocalStride(local_blocks=draw(extents(4, causal)), vert_stride=stride, **shared)
        case "Strided":
            return p.Strided(vert_stride=stride, **shared)
        case "Ranges":
            return p.Ranges(draw(ranges()), **shared)
        case _:
            return p.RelativeStride(local_blocks=draw(extents(4, causal, least=1)), vert_stride=stride, **shared)


@st.composite
def simple(draw):
    causal = draw(FLAGS)
    kind = draw(st.sampled_from(["Dense", "blocks", "tokens", "FirstTokens", "FirstBlocks"]))
    match kind:
        case "Dense":
            return p.Dense(causal)
        case "blocks":
            return p.Local(draw(extents(4, causal)), block_size=draw(BLOCK_SIZES), causal=causal)
        case "tokens":
            return p.Local(tokens=draw(extents(150, causal)), causal=causal)
        case "FirstTokens":
            return p.FirstTokens(draw(st.integers(0, 150)), causal)
        case _:
            return p.FirstBlocks(draw(st.integers(0, 4)), draw(BLOCK_SIZES), causal)


@st.composite
def block_masks(draw, num_heads: int, length: int):
    size = draw(BLOCK_SIZES)
    n = -(-length // size) + draw(st.integers(0, 1))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    mask = random.random((draw(st.sampled_from([1, num_heads])), n, n)) < draw(st.sampled_from([0.1, 0.5, 1.0]))
    return p.BlockMask(mask, size, draw(FLAGS))


def leaves(heads: p.HeadGroups, length: int):
    return st.one_of(striped(), striped(), simple(), block_masks(heads.num_heads, length))


def per_head(inner, heads: p.HeadGroups):
    counts = st.sampled_from([heads.num_heads, heads.num_kv_heads])
    return counts.flatmap(lambda count: st.lists(inner, min_size=count, max_size=count)).map(p.PerHead)


def compositions(heads: p.HeadGroups, length: int):
    """Leaves, and `|`, `&` and PerHead of them, nested."""

    def extend(inner):
        pair = st.tuples(inner, inner)
        return st.one_of(pair.map(lambda t: t[0] | t[1]), pair.map(lambda t: t[0] & t[1]), per_head(inner, heads))

    return st.recursive(leaves(heads, length), extend, max_leaves=4)


HEADS = st.sampled_from([p.HeadGroups(1, 1), p.HeadGroups(2, 1), p.HeadGroups(4, 4), p.HeadGroups(6, 3)])


@st.composite
def cases(draw, of=compositions, longest: int = 400):
    """Draws (pattern, heads, query length, kv length, query offset)."""
    heads = draw(HEADS)
    query_length, kv_length, offset = (
        draw(st.integers(1, longest)),
        draw(st.integers(1, longest)),
        draw(st.integers(0, 99)),
    )
    return draw(of(heads, max(query_length + offset, kv_length))), heads, query_length, kv_length, offset
