"""What a cache keeps of which block, against the token mask written out."""

import numpy as np
import pytest

from s2jax import (
    BlockMask,
    Dense,
    FirstBlocks,
    FirstTokens,
    Local,
    LocalStride,
    PerHead,
    Ranges,
    Strided,
    compile_cache,
)
from s2jax.cache.layout import forget_layouts

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")

MASK = BlockMask(np.random.default_rng(1).random((4, 13, 13)) < 0.4, 16)
PATTERNS = [
    Dense(),
    LocalStride(16, 2, 3),
    LocalStride(16, 1, 4, 1, 1, residues="query_head"),
    LocalStride(16, 2, 4, num_dense_heads=1),
    LocalStride(16, 0, 4, head_offset=1),
    Ranges(((2, 1), (None, 3)), 16),
    Ranges(((2, 2), (None, 3)), 16),
    FirstTokens(5) | Local(tokens=18) | FirstBlocks(0, 16),
    MASK,
    PerHead([Dense(), LocalStride(16, 1, 3), Local(tokens=9), Strided(16, 2)]),
]


def blocks_read(pattern, length: int, size: int) -> np.ndarray:
    """bool [k, rows, blocks], by any head of the group."""
    mask = pattern.token_mask(4, 2, length, length)
    whole = -(-length // size) * size
    mask = np.pad(mask, ((0, 0), (0, whole - length), (0, whole - length)))
    mask = mask.reshape(2, 2, whole // size, size, whole // size, size)
    return mask.any((1, 3, 5))


@pytest.mark.parametrize("rollback", [0, 1, 20])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_block_has_its_slot_for_itself_while_it_is_read(pattern, rollback):
    length = 200
    layout = compile_cache(pattern, num_heads=4, num_kv_heads=2, max_length=length, max_rollback=rollback)
    read = blocks_read(pattern, length, layout.block_size)
    count = read.shape[1]
    slack = -(-rollback // layout.block_size)
    for head in range(2):
        readers = [np.flatnonzero(read[head, :, block]) for block in range(count)]
        lives = {block: min(each[-1] + slack, count - 1) for block, each in enumerate(readers) if len(each)}
        assert (layout.slot_of[head] >= 0).tolist() == [block in lives for block in range(count)]
        alive = [{block for block, last in lives.items() if block <= row <= last} for row in range(count)]
        for blocks in alive:
            slots = layout.slot_of[head][sorted(blocks)]
            assert len(set(slots.tolist())) == len(blocks)
        assert layout.num_slots[head] == max(1, *map(len, alive))


@pytest.mark.parametrize("pattern", PATTERNS[:-3], ids=str)
def test_slots_are_the_blocks_that_the_pattern_keeps(pattern):
    layout = compile_cache(pattern, num_heads=4, num_kv_heads=2, max_length=200)
    assert layout.num_slots.tolist() == pattern.kv_blocks_kept(4, 2, 200).tolist()


def test_phi3_at_128k():
    layout = compile_cache(LocalStride(), num_heads=32, num_kv_heads=8, max_length=128 << 10)
    assert layout.num_slots.tolist() == [270] * 8
    assert layout.buffers == (tuple(range(8)),)
    assert round(layout.share, 3) == 0.132
    assert layout.nbytes(128, 128, 2) == 8 * 270 * 64 * 256 * 2


def test_dense_heads_have_a_buffer_of_their_own():
    pattern = LocalStride(16, 2, 8, num_dense_heads=1)
    layout = compile_cache(pattern, num_heads=16, num_kv_heads=4, max_length=2048)
    assert layout.buffers == ((3,), (0, 1, 2))
    assert layout.num_slots.tolist() == [18, 17, 18, 128]
    assert layout.nbytes(1, 1, 1) == 2 * 16 * (128 + 3 * 18)


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_every_shard_has_as_many_heads_in_every_buffer(shards):
    windows = [Local(blocks, block_size=16) for blocks in (1, 20, 4, 30, 9, 12, 15, 25)]
    layout = compile_cache(PerHead(windows), num_heads=8, num_kv_heads=8, max_length=512, shards=shards)
    assert sorted(sum(layout.buffers, ())) == list(range(8))
    assert len(layout.buffers) == 8 // shards
    for heads in layout.buffers:
        assert [head * shards // 8 for head in heads] == list(range(shards))
    # The most that the heads of one rank need, whichever shards they are of.
    ranked = -np.sort(-layout.num_slots.reshape(shards, -1), 1)
    assert layout.nbytes(1, 0, 1) == 16 * shards * ranked.max(0).sum()


def test_equal_arguments_make_equal_layouts():
    """Those that were compiled twice too."""
    given = {"num_heads": 4, "num_kv_heads": 2, "max_length": 100, "max_rollback": 1, "shards": 1}
    first = compile_cache(LocalStride(16, 1, 4), **given)
    forget_layouts()
    second = compile_cache(LocalStride(16, 1, 4), **given)
    assert first is not second
    assert (first, hash(first)) == (second, hash(second))
    others = {"num_heads": 2, "num_kv_heads": 4, "max_length": 101, "max_rollback": 0, "shards": 2}
    for name in given:
        change = {"num_heads": 4, "num_kv_heads": 4} if name == "num_kv_heads" else {name: others[name]}
        assert compile_cache(LocalStride(16, 1, 4), **{**given, **change}) != first
    assert compile_cache(LocalStride(16, 1, 3), **given) != first


@pytest.mark.parametrize(
    ("pattern", "slots", "period"),
    [
        (Local(4), 4, 1),
        (Local(1), 1, 1),
        (Local(tokens=100), 3, 1),
        (Local(tokens=1), 1, 1),
        (Ranges(((2, 1), (6, 2)), 16), 6, 2),
        (Ranges(((40, 1), (90, 4)), 16), 90, 4),
    ],
    ids=str,
)
def test_bounded_patterns_stream(pattern, slots, period):
    layout = compile_cache(pattern, num_heads=4, num_kv_heads=2)
    assert (layout.num_slots.tolist(), layout.period, layout.max_length) == ([slots] * 2, period, None)


@pytest.mark.parametrize(
    "pattern",
    [
        Dense(),
        LocalStride(),
        FirstTokens(3) | Local(4),
        FirstBlocks(300, 16) & Local(4, block_size=16),
        MASK,
        PerHead([Local(4), Dense()] * 2),
    ],
    ids=str,
)
def test_others_need_a_length(pattern):
    with pytest.raises(ValueError, match="needs max_length, the most tokens"):
        compile_cache(pattern, num_heads=4, num_kv_heads=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": Local(4, causal=False)}, "needs a causal s2jax pattern"),
        ({"pattern": "dense"}, "expected a pattern such as .*got 'dense'.*did you mean Dense"),
        ({"max_length": 0}, "max_length must be an integer of at least 1, got 0"),
        ({"max_rollback": -1}, "max_rollback must be an integer of at least 0, got -1"),
        ({"max_rollback": 1.5}, "max_rollback must be an integer of at least 0, got 1.5"),
        ({"shards": 0}, "shards must be an integer of at least 1, got 0"),
        ({"shards": 4}, "2 KV heads cannot be split over 4 shards: take a number that divides them"),
        ({"num_heads": 5}, "num_heads must be a multiple of num_kv_heads"),
    ],
)
def test_errors(change, message):
    given = {"pattern": LocalStride(), "num_heads": 4, "num_kv_heads": 2, "max_length": 100, **change}
    with pytest.raises(ValueError, match=message):
        compile_cache(given.pop("pattern"), **given)
