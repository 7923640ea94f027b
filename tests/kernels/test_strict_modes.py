"""The op under JAX's strict modes: forward and backward, computed on a CPU and lowered for GPU and TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic import MosaicBackend
from s2jax import BlockSelection, LocalStride, attention
from tests import strict_modes
from tests.kernels.cases import Case, Selected, arrays, parameters
from tests.kernels.contract import arguments, traced

PATTERN = LocalStride(16, 1, 2)


def total(query, key, sinks, rest: dict, implementation: str | None = None, calls: slice = slice(None)):
    """A sum over several calls, each with other options; over some of them."""
    options = {"implementation": implementation, "sinks": sinks, "logits_soft_cap": 2.0}
    segments, strangers, offset, selection = (rest[name] for name in ("segments", "strangers", "offset", "selection"))
    ids = {"query_segment_ids": segments, "kv_segment_ids": segments}
    out, lse = attention(query, key, key, PATTERN, return_lse=True, **ids, **options)
    # Some rows read nothing.
    others = {"query_segment_ids": segments, "kv_segment_ids": strangers, "implementation": implementation}
    more = [
        lambda: attention(query, key, key, selection, **options),
        lambda: attention(query, key, key, PATTERN, **others),
        lambda: attention(query[:, :30], key, key, PATTERN, query_offset=offset, **options),
    ]
    outs = [out, *(each() for each in more[calls])]
    return sum(each.astype(jnp.float32).sum() for each in outs) + lse.astype(jnp.float32).sum()


def inputs(dtype: str = "float32") -> tuple:
    query, key = (jax.random.normal(jax.random.key(heads), (2, 40, heads, 16), dtype) for heads in (4, 2))
    segments = np.repeat([[1, 2], [3, 3]], 20, 1).astype(np.int32)
    blocks = np.broadcast_to(np.arange(2, dtype=np.int32), (1, 2, 3, 2))
    counts = np.full((1, 2, 3), 2, np.int32)
    rest = {
        "segments": jnp.asarray(segments),
        "strangers": jnp.asarray(np.where(segments == 2, -7, segments)),
        "offset": jnp.asarray([3, 10], jnp.int32),
        "selection": BlockSelection(jnp.asarray(blocks), jnp.asarray(counts), 16, 16),
    }
    return query, key, jnp.asarray([0.5, -1, 0, 2], jnp.float32), rest


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("implementation", "modes"),
    [
        pytest.param("xla", strict_modes.QUICK, id="xla"),
        pytest.param("xla", list(strict_modes.MODES), id="xla-leaks", marks=pytest.mark.slow),
        pytest.param("reference", list(strict_modes.MODES), id="reference-leaks", marks=pytest.mark.slow),
    ],
)
def test_gradients_under_all_modes(implementation: str, modes: list[str]):
    given = inputs()
    gradients = jax.jit(jax.grad(functools.partial(total, implementation=implementation), (0, 1, 2)))
    with strict_modes.on(*modes):
        found = jax.block_until_ready(gradients(*given))
    assert all(np.isfinite(each).all() and each.dtype == jnp.float32 for each in found)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@strict_modes.EACH
def test_gradients(mode: str, implementation: str):
    given = inputs()
    gradients = jax.jit(jax.grad(functools.partial(total, implementation=implementation), (0, 1, 2)))
    with strict_modes.on(mode):
        found = jax.block_until_ready(gradients(*given))
    assert all(np.isfinite(each).all() and each.dtype == jnp.float32 for each in found)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("mode", ["debug infs", "transfer guard"])
def test_called_outside_of_jit(mode: str):
    """A row that reads nothing has an lse of -inf, of which nothing is seen by who did not ask for it."""
    query, key, _, rest = inputs()

    def loss(query):
        ids = {"query_segment_ids": rest["segments"], "kv_segment_ids": rest["strangers"]}
        return attention(query, key, key, PATTERN, **ids).sum()

    cotangent = jnp.ones(())
    with strict_modes.on(mode):
        value, pull = jax.vjp(loss, query)
        jax.block_until_ready((value, pull(cotangent)))


@pytest.mark.parametrize("calls", [slice(1), pytest.param(slice(1, None), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_are_lowered(platform: str, calls: slice):
    given = inputs("bfloat16")
    with strict_modes.on("rank promotion", "dtype promotion", "x64"):
        function = jax.jit(jax.grad(functools.partial(total, calls=calls), (0, 1, 2)))
        text = function.trace(*given).lower(lowering_platforms=(platform,)).as_text()
    assert {"cuda": "mosaic_gpu", "tpu": "tpu_custom_call"}[platform] in text


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("case", parameters())
@strict_modes.EACH
def test_every_case(mode: str, case: Case):
    """The whole table; lse itself, which may be -inf, is asked for here."""
    empty = case.segments == "strangers" or isinstance(case.pattern, Selected) or "empty" in case.name
    if (mode == "debug infs" and (empty or "nothing" in case.name)) or (case.dtype == "float64" and mode != "x64"):
        mode = "x64"
    given = jax.device_put(arguments(case, arrays(case)))
    with strict_modes.on(mode):
        jax.block_until_ready(jax.jit(traced(case, "xla"))(*given))


@pytest.mark.parametrize(
    "dtype", ["int64", *(pytest.param(name, marks=pytest.mark.slow) for name in ("uint64", "uint32", "int16"))]
)
def test_segment_ids_of_other_types(dtype: str):
    """Ids of any integers are told apart, those beyond 32 bits too."""
    query, key, *_ = inputs()
    ids = np.repeat([[1, 2], [3, 3]], 20, 1)
    expected = attention(query, key, key, PATTERN, query_segment_ids=ids, kv_segment_ids=ids)
    with jax.enable_x64(True):
        wide = ids + (1 << 40) * (ids == 2) if dtype.endswith("64") else ids
        given = jnp.asarray(wide, dtype)
        found = attention(query, key, key, PATTERN, query_segment_ids=given, kv_segment_ids=given)
    np.testing.assert_array_equal(found, expected)


def test_a_batch_of_none():
    query, key, *_ = inputs()
    out, lse = attention(query[:0], key[:0], key[:0], PATTERN, return_lse=True)
    assert out.shape == (0, 40, 4, 16)
    assert lse.shape == (0, 4, 40)
    gradient = jax.grad(lambda query: attention(query, key[:0], key[:0], PATTERN).sum())(query[:0])
    assert gradient.shape == (0, 40, 4, 16)


def test_export_with_a_symbolic_batch():
    """One export serves every batch size, by the path of plain XLA."""
    scope = jax.export.SymbolicScope()
    shapes = [
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"b, 40, {heads}, 16", scope=scope), jnp.float32)
        for heads in (4, 2, 2)
    ]
    exported = jax.export.export(jax.jit(functools.partial(attention, pattern=PATTERN)))(*shapes)
    query, key, *_ = inputs()
    for batch in (1, 2):
        given = query[:batch], key[:batch], key[:batch]
        np.testing.assert_allclose(exported.call(*given), attention(*given, PATTERN), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("quick_compilation")
def test_tangents():
    """Tangents of out and lse by gathered blocks, against those of the definition, and against the gradient."""
    query, key, sinks, rest = inputs()
    ids = {"query_segment_ids": rest["segments"], "kv_segment_ids": rest["segments"]}
    primals = query, key, sinks
    moved = tuple(jnp.cos(each) for each in primals)

    def function(query, key, sinks, implementation: str | None = None):
        options = {"sinks": sinks, "logits_soft_cap": 2.0, "return_lse": True, "implementation": implementation}
        return attention(query, key, key, PATTERN, **ids, **options)

    tangents = jax.jvp(function, primals, moved)[1]
    expected = jax.jvp(functools.partial(function, implementation="reference"), primals, moved)[1]
    for one, other in zip(tangents, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    weights = tuple(jnp.sin(each) for each in tangents)
    gradients = jax.vjp(function, *primals)[1](weights)
    forward, reverse = (
        sum(jnp.vdot(a, b) for a, b in zip(*pair, strict=True)) for pair in ((tangents, weights), (moved, gradients))
    )
    np.testing.assert_allclose(forward, reverse, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("implementation", ["xla", None])
def test_forward_mode(implementation: str | None):
    """Tangents against JAX's own of the definition; forward over reverse too."""
    query, key, sinks, rest = inputs()
    moved = tuple(jnp.cos(each) for each in (query, key, sinks))

    def found(name: str | None):
        function = functools.partial(total, rest=rest, implementation=name)
        tangent = jax.jvp(function, (query, key, sinks), moved)[1]
        return tangent, *jax.jvp(jax.grad(function, (0, 1, 2)), (query, key, sinks), moved)[1]

    for one, other in zip(found(implementation), found("reference"), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


def test_only_the_platform_in_play_is_traced(monkeypatch):
    """Lowered for a CPU, no GPU or TPU kernel is traced."""
    monkeypatch.setattr(MosaicBackend, "forward", None)
    query, key, *_ = (each.astype("bfloat16") for each in inputs()[:2])
    function = jax.jit(functools.partial(attention, pattern=LocalStride(16, 2, 2)))
    function.trace(query, key, key).lower(lowering_platforms=("cpu",))
