"""What the Hopper kernel of the keys' gradients walks, written out query by key."""

import dataclasses

import hypothesis
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.mosaic_gpu.sm90 import backward, forward
from pallas_kernels.mosaic_gpu.sm90.config import ROWS
from pallas_kernels.mosaic_gpu.sm90.inputs import KernelTables, kv_tables, selection_kv_tables
from pallas_kernels.problem import Operands
from pallas_kernels.segments import narrow_kv_tiles
from pallas_kernels.tiling import sort_entries
from s2jax import BlockSelection, FirstTokens, Local, LocalStride, PerHead, attention, compile_schedule
from tests.kernels.test_mosaic_gpu_arrays import inputs
from tests.patterns.families import HEADS, compositions

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")


def written_out(tables: KernelTables, group: int, rows: int, queries: int, key_block: int, width: int, batch: int = 0):
    """int [h, queries, keys], how often a head's query is said to see a key, and the blocks that are in packs."""
    ranges, blocks, masks = (np.asarray(each) for each in (tables.ranges, tables.blocks, tables.mask_ids))
    ranges = ranges[batch if len(ranges) > 1 else 0]
    bits = np.asarray(tables.mask_bits)[..., None] >> np.arange(width) & 1  # [kinds, words, ROWS, width]
    bits = bits.swapaxes(1, 2).reshape(len(bits), ROWS, queries)
    heads, kv_tiles, head_passes = ranges.shape[:3]
    seen = np.zeros((heads * group, rows, tables.members.max() + 1, queries, key_block), int)
    for head, kv_tile, group_head in np.ndindex(heads, kv_tiles, head_passes):
        for number, (low, high) in enumerate(ranges[head, kv_tile, group_head]):
            for entry in range(low, high):
                kind = bits[masks[entry]].reshape(-1, key_block, queries).swapaxes(1, 2)
                assert number >= tables.num_full_ranges or kind.all()
                mine = range(head * group, (head + 1) * group) if head_passes == 1 else [head * group + group_head]
                for place, member in enumerate(np.asarray(tables.members)[head, kv_tile]):
                    if member >= 0:
                        seen[mine, blocks[entry], member] += kind[place]
    return seen.swapaxes(2, 3).reshape(len(seen), rows * queries, -1)


def each_once(members, num_blocks: int) -> bool:
    return all(sorted(head[head >= 0].tolist()) == list(range(num_blocks)) for head in np.asarray(members))


@hypothesis.given(st.data(), HEADS, st.sampled_from([1, 40, 100, 200]), st.sampled_from([1, 33, 180]))
def test_packs_are_walked_by_what_reads_them(data, heads, query_length: int, kv_length: int):
    """Whatever the heads of a group read, alike or apart; every block of keys is in one pack."""
    pattern = data.draw(compositions(heads, max(query_length, kv_length)))
    shapes = dataclasses.asdict(heads) | {"query_length": query_length, "kv_length": kv_length}
    schedule = compile_schedule(pattern, **shapes)
    size, group = schedule.block_size, heads.num_heads // heads.num_kv_heads
    width = data.draw(st.sampled_from([16, 32])) if size > 16 else 16
    hypothesis.assume(size <= ROWS)
    tables = kv_tables(schedule, width)
    seen = written_out(tables, group, schedule.lists.num_rows, size, size, width)
    np.testing.assert_array_equal(seen[:, :query_length, :kv_length], schedule.token_mask())
    assert each_once(tables.members, schedule.num_columns)


