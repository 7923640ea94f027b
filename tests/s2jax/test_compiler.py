"""Schedules against the patterns that they were compiled from, their transposes and their tiles."""

import numpy as np
import pytest
from hypothesis import given

from pallas_kernels.schedule import NOTHING, WHOLE, BlockLists, BlockSchedule
from pallas_kernels.tiling import Tiles, group_consecutive_rows, group_similar_rows, merge
from s2jax import BlockMask, Dense, FirstTokens, Local, LocalStride, PerHead, Ranges, compile_schedule
from s2jax import patterns as p
from s2jax.patterns import Pattern
from tests.kernels.cases import CASES
from tests.patterns.families import cases, examples

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")


def compiled(pattern, heads=(4, 2), query_length=150, kv_length=150, query_offset=0) -> BlockSchedule:
    return compile_schedule(
        pattern, num_heads=heads[0], num_kv_heads=heads[1],
        query_length=query_length, kv_length=kv_length, query_offset=query_offset,
    )  # fmt: skip


def compiled_case(case) -> BlockSchedule:
    pattern, heads, query_length, kv_length, offset = case
    return compiled(pattern, (heads.num_heads, heads.num_kv_heads), query_length, kv_length, offset)


def written_out(lists: BlockLists, num_columns: int) -> np.ndarray:
    """The mask id of every row and block: int [walkers, rows, blocks]; fails where a row has a block twice."""
    dense = np.full((lists.num_unique_heads, lists.num_rows, num_columns), NOTHING)
    seen = np.zeros(dense.shape, bool)
    for unique_head in range(lists.num_unique_heads):
        row, position = lists.entries(unique_head)
        blocks = lists.blocks[position]
        np.testing.assert_array_less(blocks, num_columns)
        places = np.stack([row, blocks])
        assert len(np.unique(places, axis=1).T) == len(row), "a row walks a block twice"
        dense[unique_head, row, blocks] = lists.mask_ids[position]
        seen[unique_head, row, blocks] = True
    assert ((dense != NOTHING) == seen).all(), "an entry that reads nothing"
    return dense


def assert_parts_are_what_they_say(lists: BlockLists) -> None:
    """The full parts hold entries without a mask only; every slice lies within one list, which is ascending."""
    for unique_head in range(lists.num_unique_heads):
        for part in range(lists.ranges.shape[2]):
            _, position = lists.entries(unique_head, slice(part, part + 1))
            if part < lists.num_full_ranges:
                assert (lists.mask_ids[position] == WHOLE).all(), "a masked entry in a full part"
    starts, stops = (lists.ranges[..., end][lists.ranges[..., 1] > lists.ranges[..., 0]] for end in (0, 1))
    which = np.searchsorted(lists.offsets, starts, side="right") - 1
    assert (stops <= lists.offsets[which + 1]).all(), "a slice that runs into the next list"
    for low, high in np.unique(np.stack([starts, stops], 1), axis=0):
        assert (np.diff(lists.blocks[low:high]) > 0).all(), "blocks that do not ascend"


# What a schedule reads.


@examples(3)
@given(cases())
def test_a_schedule_reads_what_its_pattern_reads(case):
    pattern, heads, query_length, kv_length, offset = case
    schedule = compiled_case(case)
    mask = pattern.token_mask(heads.num_heads, heads.num_kv_heads, query_length, kv_length, offset)
    np.testing.assert_array_equal(schedule.token_mask(), mask)
    assert_parts_are_what_they_say(schedule.lists)
    written_out(schedule.lists, schedule.num_columns)


@pytest.mark.parametrize(
    "case", [each for each in CASES if isinstance(each.pattern, Pattern)], ids=lambda each: each.name
)
def test_a_schedule_of_the_case_table(case):
    offset = case.offset_of[0]
    shape = case.num_heads, case.num_kv_heads, case.query_length, case.kv_length, offset
    schedule = compiled(case.pattern, shape[:2], *shape[2:])
    np.testing.assert_array_equal(schedule.token_mask(), case.pattern.token_mask(*shape))


@examples(3)
@given(cases())
def test_token_masks_are_distinct(case):
    masks = compiled_case(case).token_masks
    assert masks[WHOLE].all()
    assert not masks[NOTHING].any()
    assert len(np.unique(masks.reshape(len(masks), -1), axis=0)) == len(masks)


@pytest.mark.parametrize(
    ("pattern", "share"),
    [
        (Dense(causal=False), 0),  # nothing needs a mask
        (LocalStride(16, (2, 2), 3, causal=False), 0),
        (BlockMask(np.tri(10, dtype=bool)[None], 16, causal=False), 0),
        (Dense(), 1),  # the diagonal does, one block a row
        (LocalStride(16, 2, 3), 1),
        (Ranges(((2, 1), (None, 3)), 16), 1),
        (BlockMask(np.ones((1, 10, 10), bool), 16), 1),
    ],
    ids=repr,
)
def test_full_entries_carry_no_mask(pattern, share):
    lists = compiled(pattern, query_length=160, kv_length=160).lists
    assert (lists.counts()[..., 1] == share).all()


def test_the_ends_of_the_keys_need_no_mask():
    """What a block has beyond the keys is cut off by position, not by a mask."""
    assert not compiled(Dense(causal=False), kv_length=77).lists.counts()[..., 1].any()


def test_heads_that_read_alike_share_a_walker():
    schedule = compiled(LocalStride(16, 1, 4, homo_head=True), (8, 4))
    assert schedule.lists.num_unique_heads == 1
    assert not schedule.head_index.any()
    schedule = compiled(LocalStride(16, 1, 4), (8, 4))
    assert schedule.head_index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert schedule.shares_groups
    assert not compiled(LocalStride(16, 1, 8, residues="query_head"), (8, 4)).shares_groups


