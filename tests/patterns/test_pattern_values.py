"""Patterns as values: equality, hashing, repr, algebra; and bad input."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2jax import patterns as p
from s2jax.patterns import *  # noqa: F403 (what `repr` writes is evaluated)
from tests.patterns.families import compositions, examples, simple, striped

EYE = np.eye(4, dtype=bool)[None]


def mask_of(pattern):
    return pattern.token_mask(4, 2, 300, 280, 13)


ANY = compositions(p.HeadGroups(4, 2), 320)


@examples(2)
@given(ANY, ANY, ANY)
def test_algebra_of_token_masks(a, b, c):
    np.testing.assert_array_equal(mask_of(a | b), mask_of(a) | mask_of(b))
    np.testing.assert_array_equal(mask_of(a & b), mask_of(a) & mask_of(b))
    assert (a | b) | c == a | (b | c)
    assert (a & b) & c == a & (b & c)
    assert a | a == a == a & a
    np.testing.assert_array_equal(mask_of(a & (b | c)), mask_of(a & b | a & c))
    np.testing.assert_array_equal(mask_of(a | p.Dense(causal=False)), np.ones((4, 300, 280), bool))


@examples(2)
@given(st.one_of(simple(), striped()), st.one_of(simple(), striped()))
def test_equal_values_are_equal_and_repr_says_them(a, b):
    twin = dataclasses.replace(a)
    assert twin == a
    assert hash(twin) == hash(a)
    for pattern in (a, a | b, a & b, p.PerHead([a, b]), (a | b) & a):
        assert eval(repr(pattern)) == pattern
    if a != b:
        assert len({a, b, twin}) == 2


@examples(2)
@given(ANY)
def test_causal_patterns_read_nothing_later(pattern):
    if pattern.causal:
        later = np.arange(280) > 13 + np.arange(300)[:, None]
        assert not (mask_of(pattern) & later).any()


def test_repr_is_short():
    assert repr(p.LocalStride()) == "LocalStride(block_size=64, local_blocks=16, vert_stride=8)"
    assert (
        repr(p.Local(tokens=9) | p.Dense() & p.FirstTokens(2)) == "Local(tokens=9) | (Dense() & FirstTokens(count=2))"
    )


def test_patterns_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.LocalStride().block_size = 32


def test_block_mask_goes_by_content_and_cannot_change():
    source = EYE.copy()
    pattern, twin = p.BlockMask(source), p.BlockMask(EYE)
    before = hash(pattern)
    source[:] = True
    assert pattern == twin
    assert hash(pattern) == before == hash(twin)
    for change in ({"mask": source}, {"block_size": 32}, {"causal": False}):
        assert dataclasses.replace(pattern, **change) != pattern
    with pytest.raises(ValueError, match="read-only"):
        pattern.mask[0, 0, 0] = False
    with pytest.raises(ValueError, match="WRITEABLE"):
        pattern.mask.setflags(write=True)


def test_block_mask_reads_nothing_beyond_itself():
    pattern = p.BlockMask(np.ones((1, 2, 2), bool), 16, causal=False)
    position = np.array([0, 31, 32, 999])
    read = pattern.mask_fn(0, position[:, None], position, p.HeadGroups(1, 1))
    np.testing.assert_array_equal(read, (position < 32)[:, None] & (position < 32))


def test_per_head_gives_each_query_head_or_each_group_its_own():
    parts = [p.FirstTokens(1), p.FirstTokens(2), p.FirstTokens(3)]
    by_kv_head = p.PerHead(parts).token_mask(6, 3, 9, 9)[:, 8].sum(1)
    np.testing.assert_array_equal(by_kv_head, [1, 1, 2, 2, 3, 3])
    by_query_head = p.PerHead(parts + parts).token_mask(6, 3, 9, 9)[:, 8].sum(1)
    np.testing.assert_array_equal(by_query_head, [1, 2, 3, 1, 2, 3])


def test_causality_of_compositions():
    both = p.Dense(causal=False)
    assert (both & p.Dense()).causal
    assert not (both | p.Dense()).causal
    assert not p.PerHead([both, p.Dense()]).causal


def test_composition_takes_the_smallest_block():
    assert (p.LocalStride(64) | p.LocalStride(16) | p.FirstTokens(3)).schedule_block_size() == 16
    assert (p.Local(tokens=3) & p.Dense()).own_block_size() is None
    assert p.PerHead([p.LocalStride(128), p.Strided(32)]).schedule_block_size() == 32


BAD = {
    "block size 48": (lambda: p.LocalStride(48), "power of two from 16.*got 48"),
    "block size 8": (lambda: p.FirstBlocks(1, 8), "power of two from 16.*got 8"),
    "block size 64.0": (lambda: p.BlockMask(EYE, 64.0), "power of two from 16.*got 64.0"),
    "block size of Local": (lambda: p.Local(4, 24), "power of two from 16.*got 24"),
    "negative window": (lambda: p.LocalStride(local_blocks=-1), "local_blocks .* at least 0, got -1"),
    "fractional window": (lambda: p.LocalStride(local_blocks=1.5), "local_blocks must be an integer.*got 1.5"),
    "True as a count": (lambda: p.FirstTokens(True), "count must be an integer.*got True"),
    "negative tokens": (lambda: p.Local(tokens=-3), "tokens .* at least 0, got -3"),
    "stride 0": (lambda: p.Strided(vert_stride=0), "vert_stride .* at least 1, got 0"),
    "stride 0 in a range": (lambda: p.Ranges(((2, 1), (None, 0))), "stride .* at least 1, got 0"),
    "bound 0": (lambda: p.Ranges(((0, 1), (None, 2))), "bound .* at least 1, got 0"),
    "bounds fall": (lambda: p.Ranges(((4, 1), (2, 2))), "ascending.*got"),
    "None not last": (lambda: p.Ranges(((None, 1), (2, 2))), "None only as the last.*got"),
    "no ranges": (lambda: p.Ranges(()), "pairs of .*got"),
    "not ranges": (lambda: p.Ranges(3), "pairs of .*got 3"),
    "not pairs": (lambda: p.Ranges((2, 1)), "pairs of .*got"),
    "causal right side": (lambda: p.Local((2, 2)), "left side only.*got \\(2, 2\\)"),
    "three sides": (lambda: p.Local((2, 2, 2), causal=False), "pair .*got"),
    "both units": (lambda: p.Local(2, tokens=2), "either blocks or tokens, got blocks=2, tokens=2"),
    "no units": (lambda: p.Local(), "either blocks or tokens"),
    "tokens with blocks": (lambda: p.Local(tokens=3, block_size=64), "no blocks, got block_size=64"),
    "relative without own block": (lambda: p.RelativeStride(local_blocks=0), "local_blocks .* at least 1, got 0"),
    "residues": (lambda: p.LocalStride(residues="head"), "residues must be .*got 'head'"),
    "head step": (lambda: p.LocalStride(head_step=-1), "head_step .* at least 0, got -1"),
    "head offset": (lambda: p.LocalStride(head_offset=0.5), "head_offset .*got 0.5"),
    "dense heads": (lambda: p.LocalStride(num_dense_heads=-1), "num_dense_heads .* at least 0, got -1"),
    "causal": (lambda: p.Dense(causal=1), "causal must be True or False, got 1"),
    "homo head": (lambda: p.LocalStride(homo_head=None), "homo_head must be True or False, got None"),
    "mask of int": (lambda: p.BlockMask(EYE.astype(int)), "bool .*got int64"),
    "flat mask": (lambda: p.BlockMask(EYE[0]), "bool .*got bool \\[4, 4\\]"),
    "oblong mask": (lambda: p.BlockMask(EYE[:, :3]), "bool .*got bool \\[1, 3, 4\\]"),
    "no patterns": (lambda: p.PerHead([]), "list of patterns.*got \\[\\]"),
    "not patterns": (lambda: p.PerHead([p.Dense(), 3]), "list of patterns.*got"),
    "too many dense heads": (lambda: p.LocalStride(num_dense_heads=3).density(4, 2, 99), "at most 2, got 3"),
    "mask too short": (lambda: p.BlockMask(EYE).density(4, 2, 257), "reaches 256 tokens.*at least 257"),
    "mask short of the offset": (lambda: p.BlockMask(EYE).token_mask(4, 2, 9, 9, 250), "at least 259"),
    "mask for other heads": (lambda: p.BlockMask(np.repeat(EYE, 3, 0)).density(4, 2, 9), "3 heads, got 4"),
    "per head for other heads": (lambda: p.PerHead([p.Dense()] * 3).density(4, 2, 9), "3 patterns: expected"),
    "within a composition": (lambda: (p.Dense() & p.BlockMask(EYE)).density(4, 2, 999), "reaches 256 tokens"),
    "groups": (lambda: p.Dense().density(4, 3, 9), "multiple of num_kv_heads, got 4 and 3"),
    "no heads": (lambda: p.Dense().density(0, 1, 9), "num_heads .* at least 1, got 0"),
    "no length": (lambda: p.Dense().density(1, 1, 0), "length .* at least 1, got 0"),
    "blocks too large": (lambda: p.LocalStride(32).bands(p.HeadGroups(1, 1), 0, 64, 4, 4), "blocks of 64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_was_expected_and_what_came(name):
    make, text = BAD[name]
    with pytest.raises(ValueError, match=text):
        make()


def test_only_patterns_compose():
    with pytest.raises(TypeError, match=r"joins two patterns: pattern must be .*got int 3"):
        p.Dense() | 3
