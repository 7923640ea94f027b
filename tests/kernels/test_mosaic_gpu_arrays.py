"""What stands around the Hopper kernel: what is refused, tables over a mesh, segments, room for results."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import HopperConfig
from pallas_kernels.mosaic_gpu.sm90 import backend, forward
from pallas_kernels.mosaic_gpu.sm90.backend import HOPPER
from pallas_kernels.mosaic_gpu.sm90.config import SHARED_BYTES, choose_config
from pallas_kernels.padding import positive_scale
from pallas_kernels.segments import narrow
from s2jax import BlockSelection, FirstTokens, Local, LocalStride, PerHead, attention

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")

WINDOW = LocalStride(64, 2, 4)
FINE = LocalStride(16, 2, 4)
APART = PerHead([Local(2, block_size=64), WINDOW, WINDOW, WINDOW])


def inputs(tokens=256, heads=4, kv_heads=2, features=64, value_features=None, dtype="bfloat16", batch=1):
    shapes = ((heads, features), (kv_heads, features), (kv_heads, value_features or features))
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal((batch, tokens, *shape)), dtype) for shape in shapes]


def selection(rows: int, query_block: int, heads: int = 1) -> BlockSelection:
    return BlockSelection(
        jnp.zeros((1, heads, rows, 2), jnp.int32), jnp.ones((1, heads, rows), jnp.int32), 64, query_block
    )


REFUSED = {
    "float32": (WINDOW, {"dtype": "float32"}, None, "needs dtype bfloat16 or float16, got float32"),
    "wide heads": (WINDOW, {"features": 264}, None, "needs head dims of at most 256, got 264 and 264"),
    "wide values": (WINDOW, {"value_features": 264}, None, "needs head dims of at most 256, got 64 and 264"),
    "large blocks": (LocalStride(256, 1, 2), {}, None, "needs a block size of 16, 32, 64, 128, got 256"),
    "short rows": (selection(8, 32), {}, None, "needs query blocks that fill a tile of 128 rows"),
    "short rows of a head": (selection(4, 64, heads=4), {}, None, "needs query blocks that fill a tile of 128 rows"),
    "heads that read apart": (APART, {}, HopperConfig(heads_per_tile=2), "a tile can have 1 heads here, got 2"),
    "heads of two groups": (
        LocalStride(16, 2, 4),
        {},
        HopperConfig(heads_per_tile=4),
        "a tile can have 1 or 2 heads here, got 4",
    ),
    "part of a block": (LocalStride(128, 1, 2), {}, HopperConfig(heads_per_tile=2), "a tile can have 1 heads here"),
    "large tiles": (WINDOW, {"features": 256}, HopperConfig(1, 128, 2), "the tiles need [0-9]+ bytes of shared memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_cannot_do_is_refused(name: str):
    pattern, sizes, config, message = REFUSED[name]
    with pytest.raises(NotImplementedError, match=message):
        attention(*inputs(**sizes), pattern, implementation="mosaic_gpu", config=config)


@pytest.mark.parametrize(
    ("capability", "cuda", "message"),
    [
        ("9.0", 13000, None), ("9.0", None, None), ("9.0", 12091, None), ("9.0", 12070, None),
        ("8.0", 13000, "needs a Hopper GPU"), ("10.0", 13000, "needs a Hopper GPU"),
        ("9.0", 12080, "miscompile masks, got 12.8"), ("9.0", 12090, "miscompile masks, got 12.9"),
    ],
)  # fmt: skip
def test_only_hopper_is_lowered_for(monkeypatch, capability: str, cuda: int | None, message: str | None):
    device = types.SimpleNamespace(compute_capability=capability, device_kind="a GPU")
    versions = types.SimpleNamespace(cuda_runtime_get_version=lambda: cuda)
    monkeypatch.setattr(backend, "cuda_versions", None if cuda is None else versions)
    reason = HOPPER.unsupported_device_reason(device)
    assert reason is None if message is None else message in str(reason)


def test_the_gradient_of_a_gradient_is_xla_s():
    """Outside of the interpreter, where the platform is minded."""

    def squared(*arrays):
        def summed(*arrays):
            return attention(*arrays, FINE, implementation="mosaic_gpu").astype(jnp.float32).sum()

        return sum(jnp.square(each.astype(jnp.float32)).sum() for each in jax.grad(summed, (0, 1, 2))(*arrays))

    arrays = inputs(tokens=64)
    gradients = jax.jit(jax.grad(squared)).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in gradients.as_text()
    with pytest.raises(NotImplementedError, match="mosaic_gpu: needs the platform 'cuda'"):
        jax.jit(jax.grad(squared)).trace(*arrays).lower(lowering_platforms=("cpu",))


def test_there_are_tiles_for_all_sizes():
    for head_dim in range(16, 257, 16):
        for value_dim in range(16, 257, 16):
            for block_size in backend.BLOCK_SIZES:
                tiles = choose_config(head_dim, value_dim, block_size, 4096, 1)
                assert tiles.shared_bytes(head_dim, value_dim, block_size, 3) <= SHARED_BYTES


def test_a_scale_that_is_not_positive():
    query = jnp.asarray([1.0, jnp.inf, jnp.nan])
    for scale in (0.5, -0.5, 0.0):
        turned, positive = positive_scale(query, scale)
        assert positive > 0
        np.testing.assert_array_equal(turned * positive, query * scale)


def test_copies_of_lse_have_room(interpreted, monkeypatch):
    """A copy is cut off at the end of the whole array alone: a tile's last rows must not be another head's first."""
    found = []

    def attend(spec, given):
        results = jax.eval_shape(lambda: kernel(spec, given))
        found.append((spec, given, results))
        return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), results)

    jax.clear_caches()  # a call that another test compiled would not reach the kernel
    kernel = forward.forward_kernel
    monkeypatch.setattr(forward, "forward_kernel", attend)
    query, key, value = inputs(tokens=201)
    ids = jnp.zeros((1, 201), jnp.int32)
    attention(query, key, value, WINDOW, implementation="mosaic_gpu", query_segment_ids=ids, kv_segment_ids=ids)
    ((spec, given, (_, lse)),) = found
    assert lse.shape[2] == spec.num_tiles * spec.block_q >= 201
    # And of lengths the chip can take, by rows that lie together in shared memory and by 16 bytes.
    assert [array.shape[1] % 8 for array in (given.query, given.key, given.value)] == [0, 0, 0]
    assert given.kv_segments is not None
    assert given.kv_segments.shape[1] % spec.block_size == 0


@pytest.mark.parametrize("heads", [1, 2])
def test_tables_over_a_mesh(interpreted, monkeypatch, heads: int):
    """Every shard has the lists of its own heads, and zeroes the values that its own KV heads do not read."""

    def attend(spec, given):
        """Which slices a tile has, and the values, in a kernel's place."""
        marks = given.tables.ranges.astype(jnp.float32) @ jnp.asarray([1.0, 1e-3])
        marks = jnp.repeat(jnp.repeat(marks.sum(-1), spec.heads_per_tile, 1), spec.block_q, 2)
        value = jnp.repeat(given.value, spec.num_heads // spec.num_kv_heads, 2)
        return value, jnp.broadcast_to(marks, (spec.batch, *marks.shape[1:]))

    monkeypatch.setattr(forward, "forward_kernel", attend)
    every = [Local(1, block_size=64), WINDOW, FirstTokens(5), FirstTokens(9)]
    pattern = PerHead([each for each in every for _ in range(heads)])
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    arrays = inputs(heads=4 * heads, kv_heads=4, batch=2)

    def results(**options):
        options |= {"return_lse": True, "implementation": "mosaic_gpu"}
        found = jax.jit(lambda *given: attention(*given, pattern, **options))(*arrays)
        return [np.asarray(each, np.float32) for each in found]

    expected = results()
    assert np.ptp(expected[1], axis=1).any()  # or heads could not be told apart
    assert not expected[0][:, 5:64, 2 * heads].any()  # what nobody reads
    assert expected[0][:, :5, 2 * heads].all()
    with jax.set_mesh(mesh):
        found = results(query_spec=P("data", None, "tensor", None))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


class TestNarrow:
    """Blocks of 4 keys, tiles of 8 queries, two lists without a mask and one with."""

    block_size, queries = 4, 8

    def narrowed(self, query_ids, kv_ids):
        """The blocks that are left in every part of every tile, and those that were in the lists."""
        tiles, count = len(query_ids) // self.queries, len(kv_ids) // self.block_size
        blocks = np.concatenate([np.arange(count), np.arange(0, count, 2), np.arange(1, count, 2)]).astype(np.int32)
        starts = np.cumsum([0, count, len(range(0, count, 2)), len(range(1, count, 2))])
        ranges = np.stack([starts[:-1], starts[1:]], -1)[None, None, None].repeat(tiles, 2).astype(np.int32)
        ids = query_ids.reshape(1, tiles, self.queries)
        cut = np.asarray(jax.jit(narrow, static_argnums=(2, 5))(blocks, ranges, 2, ids, kv_ids[None], self.block_size))
        listed = [[blocks[low:high].tolist() for low, high in tile] for tile in cut[0, 0]]
        return listed, [blocks[low:high].tolist() for low, high in ranges[0, 0, 0]]

    def test_documents(self):
        """One after the other: exactly the blocks that some query shares a segment with, and no mask inside its own."""
        random = np.random.default_rng(0)
        for _ in range(40):
            ids = np.sort(random.integers(0, 4, 64)).astype(np.int32)
            listed, before = self.narrowed(ids, ids)
            for tile, parts in enumerate(listed):
                mine = set(ids[tile * 8 : tile * 8 + 8].tolist())
                of_block = [set(ids[4 * block : 4 * block + 4].tolist()) for block in range(16)]
                inside = [len(mine) == 1 and of_block[block] == mine for block in range(16)]
                for number in (0, 1):
                    whole = [block for block in before[number] if inside[block]]
                    edges = [block for block in before[number] if mine & of_block[block] and not inside[block]]
                    assert parts[number] == whole
                    assert sorted(parts[2 + number] + parts[4 + number]) == edges
                assert parts[6] == [block for block in before[2] if mine & of_block[block]]

    def test_any_ids(self):
        """In any order: nothing is lost or read twice, and no mask is left out where one is needed."""
        random = np.random.default_rng(1)
        for number in range(40):
            numbers = ((8, 2), (8, 8)) if number % 2 else ((2, 8), (16, 4))
            query_ids, kv_ids = (random.integers(0, 3, count).repeat(size).astype(np.int32) for count, size in numbers)
            listed, before = self.narrowed(query_ids, kv_ids)
            for tile, parts in enumerate(listed):
                mine = set(query_ids[tile * 8 : tile * 8 + 8].tolist())
                of_block = [set(kv_ids[4 * block : 4 * block + 4].tolist()) for block in range(16)]
                for which, some in enumerate((parts[0:6:2], parts[1:6:2], parts[6:])):
                    read, there = list(itertools.chain(*some)), set(before[which])
                    assert len(read) == len(set(read))
                    assert {block for block in there if mine & of_block[block]} <= set(read) <= there
                assert all(of_block[block] == mine and len(mine) == 1 for block in parts[0] + parts[1])
