"""The Hopper backend under JAX's transformations: in the interpreter, which knows one device, or only compiled."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from benchmarks.compiled.deviceless import compile_for, devices, missing
from pallas_kernels.op import LSE_NAME, OUT_NAME
from s2jax import BlockSelection, LocalStride, attention
from tests.kernels.transformations import passes

PATTERN = LocalStride(32, 2, 2)
SPEC = P("data", None, "tensor", None)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [pytest.param("mosaic_gpu", marks=pytest.mark.slow), None])
KERNEL = "mosaic_gpu_v2"


def inputs(*leading: int) -> tuple[jax.Array, ...]:
    """query, key and value of two sequences, or of one in each of the `leading` batches."""
    keys = jax.random.split(jax.random.key(len(leading)), 3)
    shapes = [(*leading, *((1, 96) if leading else (2, 192)), heads, 32) for heads in (4, 2, 2)]
    return tuple(jax.random.normal(key, shape, "bfloat16") for key, shape in zip(keys, shapes, strict=True))


def gradients(*arrays: jax.Array, **options):
    def total(*arrays):
        out, lse = attention(*arrays, PATTERN, return_lse=True, **options)
        return (out.astype("float32") ** 2).sum() + lse.sum()

    return jax.grad(total, (0, 1, 2))(*arrays)


class TestVmap:
    """What the calls give one by one, to the bit: the grid only grows."""

    @pytest.fixture(autouse=True)
    def interpreted(self):
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
            yield

    def assert_maps(self, function, *mapped) -> None:
        together = jax.jit(jax.vmap(function))(*mapped)
        one = jax.jit(function)
        for index in range(len(mapped[0])):
            alone = one(*(array[index] for array in mapped))
            for found, expected in zip(together, alone, strict=True):
                np.testing.assert_array_equal(np.asarray(found[index]), np.asarray(expected))

    def attention(self, *arrays, pattern=PATTERN, **options):
        return attention(*arrays, pattern, return_lse=True, implementation="mosaic_gpu", **options)

    @pytest.mark.slow
    def test_over_the_batch(self):
        self.assert_maps(self.attention, *inputs(2))

    @pytest.mark.slow
    def test_over_offsets(self):
        query, key, value = (array[0] for array in inputs(1))
        self.assert_maps(lambda at: self.attention(query[:, :40], key, value, query_offset=at), jnp.asarray([3, 50]))

    @pytest.mark.slow
    def test_over_selections(self):
        query, key, value = (array[0] for array in inputs(1))
        random = np.random.default_rng(0)
        blocks = random.permuted(np.broadcast_to(np.arange(3), (2, 1, 2, 2, 3)), axis=-1).astype(np.int32)
        counts = random.integers(0, 4, (2, 1, 2, 2)).astype(np.int32)

        def chosen(blocks, counts):
            return self.attention(query, key, value, pattern=BlockSelection(blocks, counts, 32, 64))

        self.assert_maps(chosen, jnp.asarray(blocks), jnp.asarray(counts))


def lowered(function, *arrays, platforms=("cuda",)) -> str:
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=platforms).as_text()


def test_kept_residuals_spare_the_forward_pass():
    """In a `scan` of rematerialised layers, keeping what the op names brings back the kernel's work to once."""

    def loss(wrap, query, key, value):
        layer = wrap(lambda x, _: (attention(x, key, value, PATTERN, implementation="mosaic_gpu"), None))
        return (jax.lax.scan(layer, query, None, length=3)[0].astype("float32") ** 2).sum()

    policy = jax.checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME)
    wraps = (lambda layer: layer, functools.partial(jax.checkpoint, policy=policy), jax.checkpoint)
    functions = [jax.grad(functools.partial(loss, wrap), (0, 1, 2)) for wrap in wraps]
    kept, named, forgotten = (passes(jax.make_jaxpr(function)(*inputs()).jaxpr) for function in functions)
    assert named == kept < forgotten
    # One forward, and two for the gradients.
    assert lowered(functions[1], *inputs()).count(KERNEL) == 3


@IMPLEMENTATIONS
def test_heads_split_by_a_shard_map(implementation: str | None):
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",), axis_types=(AxisType.Auto,))
    heads = P(None, None, "tensor")
    local = functools.partial(gradients, implementation=implementation, head_axis="tensor")
    assert KERNEL in lowered(jax.shard_map(local, mesh=mesh, in_specs=heads, out_specs=heads), *inputs())


@IMPLEMENTATIONS
@pytest.mark.parametrize("inside", [True, False], ids=["gradient inside", "gradient outside"])
def test_inside_shard_map(implementation: str | None, inside: bool):
    """In a checked `shard_map` of the caller's own, with split queries and whole keys too."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("length",), axis_types=(AxisType.Auto,))
    split, whole = P(None, "length"), P()
    options = {"implementation": implementation, "head_axis": ()}
    if inside:
        specs = {"in_specs": (split, whole, whole), "out_specs": (split, whole, whole)}
        function = jax.shard_map(functools.partial(gradients, **options), mesh=mesh, **specs)
    else:
        sharded = jax.shard_map(
            lambda *arrays: attention(*arrays, PATTERN, **options),
            mesh=mesh, in_specs=(split, whole, whole), out_specs=split,
        )  # fmt: skip

        def function(*arrays):
            return jax.grad(lambda *arrays: sharded(*arrays).astype("float32").sum(), (0, 1, 2))(*arrays)

    # Seen from each device, its queries are the first of all.
    assert KERNEL in lowered(function, *inputs())


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)], ids=lambda kind: kind.name
)
def test_over_a_mesh(implementation: str | None, kind: AxisType):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(array, jax.NamedSharding(mesh, SPEC)) for array in inputs()]
        options = {"query_spec": SPEC} if kind is AxisType.Auto else {}
        assert KERNEL in lowered(functools.partial(gradients, implementation=implementation, **options), *sharded)


@pytest.mark.skipif(missing("h100") is not None, reason=missing("h100") or "")
@IMPLEMENTATIONS
def test_four_gpus_have_nothing_to_tell_each_other(implementation: str | None):
    """Compiled for four: each computes its own sequences and heads, and nothing is gathered."""
    mesh = Mesh(np.array(devices("h100:4")).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = jax.NamedSharding(mesh, SPEC)
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding) for array in inputs()]
    with jax.set_mesh(mesh):
        options = {"implementation": implementation, "query_spec": SPEC}
        text = compile_for("h100:4", functools.partial(gradients, **options), *shapes).as_text()
    assert KERNEL in text
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in text


@pytest.mark.parametrize(
    ("platforms", "kernels"),
    [(["cpu"], set()), (["cpu", "cuda", "tpu"], {KERNEL, "tpu_custom_call"})],
    ids=["cpu", "all"],
)
def test_exported_for(platforms: list[str], kernels: set[str]):
    """Each platform's kernel, XLA's loops where there is none; what is exported for several runs here."""
    function, given = jax.jit(functools.partial(attention, pattern=PATTERN)), inputs()
    exported = jax.export.export(function, platforms=platforms)(*given)
    text = exported.mlir_module()
    assert {name for name in (KERNEL, "tpu_custom_call") if name in text} == kernels
    if len(platforms) > 1:
        np.testing.assert_array_equal(exported.call(*given), function(*given))
