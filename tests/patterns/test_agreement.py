"""A closed form that differs from its rule is found when a pattern is compiled."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from s2jax import LocalStride, PerHead, compile_cache, compile_schedule
from s2jax import patterns as p
from s2jax.patterns.bands import Band, all_columns
from tests.patterns.test_statistics import check_statistics

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")


@dataclasses.dataclass(frozen=True)
class Fine(p.BlockPattern):
    """A rule that is finer than blocks, in the form of a family of blocks."""

    block_size: int = 32
    causal: bool = True

    def mask_fn(self, head, query_position, key_position, heads):
        return ((query_position - key_position) % 2 == 0) & (key_position <= query_position)

    def block_bands(self, heads, head, num_rows, num_columns):
        return None


@dataclasses.dataclass(frozen=True)
class FineByJax(Fine):
    """The same, written with jax.numpy."""

    def mask_fn(self, head, query_position, key_position, heads):
        return jnp.logical_and(jnp.mod(query_position - key_position, 2) == 0, key_position <= query_position)


@dataclasses.dataclass(frozen=True)
class Diagonal(Fine):
    """Reads in the middle of blocks only, where no corner shows it."""

    def mask_fn(self, head, query_position, key_position, heads):
        return (key_position % 32 == 16) & (query_position % 32 == 17) & (key_position <= query_position)


@pytest.mark.parametrize("family", [Fine, FineByJax, Diagonal])
def test_a_rule_without_a_closed_form_is_asked_for_every_token(family):
    compositions = family() | p.Local(1, block_size=16), family() & p.Local(tokens=70)
    for pattern in (family(), *(compositions if family is not FineByJax else ())):
        schedule = compile_schedule(
            pattern, num_heads=2, num_kv_heads=1, query_length=150, kv_length=170, query_offset=9
        )
        np.testing.assert_array_equal(schedule.token_mask(), pattern.token_mask(2, 1, 150, 170, 9))
        check_statistics(pattern, p.HeadGroups(2, 1), 150)
    by_head = PerHead([family(), p.Local(2, block_size=32)])
    schedule = compile_schedule(by_head, num_heads=2, num_kv_heads=2, query_length=99, kv_length=99)
    np.testing.assert_array_equal(schedule.token_mask(), by_head.token_mask(2, 2, 99, 99))


class OtherRule(LocalStride):
    """A subclass that changes the rule alone."""

    def mask_fn(self, head, query_position, key_position, heads):
        return super().mask_fn(head, query_position, key_position, heads) & (key_position % 5 > 0)


class WiderRule(LocalStride):
    def mask_fn(self, head, query_position, key_position, heads):
        i, j = query_position // self.block_size, key_position // self.block_size
        wide = (i - j == self.local_blocks) & (key_position <= query_position)
        return super().mask_fn(head, query_position, key_position, heads) | wide


class OtherHeads(LocalStride):
    """One head of a group reads something else, but its key says that it does not."""

    def mask_fn(self, head, query_position, key_position, heads):
        read = super().mask_fn(head, query_position, key_position, heads)
        return read & (key_position > 0) if head == 1 else read


class OtherStates(p.BlockMask):
    def block_states(self, heads, head, block_size, rows, num_columns):
        return np.zeros((len(rows), num_columns), np.uint8)


@dataclasses.dataclass(frozen=True)
class LaterTokens(Fine):
    def mask_fn(self, head, query_position, key_position, heads):
        return abs(query_position - key_position) < 3


@dataclasses.dataclass(frozen=True)
class OneMore(p.Local):
    """A closed form that is off by one token."""

    def bands(self, heads, head, block_size, num_rows, num_columns):
        return (Band(all_columns(num_columns, block_size), token_low=0, token_high=self.tokens + 1),)


@dataclasses.dataclass(frozen=True)
class Numbers(Fine):
    def mask_fn(self, head, query_position, key_position, heads):
        return (query_position - key_position) % 2


WRONG = {
    "another rule": (
        OtherRule(32, 2, 4),
        "contradicts itself at query .*head 0 does not read it, its closed form reads",
    ),
    "a wider rule": (WiderRule(32, 2, 4), "head 0 reads it, its closed form does not read"),
    "another head": (OtherHeads(32, 2, 4), "head 1 does not read it, head 0, whose head_key is equal, reads"),
    "other states": (OtherStates(np.ones((1, 1024, 1024), bool), 32), "reads it, its closed form does not"),
    "later tokens": (LaterTokens(), "says that it is causal, but .*query .* read the later key"),
    "one token more": (OneMore(tokens=70), "does not read it, its closed form reads"),
    "numbers": (Numbers(), "Numbers.mask_fn must return bool, got int64"),
    "within a composition": (OtherRule(32, 2, 4) | p.FirstTokens(3), "contradicts itself"),
    "of one head": (PerHead([p.Dense(), OtherRule(32, 2, 4)]), "contradicts itself .*head 2"),
}


@pytest.mark.parametrize("length", [150, 32000])
@pytest.mark.parametrize("name", WRONG)
def test_contradictions_are_found(name, length):
    pattern, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        compile_schedule(pattern, num_heads=4, num_kv_heads=2, query_length=length, kv_length=length)
    with pytest.raises(ValueError, match=message):
        pattern.density(4, 2, length)


def test_a_cache_that_streams_looks_far_ahead():
    @dataclasses.dataclass(frozen=True)
    class Later(p.Local):
        """Reads less, late in the context."""

        def mask_fn(self, head, query_position, key_position, heads):
            read = super().mask_fn(head, query_position, key_position, heads)
            return read & ((query_position < 100_000) | (key_position % 2 == 0))

    with pytest.raises(ValueError, match="contradicts itself"):
        compile_cache(Later(2, block_size=16), num_heads=1, num_kv_heads=1)


def test_unhashable_families_are_refused():
    @dataclasses.dataclass
    class Thawed(Fine.__bases__[0]):
        block_size: int = 32
        causal: bool = True
        mask_fn = Fine.mask_fn
        block_bands = Fine.block_bands

    with pytest.raises(ValueError, match="Thawed is no pattern, as it cannot be hashed"):
        compile_schedule(Thawed(), num_heads=1, num_kv_heads=1, query_length=9, kv_length=9)
