"""How an implementation gets along with JAX's transformations, as one class of tests for every backend."""

import dataclasses
import functools
import importlib.util
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.op import LSE_NAME, OUT_NAME
from s2jax import BlockSelection, FirstTokens, LocalStride, attention
from tests.kernels import truth
from tests.kernels.cases import BY_NAME, EPS, Case, arrays
from tests.kernels.contract import arguments, assert_same_bits, results, traced
from tests.kernels.plain import error, plain

PATTERN = LocalStride(16, 1, 2) | FirstTokens(3)
CASE = Case("transformed", PATTERN, query_length=40, kv_length=40, features=8, value_features=8, sinks=True)
EMPTY_ROWS = dataclasses.replace(CASE, name="empty rows", pattern=LocalStride(16, 0, 4, head_offset=1), sinks=False)


WHERE = pytest.mark.parametrize(
    "inside", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["gradient inside", "gradient outside"]
)
PASSES = ("s2jax_forward", "s2jax_backward", "s2jax_tangents")


def passes(jaxpr) -> int:
    """The op's passes in a jaxpr, those of inner ones too: how much is computed."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name in PASSES
        count += sum(passes(inner) for inner in jaxprs_in_params(equation.params))
    return count


@pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")
@pytest.mark.usefixtures("strict_dtypes", "quick_compilation")
class TransformationContract:
    implementation: typing.ClassVar[str]
    config: typing.ClassVar[typing.Any] = None

    def attention(self, query, key, value, pattern=PATTERN, **options):
        return attention(query, key, value, pattern, implementation=self.implementation, config=self.config, **options)

    def gradients(self, *inputs, **options):
        """out, lse, and the gradients of a sum of both, of every input."""

        def total(*inputs):
            out, lse = self.attention(*inputs, return_lse=True, **options)
            return (out**2).sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum(), (out, lse)

        gradients, results = jax.grad(total, tuple(range(len(inputs))), has_aux=True)(*inputs)
        return *results, *gradients

    @staticmethod
    def inputs(*leading: int, length=40, heads=4, kv_heads=2):
        keys = jax.random.split(jax.random.key(len(leading)), 3)
        shapes = [(*leading, 2, length, count, 8) for count in (heads, kv_heads, kv_heads)]
        return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))

    # vmap

    def assert_maps(self, function, *mapped):
        """vmap gives what the calls give one by one."""
        together = jax.jit(jax.vmap(function))(*mapped)
        one = jax.jit(function)
        for index in range(len(mapped[0])):
            alone = one(*(array[index] for array in mapped))
            for found, expected in zip(together, alone, strict=True):
                assert_near(np.asarray(expected), found[index])

    def test_vmap_over_the_batch(self):
        self.assert_maps(self.gradients, *self.inputs(3))

    @pytest.mark.slow
    def test_vmap_over_offsets(self):
        query, key, value = self.inputs()
        self.assert_maps(
            lambda offset: self.gradients(query[:, :9], key, value, query_offset=offset), jnp.arange(0, 31, 15)
        )

    def test_gradient_of_a_vmap_over_offsets(self):
        """Queries and keys that all elements share have the sum of their gradients."""
        offsets = (0, 15, 30)

        def total(query, key, value, offset):
            return (self.attention(query[:, :9], key, value, query_offset=offset) ** 2).sum()

        def together(*inputs):
            return jax.vmap(functools.partial(total, *inputs))(jnp.asarray(offsets)).sum()

        def one_by_one(*inputs):
            return sum(total(*inputs, offset) for offset in offsets)

        inputs = self.inputs()
        found, expected = (jax.jit(jax.grad(function, (0, 1, 2)))(*inputs) for function in (together, one_by_one))
        for one, other in zip(found, expected, strict=True):
            assert_near(np.asarray(other), one)

    def test_vmap_over_selections(self):
        query, key, value = self.inputs()
        random = np.random.default_rng(0)
        blocks = random.permuted(np.broadcast_to(np.arange(3), (3, 1, 2, 3, 3)), axis=-1).astype(np.int32)
        counts = random.integers(0, 4, (3, 1, 2, 3)).astype(np.int32)

        def chosen(blocks, counts):
            return self.gradients(query, key, value, pattern=BlockSelection(blocks, counts, 16, 16))

        self.assert_maps(chosen, jnp.asarray(blocks), jnp.asarray(counts))

    # checkpoint and scan

    def loss_of_layers(self, wrap):
        """Three layers of attention in a `scan`, each rematerialised as `wrap` says."""

        def loss(query, key, value):
            layer = wrap(lambda x, _: (self.attention(x, key, value), None))
            return (jax.lax.scan(layer, query, None, length=3)[0] ** 2).sum()

        return loss

    def test_named_residuals_spare_the_forward_pass(self):
        """Under `save_only_these_names`, the backward pass computes no attention a second time."""
        policy = jax.checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME)
        wraps = {
            "kept": lambda layer: layer,
            "named": functools.partial(jax.checkpoint, policy=policy),
            "forgotten": jax.checkpoint,
        }
        inputs = self.inputs()
        gradients = {name: jax.grad(self.loss_of_layers(wrap), (0, 1, 2)) for name, wrap in wraps.items()}
        work = {name: passes(jax.make_jaxpr(function)(*inputs).jaxpr) for name, function in gradients.items()}
        assert work["named"] == work["kept"] < work["forgotten"]
        for found, expected in zip(*(jax.jit(gradients[name])(*inputs) for name in ("named", "kept")), strict=True):
            np.testing.assert_array_equal(found, expected)

    # grad of grad

    @pytest.mark.parametrize(
        "case", [CASE, pytest.param(EMPTY_ROWS, marks=pytest.mark.slow)], ids=lambda case: case.name
    )
    def test_gradient_of_the_gradient(self, case):
        """Reverse over reverse, against the plain computation in float64, by the same rule as the gradient itself."""
        given = arrays(case)
        mask = truth.token_mask(case, given)
        inputs = given.query, given.key, given.value, *([given.sinks] if case.sinks else [])
        places = tuple(range(len(inputs)))

        def second(function, dtype, *inputs):
            """The gradient of a product of the gradient with fixed numbers."""
            weights = [np.asarray(array[::-1], dtype) for array in inputs]

            def total(*inputs):
                out, lse = function(*inputs)
                return (out * given.dout.astype(dtype)).sum() + (lse * given.dlse.astype(dtype)).sum()

            def product(*inputs):
                gradients = jax.grad(total, places)(*inputs)
                return sum((each * weight).sum() for each, weight in zip(gradients, weights, strict=True))

            return jax.jit(jax.grad(product, places))(*(array.astype(dtype) for array in inputs))

        def naive(query, key, value, sinks=None):
            return plain(case.logit_scale, None, mask, query, key, value, sinks)

        ours = second(
            lambda q, k, v, s=None: self.attention(q, k, v, case.pattern, sinks=s, return_lse=True), np.float32, *inputs
        )
        rough = second(naive, np.float32, *inputs)
        with jax.enable_x64(True):
            exact = second(naive, np.float64, *inputs)
        for found, near, far in zip(ours, exact, rough, strict=True):
            # A rounding for each term of the sums over keys: the first gradient's cancellations are not known here.
            floor = case.kv_length * EPS["float32"] * float(np.abs(near).max())
            assert error(np.asarray(near), found) <= 2 * error(np.asarray(near), far) + floor

    # export and shard_map

    def test_export_round_trip(self):
        case = BY_NAME["an offset for each"]
        function, inputs = jax.jit(traced(case, self.implementation, self.config)), arguments(case, arrays(case))
        shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), inputs)
        exported = jax.export.export(function)(*shapes)
        if importlib.util.find_spec("flatbuffers"):  # which jax needs for this, and does not bring
            exported = jax.export.deserialize(exported.serialize())
        assert_same_bits(results(function(*inputs)), results(jax.jit(exported.call)(*inputs)), "exporting")

    @WHERE
    def test_inside_shard_map(self, inside: bool):
        """On each shard of the batch, in a `shard_map` of the caller's own, with its checks."""
        mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
        shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("data"),) * 3)
        inputs = self.inputs()
        if inside:
            function = shard(functools.partial(self.gradients, head_axis=()), out_specs=(P("data"),) * 5)
        else:
            local = functools.partial(self.attention, return_lse=True, head_axis=())
            sharded = shard(local, out_specs=(P("data"),) * 2)

            def function(*inputs):
                (out, lse), pull = jax.vjp(sharded, *inputs)
                return out, lse, *pull((2 * out, jnp.ones_like(lse)))

        for found, expected in zip(jax.jit(function)(*inputs), jax.jit(self.gradients)(*inputs), strict=True):
            assert_near(np.asarray(expected), found)

    @WHERE
    def test_queries_split_and_keys_whole(self, inside: bool):
        """Every device has its own queries, at an offset of its own, and all keys, whose gradients are summed."""
        mesh = Mesh(np.array(jax.devices()[:2]), ("length",), axis_types=(AxisType.Auto,))
        split, whole = P(None, "length"), P()
        specs = {"in_specs": (split, whole, whole), "mesh": mesh}

        def total(query, key, value):
            offset = jax.lax.axis_index("length") * query.shape[1]
            out, lse = self.attention(query, key, value, query_offset=offset, return_lse=True, head_axis=())
            return (out**2).sum() + lse.sum()

        inputs = self.inputs()
        if inside:
            function = jax.shard_map(jax.grad(total, (0, 1, 2)), out_specs=(split, whole, whole), **specs)
        else:
            sums = jax.shard_map(lambda *inputs: total(*inputs)[None], out_specs=P("length"), **specs)
            function = jax.grad(lambda *inputs: sums(*inputs).sum(), (0, 1, 2))
        for one, other in zip(jax.jit(function)(*inputs), jax.jit(self.gradients)(*inputs)[2:], strict=True):
            assert_near(np.asarray(other), one)

    def test_heads_split_by_a_shard_map(self):
        """Every device has some of the heads, which read as the heads that they are."""
        inputs, mesh = self.inputs(), Mesh(np.array(jax.devices()[:2]), ("tensor",), axis_types=(AxisType.Auto,))
        heads = P(None, None, "tensor")
        local = functools.partial(self.gradients, head_axis="tensor")
        specs = {"in_specs": (heads,) * 3, "out_specs": (heads, P(None, "tensor"), *(heads,) * 3)}
        function = jax.jit(jax.shard_map(local, mesh=mesh, **specs))
        for found, expected in zip(function(*inputs), jax.jit(self.gradients)(*inputs), strict=True):
            assert_near(np.asarray(expected), found)

    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
    def test_over_a_mesh(self, kind):
        """Batch and heads split over four devices, each with its own heads' lists; nothing is communicated."""
        mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind,) * 2, devices=jax.devices()[:4])
        spec = P("data", None, "tensor", None)
        inputs = self.inputs()
        expected = jax.jit(self.gradients)(*inputs)
        with jax.set_mesh(mesh):
            options = {"query_spec": spec} if kind is AxisType.Auto else {}
            sharded = [jax.device_put(array, jax.NamedSharding(mesh, spec)) for array in inputs]
            function = jax.jit(functools.partial(self.gradients, **options)).lower(*sharded).compile()
            found = function(*sharded)
        for one, other in zip(found, expected, strict=True):
            assert_near(np.asarray(other), one)
        for collective in ("all-gather", "all-to-all", "collective-permute"):
            assert collective not in function.as_text()


def assert_near(expected: np.ndarray, found) -> None:
    """Equal but for the order of sums over at most 40 keys."""
    size = np.abs(expected, where=np.isfinite(expected), out=np.zeros(expected.shape)).max()
    assert error(expected, found) <= 40 * EPS["float32"] * max(1, float(size))