@pytest.mark.slow
@hypothesis.given(
    st.integers(0, 1 << 20), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from([16, 64, 128]),
    st.sampled_from([16, 48, 256]), st.sampled_from([0, 1, 5]),
)  # fmt: skip
def test_a_selection_transposed(seed: int, heads: int, batch: int, block_size: int, query_block: int, most: int):
    """Every row that reads a block of a pack is walked once, with a mask that says which blocks it reads."""
    random = np.random.default_rng(seed)
    kv_length, rows, num_heads, num_kv_heads = random.integers(1, 500), random.integers(1, 6), 4, 2
    # Some blocks stand beyond the keys, and some counts beyond what there is.
    num_blocks = -(-kv_length // block_size)
    kv_blocks = np.stack([random.permutation(max(num_blocks + 1, most))[:most] for _ in range(batch * heads * rows)])
    kv_blocks = kv_blocks.reshape(batch, heads, rows, most).astype(np.int32)
    counts = random.integers(0, most + 2, (batch, heads, rows)).astype(np.int32)
    selection = BlockSelection(jnp.asarray(kv_blocks), jnp.asarray(counts), block_size, query_block)
    query, key, value = inputs(tokens=kv_length, heads=num_heads, kv_heads=num_kv_heads, features=16)
    width = min(query_block, 16)
    tables = selection_kv_tables(Operands(query, key, value, selection), width)
    assert each_once(tables.members, num_blocks)
    for sequence in range(batch):
        seen = written_out(tables, 2, rows, query_block, block_size, width, sequence)
        expected = np.zeros((num_heads, rows, num_blocks), int)
        for head, row in np.ndindex(num_heads, rows):
            which = sequence, head * heads // num_heads, row
            chosen = kv_blocks[which][: counts[which]]
            expected[head, row, chosen[chosen < num_blocks]] = 1
        np.testing.assert_array_equal(seen, expected.repeat(query_block, 1).repeat(block_size, 2))
        # Once a row and pack, and none for what is not there.
        in_packs = np.pad(expected, ((0, 0), (0, 0), (0, -num_blocks % (ROWS // block_size))))
        in_packs = in_packs.reshape(num_heads, rows, -1, ROWS // block_size).any(-1).sum()
        lengths = np.diff(np.asarray(tables.ranges)[sequence % len(tables.ranges)])[..., 0]
        assert lengths.sum() * (num_heads // num_kv_heads // lengths.shape[2]) == in_packs


def test_entries_are_sorted_as_one_number_or_as_three():
    random, most = np.random.default_rng(0), (9, 50, 8)
    entries = [random.integers(0, each, (3, 200)).astype(np.int32) for each in most]
    for one, three in zip(sort_entries(*entries, most), sort_entries(*entries, (1 << 20, 1 << 20, 8)), strict=True):
        np.testing.assert_array_equal(one, three)
    order = np.lexsort(entries[::-1])
    np.testing.assert_array_equal(sort_entries(*entries, most)[1], np.take_along_axis(entries[1], order, 1))


@hypothesis.given(st.integers(0, 1 << 20), st.booleans(), st.integers(0, 3))
def test_packs_and_segments(seed: int, ascending: bool, first_row: int):
    """Rows that share a segment are read once, and no others without a mask; if ids ascend, no others are read."""
    random, kv_tiles, rows = np.random.default_rng(seed), 6, 12
    query_ids, kv_ids = (random.integers(0, 4, count * 2).repeat(random.choice([2, 4])) for count in (rows, kv_tiles))
    if ascending:
        query_ids.sort()
    query_ids, kv_ids = query_ids[: rows * 4].reshape(1, -1, 4), kv_ids[: kv_tiles * 4].reshape(1, 1, -1, 4)
    rows, kv_tiles = query_ids.shape[1], kv_ids.shape[2]
    # Even rows without a mask, odd ones with one.
    blocks = np.concatenate([np.arange(0, 20, 2), np.arange(1, 20, 2)]).astype(np.int32)
    ranges = np.broadcast_to(np.array([[0, 10], [10, 20]], np.int32), (1, 1, kv_tiles, 1, 2, 2))
    narrowed = jax.jit(narrow_kv_tiles, static_argnums=2)
    edge = jnp.full((1, 1, 1), first_row, jnp.int32)
    cut = narrowed(blocks, ranges, 1, query_ids.astype(np.int32), kv_ids.astype(np.int32), edge)
    for kv_tile, parts in enumerate(np.asarray(cut)[0, 0, :, 0]):
        listed = [blocks[low:high] - first_row for low, high in parts]
        walked = np.concatenate(listed)
        mine = set(kv_ids[0, 0, kv_tile].tolist())
        shared = {row for row in range(rows) if mine & set(query_ids[0, row].tolist())}
        assert len(walked) == len(set(walked.tolist()))
        assert shared <= set(walked.tolist()) | set(range(20 - first_row, rows))
        own = [row for row in shared if (row + first_row) % 2 == 0 and mine == set(query_ids[0, row].tolist())]
        assert set(listed[0].tolist()) <= set(own) if len(mine) == 1 else not len(listed[0])
        if ascending:
            assert set(walked.tolist()) <= shared | between(mine, query_ids[0])
            assert sorted(listed[0].tolist()) == (sorted(own) if len(mine) == 1 else [])


def between(mine: set[int], query_ids) -> set[int]:
    """Rows of other segments between those of a pack with several."""
    rows = range(len(query_ids))
    return {row for row in rows if min(mine) <= query_ids[row].min() and query_ids[row].max() <= max(mine)}


def test_copies_have_room(interpreted, monkeypatch):
    """A copy is cut off at the end of the whole array alone: what belongs to rows is as long as whole blocks."""
    found = {}

    def instead_of(module, name: str):
        kernel = getattr(module, name)

        def noted(spec, given, *others):
            found[name] = spec, given
            shapes = jax.eval_shape(lambda: kernel(spec, given, *others))
            return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

        monkeypatch.setattr(module, name, noted)

    for module, name in ((forward, "forward_kernel"), (backward, "dq_kernel"), (backward, "dkv_kernel")):
        instead_of(module, name)
    arrays, ids = inputs(tokens=201), jnp.zeros((1, 201), jnp.int32)
    options = {"implementation": "mosaic_gpu", "query_segment_ids": ids, "kv_segment_ids": ids}
    jax.eval_shape(jax.grad(lambda *arrays: attention(*arrays, LocalStride(64, 2, 4), **options).sum()), *arrays)
    spec, given = found["dkv_kernel"]
    assert [each.shape[-1] for each in (given.lse, given.delta, given.query_segments)] == [256] * 3
    assert [each.shape[1] % 8 for each in (given.query, given.dout, given.key, given.value)] == [0] * 4
    spec, given = found["dq_kernel"]
    assert given.lse.shape == given.delta.shape == (1, spec.num_heads // spec.heads_per_tile, spec.num_tiles, ROWS)
    assert given.query.shape == given.dout.shape


@pytest.mark.parametrize("heads", [1, 2])
def test_packs_over_a_mesh(monkeypatch, heads: int):
    """Every shard has the lists and the packs of its own heads, those of a group alike or apart."""

    def marks(spec, given):
        """Which slices and which members a KV head has, in the place of the gradients."""
        tables = given.tables
        lists = (tables.ranges.astype(jnp.float32) @ jnp.asarray([1.0, 1e-3])).sum((0, 2, 3, 4))
        kv_tiles = (tables.members * jnp.arange(tables.members[0].size).reshape(tables.members.shape[1:])).sum((1, 2))
        return tuple(
            jnp.broadcast_to(mark.astype(array.dtype)[:, None], array.shape)
            for mark, array in ((lists, given.key), (kv_tiles, given.value))
        )

    monkeypatch.setattr(
        forward, "forward_kernel", lambda spec, given: (given.query, given.query[..., 0].swapaxes(1, 2))
    )
    monkeypatch.setattr(backward, "dq_kernel", lambda spec, given, factor: given.query)
    monkeypatch.setattr(backward, "dkv_kernel", marks)
    every = [Local(1, block_size=64), LocalStride(64, 2, 4), FirstTokens(5), Local(tokens=70)]
    pattern = PerHead([each for each in every for _ in range(heads)])
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    arrays = inputs(heads=4 * heads, kv_heads=4, batch=2)

    def results(**options):
        def function(query, key, value):
            return attention(query, key, value, pattern, implementation="mosaic_gpu", **options).sum()

        # What stands in the kernels' places runs on the CPU, as they do in the interpreter.
        with plgpu.force_gpu_interpret_mode():
            return [np.asarray(each, np.float32) for each in jax.jit(jax.grad(function, (1, 2)))(*arrays)]

    expected = results()
    assert all(np.ptp(each, axis=2).all() for each in expected)  # or heads could not be told apart
    with jax.set_mesh(mesh):
        found = results(query_spec=P("data", None, "tensor", None))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_offset_leaves_rows_that_exist(monkeypatch):
    """Lists are for all positions: of an offset at run time, those of the call's own rows are left."""

    def first_and_last(spec, given):
        low, high = (given.tables.ranges[..., edge] for edge in (0, 1))
        blocks, row = given.tables.blocks, given.first_row[:, None, None, None, None]
        first = jnp.where(low < high, blocks[low] - row, 0).min((1, 2, 3, 4))
        last = jnp.where(low < high, blocks[high - 1] - row, 0).max((1, 2, 3, 4))
        return tuple(
            jnp.broadcast_to(edge[:, None, None, None], array.shape).astype(spec.dtype)
            for edge, array in ((first, given.key), (last, given.value))
        )

    monkeypatch.setattr(
        forward, "forward_kernel", lambda spec, given: (given.query, given.query[..., 0].swapaxes(1, 2))
    )
    monkeypatch.setattr(backward, "dq_kernel", lambda spec, given, factor: given.query)
    monkeypatch.setattr(backward, "dkv_kernel", first_and_last)
    query, key, value = inputs(tokens=160, features=16, batch=2)

    def function(query, key, value):
        options = {"implementation": "mosaic_gpu", "query_offset": jnp.asarray([7, 64])}
        return attention(query, key, value, LocalStride(16, 2, 2), **options).sum()

    with plgpu.force_gpu_interpret_mode():
        first, last = jax.grad(function, (1, 2))(query[:, :40], key, value)
    # 40 queries from position 7 on stand in three blocks, from 64 on too; the kernel's tiles have room for one more.
    assert first[:, 0, 0, 0].tolist() == [0, 0]
    assert last[:, 0, 0, 0].tolist() == [3, 3]