def test_equal_lists_are_stored_once():
    """The window's list of all blocks is one for all heads."""
    few, many = (compiled(LocalStride(16, 2, 1 << 10), (count, count), 1600, 1600).lists for count in (1, 16))
    assert len(many.blocks) <= len(few.blocks) + 16 * 2


def test_schedules_are_cached():
    first = compiled(LocalStride(16, 2, 3) | FirstTokens(4))
    assert compiled(LocalStride(16, 2, 3) | FirstTokens(4)) is first
    assert compiled(LocalStride(16, 2, 4) | FirstTokens(4)) is not first
    assert first.transposed is first.transposed


def test_query_offsets_cut_rows():
    schedule = compiled(LocalStride(16, 2, 3), query_length=20, kv_length=100, query_offset=39)
    assert (schedule.first_row, schedule.lists.num_rows) == (2, 2)  # the blocks 32 … 47 and 48 … 63


# The same from the keys.


@examples(3)
@given(cases())
def test_transposed_lists_hold_the_same_entries(case):
    schedule = compiled_case(case)
    forward = written_out(schedule.lists, schedule.num_columns)
    backward = written_out(schedule.transposed, schedule.lists.num_rows)
    np.testing.assert_array_equal(backward, forward.swapaxes(1, 2))
    assert_parts_are_what_they_say(schedule.transposed)


@pytest.mark.parametrize("pattern", [LocalStride(16, 2, 8), Ranges(((2, 1), (8, 4), (None, 8)), 16)], ids=repr)
def test_transposed_lists_stay_small(pattern):
    """Stripes and windows are read by intervals of rows: O(n) as they are, where entries are O(n²)."""
    sizes = [compiled(pattern, (4, 4), n, n).transposed.nbytes for n in (1600, 3200)]
    assert sizes[1] <= 2.1 * sizes[0]


# Tiles.


def assert_merged(lists: BlockLists, tiles: Tiles, num_columns: int) -> None:
    """Every row of every tile gets what it got alone."""
    alone, merged = written_out(lists, num_columns), written_out(tiles.lists, num_columns)
    assert_parts_are_what_they_say(tiles.lists)
    assert (tiles.tile_masks[WHOLE] == WHOLE).all()
    assert (tiles.tile_masks[NOTHING] == NOTHING).all()
    for unique_head, tile, row in np.argwhere(tiles.members >= 0):
        found = tiles.tile_masks[merged[unique_head, tile], row]
        np.testing.assert_array_equal(found, alone[unique_head, tiles.members[unique_head, tile, row]])


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@examples(3)
@given(case=cases(longest=250))
def test_merged_neighbours_read_what_each_reads(case, size):
    schedule = compiled_case(case)
    lists = schedule.lists
    members = group_consecutive_rows(lists.num_unique_heads, lists.num_rows, size)
    assert (members.max(), len(np.unique(members[0][members[0] >= 0]))) == (lists.num_rows - 1, lists.num_rows)
    assert_merged(lists, merge(lists, members), schedule.num_columns)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@examples(3)
@given(case=cases(longest=250))
def test_merged_packs_read_what_each_reads(case, size):
    schedule = compiled_case(case)
    lists, rows = schedule.transposed, schedule.lists.num_rows
    members = group_similar_rows(lists, size)
    busy = (lists.counts() > 0).any(-1)
    for unique_head in range(lists.num_unique_heads):
        found = members[unique_head][members[unique_head] >= 0]
        np.testing.assert_array_equal(np.sort(found), np.flatnonzero(busy[unique_head]))
    assert_merged(lists, merge(lists, members), rows)


def test_executed_blocks_count_whole_steps():
    """Five blocks walked two at a time by tiles of three rows are three steps of six pairs."""
    schedule = compiled(Dense(causal=False), (1, 1), 48, 80)
    tiles = merge(schedule.lists, group_consecutive_rows(1, 1, 3))
    assert schedule.block_size == 64
    assert tiles.executed_blocks(2).tolist() == [1 * 2 * 3]
    schedule = compiled(Local((9, 9), block_size=16, causal=False), (1, 1), 48, 80)
    assert merge(schedule.lists, group_consecutive_rows(1, 3, 3)).executed_blocks(2).tolist() == [3 * 2 * 3]


# What does not fit.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_length": 0}, "query_length must be an integer of at least 1, got 0"),
        ({"kv_length": -3}, "kv_length must be an integer of at least 1, got -3"),
        ({"kv_length": 2.5}, "kv_length must be an integer of at least 1, got 2.5"),
        ({"query_offset": -1}, "query_offset must be an integer of at least 0, got -1"),
        ({"heads": (4, 3)}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"heads": (0, 1)}, "num_heads must be an integer of at least 1, got 0"),
        ({"heads": (2, True)}, "num_kv_heads must be an integer of at least 1, got True"),
        ({"pattern": BlockMask(np.ones((1, 2, 2), bool), 64)}, "reaches 128 tokens .* expected at least 150"),
        ({"pattern": BlockMask(np.ones((3, 9, 9), bool), 64)}, "is for 3 heads, got 4 query heads"),
        ({"pattern": PerHead([Dense()] * 3)}, "PerHead has 3 patterns: expected one for each of 4 query heads or 2 KV"),
        ({"pattern": LocalStride(num_dense_heads=3)}, "num_dense_heads counts KV heads: expected at most 2, got 3"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        compiled(**{"pattern": Dense(), **arguments})


def test_incomplete_patterns_warn_with_the_share():
    with pytest.warns(p.PatternWarning, match="together read 50% of the context"):
        compiled(LocalStride(16, 1, 16), (8, 8), 1 << 15, 1 << 15)
