"""Heads that a caller split by a `shard_map`, `pmap` or `vmap`: each reads as the head that it is among all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import s2jax
from s2jax import (
    BlockMask,
    BlockSelection,
    Dense,
    Local,
    LocalStride,
    PerHead,
    attention,
    block_sparse_attention,
    compile_schedule,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::s2jax.PatternWarning"),
]

SPLIT = P(None, None, "tensor")
PATTERN = LocalStride(16, 1, 4, num_dense_heads=1)
BY_QUERY_HEAD = LocalStride(16, 1, 4, residues="query_head")
MIXED = PerHead([*[Local(2, block_size=16)] * 3, *[LocalStride(16, 1, 3)] * 4, Dense()])


def mesh_of(*shape: int, names=("tensor",)) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, names, axis_types=(AxisType.Auto,) * len(shape))


def arrays(batch: int = 2, length: int = 50) -> tuple[np.ndarray, ...]:
    """Query, key and value; 8 heads, 4 KV heads."""
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(batch, length, *each)).astype(np.float32) for each in ((8, 8), (4, 8), (4, 4)))


def near(found, expected) -> None:
    assert np.isfinite(np.asarray(found)).all()
    np.testing.assert_allclose(found, expected, atol=2e-5)


def gradients(function, *inputs):
    """Result, log-sum-exp and gradients."""
    (out, lse), pull = jax.vjp(function, *inputs)
    return out, lse, *pull((2 * out, jnp.ones_like(lse)))


def expected_of(pattern, *inputs):
    whole = functools.partial(attention, pattern=pattern, return_lse=True, implementation="reference")
    return jax.jit(functools.partial(gradients, whole))(*inputs)


@pytest.mark.parametrize(
    ("implementation", "pattern", "check_vma", "inside"),
    [
        pytest.param("xla", PATTERN, True, True, id="groups"),
        pytest.param("xla", MIXED, False, False, id="mixed"),
        pytest.param("xla", BY_QUERY_HEAD, True, False, id="query heads"),
        pytest.param("reference", PATTERN, False, True, id="reference"),
        pytest.param("reference", BY_QUERY_HEAD, True, False, id="reference, query heads"),
    ],
)
def test_shard_map(implementation: str, pattern, check_vma: bool, inside: bool):
    """Results and gradients, through a `shard_map` and inside of it, with its checks and without."""
    inputs = arrays()
    local = functools.partial(
        attention, pattern=pattern, return_lse=True, implementation=implementation, head_axis="tensor"
    )
    over = functools.partial(jax.shard_map, mesh=mesh_of(4), in_specs=SPLIT, check_vma=check_vma)
    results = SPLIT, P(None, "tensor")
    if inside:
        function = over(functools.partial(gradients, local), out_specs=(*results, *[SPLIT] * 3))
    else:
        function = functools.partial(gradients, over(local, out_specs=results))
    for found, expected in zip(jax.jit(function)(*inputs), expected_of(pattern, *inputs), strict=True):
        near(found, expected)


def test_several_axes_and_a_mesh_inside():
    """Heads over two axes of a region, over an axis of it and one that jit splits, and beside a split batch."""
    inputs, mesh = arrays(), mesh_of(2, 2, names=("data", "tensor"))
    expected = attention(*inputs, PATTERN, implementation="reference")
    both = P(None, None, ("tensor", "data"))
    by_both = functools.partial(attention, pattern=PATTERN, head_axis=("tensor", "data"))
    near(jax.jit(jax.shard_map(by_both, mesh=mesh, in_specs=both, out_specs=both))(*inputs), expected)
    beside = P("data", None, "tensor")
    by_one = functools.partial(attention, pattern=PATTERN, head_axis="tensor")
    near(jax.jit(jax.shard_map(by_one, mesh=mesh, in_specs=beside, out_specs=beside))(*inputs), expected)
    with jax.set_mesh(mesh):
        nested = functools.partial(by_one, query_spec=P(None, None, "data"))
        function = jax.shard_map(nested, in_specs=SPLIT, out_specs=SPLIT, axis_names={"tensor"})
        near(jax.jit(function)(*inputs), expected)


def test_a_schedule_of_all_heads():
    inputs = arrays()
    schedule = compile_schedule(PATTERN, num_heads=8, num_kv_heads=4, query_length=50, kv_length=50)
    over = functools.partial(jax.shard_map, mesh=mesh_of(4), in_specs=SPLIT, out_specs=SPLIT)
    told = functools.partial(block_sparse_attention, schedule=schedule, head_axis="tensor")
    near(jax.jit(over(told))(*inputs), attention(*inputs, PATTERN, implementation="reference"))
    with pytest.raises(
        ValueError, match=r"got \(2, 1, 50\); compile one for these; or give head_axis, such as 'tensor'"
    ):
        over(functools.partial(block_sparse_attention, schedule=schedule))(*inputs)
    own = compile_schedule(LocalStride(16, 1, 4), num_heads=2, num_kv_heads=1, query_length=50, kv_length=50)
    with pytest.raises(ValueError, match="by this schedule heads read differently"):
        over(functools.partial(block_sparse_attention, schedule=own))(*inputs)


def test_pmap():
    inputs = arrays()
    expected = attention(*inputs, PATTERN, implementation="reference")
    query, key, value = (np.moveaxis(each.reshape(2, 50, 4, -1, each.shape[3]), 2, 0) for each in inputs)
    out = jax.pmap(
        functools.partial(attention, pattern=PATTERN, head_axis="i"), axis_name="i", devices=jax.devices()[:4]
    )(query, key, value)
    near(np.moveaxis(np.asarray(out), 0, 2).reshape(expected.shape), expected)
    unnamed = "^inside a pmap without axis_name, .* give pmap an axis_name and head_axis the same if heads are split"
    for options, message in (({}, unnamed), ({"axis_name": "i"}, "give head_axis='i' if")):
        with pytest.raises(ValueError, match=message):
            jax.pmap(functools.partial(attention, pattern=PATTERN), devices=jax.devices()[:4], **options)(
                query, key, value
            )


@pytest.mark.parametrize(("implementation", "by"), [("xla", "axis"), ("xla", "first head"), ("reference", "axis")])
def test_vmap_over_heads(implementation: str, by: str):
    inputs = arrays()
    split = tuple(each.reshape(2, 50, 4, -1, each.shape[3]) for each in inputs)
    options = {"pattern": PATTERN, "return_lse": True, "implementation": implementation}
    if by == "axis":
        mapped = jax.vmap(functools.partial(attention, **options, head_axis="heads"), in_axes=2, axis_name="heads")
        function = functools.partial(gradients, mapped)
    else:
        mapped = jax.vmap(lambda first, *each: attention(*each, **options, heads=(first, 8)), in_axes=(0, 2, 2, 2))
        function = functools.partial(gradients, functools.partial(mapped, jnp.arange(0, 8, 2)))
    out, lse, *rest = jax.jit(function)(*split)
    expected = expected_of(PATTERN, *inputs)
    near(np.moveaxis(np.asarray(out), 0, 2).reshape(expected[0].shape), expected[0])
    near(np.moveaxis(np.asarray(lse), 0, 1).reshape(expected[1].shape), expected[1])
    for found, each in zip(rest, expected[2:], strict=True):
        near(found.reshape(each.shape), each)


def test_a_range_of_heads():
    """Given as numbers, or as a number known at run time: of which one that cannot be gives NaN."""
    query, key, value = arrays()
    expected = attention(query, key, value, PATTERN, implementation="reference")
    traced = jax.jit(lambda first, *some: attention(*some, PATTERN, heads=(first, 8)))
    for first, count in ((2, 4), (6, 2)):
        kv = slice(first // 2, (first + count) // 2)
        some = query[:, :, first : first + count], key[:, :, kv], value[:, :, kv]
        near(
            jax.jit(functools.partial(attention, pattern=PATTERN, heads=(first, 8)))(*some),
            expected[:, :, first : first + count],
        )
        near(traced(first, *some), expected[:, :, first : first + count])
    for first in (-2, 1, 3, 8, 2**30):
        assert np.isnan(traced(first, query[:, :, :4], key[:, :, :2], value[:, :, :2])).all()


def test_refused_where_nobody_said_it():
    inputs, mesh = arrays(), mesh_of(4)

    def split(pattern, spec=SPLIT, mesh=mesh, check_vma=True, inputs=inputs, **options):
        def local(query, key, value):
            return attention(query, key, value, pattern, **options)

        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma))(*inputs)

    unsaid = r"over tensor, these may be all heads or a part .* give head_axis='tensor' if .* or head_axis=\(\) if"
    for pattern in (PATTERN, BY_QUERY_HEAD, Local(2, block_size=16) | LocalStride(16, 1, 4)):
        for check_vma in (True, False):
            with pytest.raises(ValueError, match=unsaid):
                split(pattern, check_vma=check_vma)
    with pytest.raises(ValueError, match=unsaid):
        split(MIXED)  # of eight heads, where each shard has two
    with pytest.raises(ValueError, match="of an enclosing shard_map, pmap or vmap, and 'heads' is none"):
        split(PATTERN, head_axis="heads")
    # Heads that read alike are not refused, whatever is split, nor those of a pattern that is for just so many.
    for pattern in (LocalStride(16, 1, 4, homo_head=True), LocalStride(16, 1, 1)):
        near(split(pattern), attention(*inputs, pattern, implementation="reference"))
    mask = np.tril(np.ones((1, 4, 4), bool))
    near(split(BlockMask(mask, 16)), attention(*inputs, BlockMask(mask, 16), implementation="reference"))
    pair = mesh_of(2, names=("data",))
    four, quarters = arrays(batch=4), mesh_of(4, names=("data",))
    near(split(MIXED, P("data"), quarters, inputs=four), attention(*four, MIXED, implementation="reference"))
    # A batch may be split, which is said; and what does not vary over an axis is not split over it.
    with pytest.raises(ValueError, match="over data, these may be all heads"):
        split(PATTERN, P("data"), pair)
    near(split(PATTERN, P("data"), pair, head_axis=()), attention(*inputs, PATTERN, implementation="reference"))
    near(split(PATTERN, P()), attention(*inputs, PATTERN, implementation="reference"))
    near(split(PATTERN, mesh=mesh_of(1)), attention(*inputs, PATTERN, implementation="reference"))
    with pytest.raises(ValueError, match="over heads, these may be all heads"):
        jax.vmap(lambda *each: attention(*each, PATTERN), in_axes=2, axis_name="heads")(
            *(each.reshape(2, 50, 4, -1, each.shape[3]) for each in inputs)
        )


def test_a_selection_has_its_own_heads():
    inputs = arrays()
    selection = BlockSelection(
        jnp.asarray(np.random.default_rng(0).integers(0, 4, (1, 4, 4, 1)), jnp.int32),
        jnp.ones((1, 4, 4), jnp.int32),
        16,
        16,
    )
    expected = attention(*inputs, selection, implementation="reference")
    for options in ({}, {"head_axis": "tensor"}):
        function = jax.shard_map(
            lambda selection, *each, options=options: attention(*each, selection, **options),
            mesh=mesh_of(4), in_specs=(P(None, "tensor"), SPLIT, SPLIT, SPLIT), out_specs=SPLIT,
        )  # fmt: skip
        near(jax.jit(function)(selection, *inputs), expected)


def test_arguments_that_do_not_fit():
    inputs = arrays()
    for message, options in {
        r"head_axis must be the name of an axis, several names or \(\), got 3": {"head_axis": 3},
        r"give query_spec instead": {"head_axis": "tensor"},
        r"names an axis twice": {"head_axis": ("tensor", "tensor")},
        r"give one of them": {"head_axis": (), "heads": (0, 8)},
        r"heads must be \(first_head, num_heads\), got 8": {"heads": 8},
        r"an integer of at least 8 and a multiple of 2, .* got 4": {"heads": (0, 4)},
        r"a multiple of 2, .* got 9": {"heads": (0, 9)},
        r"begin with a head from 0 to 8 and a multiple of 2, .* got heads=\(1, 16\)": {"heads": (1, 16)},
        r"from 0 to 8": {"heads": (10, 16)},
        r"the first head must be an integer, got 0\.5": {"heads": (0.5, 16)},
        r"an integer scalar, got int32 \[2\]": {"heads": (jnp.arange(2), 16)},
    }.items():
        with pytest.raises(ValueError, match=message):
            attention(*inputs, PATTERN, **options)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_vmap_over_an_axis_that_a_mesh_splits(kind: AxisType):
    """By `spmd_axis_name` where axes are Auto; Explicit axes say it themselves."""
    inputs = arrays(length=20)
    how = ({"query_spec": P()}, {"spmd_axis_name": "data"}) if kind is AxisType.Auto else ({}, {})

    def loss(implementation: str, *each, **options):
        out = attention(*(array[None] for array in each), PATTERN, implementation=implementation, **options)
        return (out**2).sum(), out[0]

    def found(implementation: str, options: dict, mapping: dict):
        function = functools.partial(loss, implementation, **options)
        return jax.vmap(jax.grad(function, (0, 1, 2), has_aux=True), **mapping)

    expected = jax.jit(found("reference", {}, {}))(*inputs)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(each, jax.NamedSharding(mesh, P("data"))) for each in inputs]
        jax.tree.map(near, jax.jit(found("xla", *how))(*sharded), expected)


def every_other_block_by_head(head, query_position, key_position):
    return (query_position // 16 + key_position // 16 + head) % 2 == 0


BY_HEAD = np.tril(np.ones((8, 50, 50), bool)) & (np.arange(50) % 8 != np.arange(8)[:, None])[:, None]
UNTYPED = {"function": every_other_block_by_head, "array": BY_HEAD, "text": "LocalStride(16, 1, 4)"}


@pytest.mark.parametrize("pattern", UNTYPED.values(), ids=UNTYPED)
def test_what_becomes_a_pattern_is_refused_too(pattern):
    """A function, an array of more heads, or text: in the op, the layers and the cache."""
    inputs, mesh = arrays(), mesh_of(2)
    x = jnp.ones((2, 50, 16))
    layer = s2jax.nnx.S2Attention(16, 4, pattern, rngs=nnx.Rngs(0))
    other = s2jax.nnx.S2Attention(16, 4, Dense(), rngs=nnx.Rngs(0))
    twin = s2jax.linen.S2Attention(4, pattern)
    settings = {"batch": 1, "num_heads": 4, "num_kv_heads": 4, "head_dim": 4, "max_length": 50}
    calls = {
        "op": lambda x, *each: attention(*(array[:, :, :4] for array in each), pattern),
        "nnx": lambda x, *each: layer(x),
        "nnx, given in the call": lambda x, *each: other(x, pattern=pattern),
        "linen": lambda x, *each: twin.init_with_output(jax.random.key(0), x)[0],
        "cache": lambda x, *each: s2jax.KVCache.create(pattern, **settings).lengths,
        "attention_fn": lambda x, *each: s2jax.nnx.attention_fn(pattern)(*(array[:, :, :4] for array in each)),
    }
    for call in calls.values():
        local = jax.shard_map(call, mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"), check_vma=False)
        with pytest.raises(ValueError, match="over tensor, these may be all heads or a part of them"):
            jax.eval_shape(local, x, *inputs)
