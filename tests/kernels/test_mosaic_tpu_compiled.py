"""The TPU kernels compiled for TPUs that are not here: what the interpreter takes, the compilers need not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import s2jax
from benchmarks.compiled.deviceless import compile_for, devices, missing
from pallas_kernels.mosaic_tpu import SCALAR_BYTES
from pallas_kernels.mosaic_tpu.config import choose_config, choose_kv_grad_config
from pallas_kernels.mosaic_tpu.entries import kv_tables, q_tables

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
WINDOW = s2jax.LocalStride(64, 4, 8)

pytestmark = [
    pytest.mark.skipif(missing("v5e:2x2") is not None, reason=str(missing("v5e:2x2"))),
    pytest.mark.filterwarnings("ignore::s2jax.PatternWarning"),
]


def compiled(chip: str, pattern, tokens: int, heads: int, kv_heads: int, d: int = 128, e: int = 128, **options):
    """Forward and backward."""
    dtype, segments = options.pop("dtype", "bfloat16"), options.pop("segments", False)

    def function(query, key, value, dout, ids):
        given = {"query_segment_ids": ids, "kv_segment_ids": ids} if segments else {}

        def attend(*arrays):
            return s2jax.attention(*arrays, pattern, implementation="mosaic_tpu", **options, **given)

        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(dout)

    shapes = [
        jax.ShapeDtypeStruct((1, tokens, n, f), dtype)
        for n, f in ((heads, d), (kv_heads, d), (kv_heads, e), (heads, e))
    ]
    return compile_for(CHIPS[chip], function, *shapes, jax.ShapeDtypeStruct((1, tokens), jnp.int32))


@pytest.mark.parametrize("chip", [pytest.param(each, marks=[pytest.mark.slow] * (each != "v5e")) for each in CHIPS])
def test_every_chip(chip):
    compiled(chip, WINDOW, 2048, 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "heads", "kv_heads", "d", "e", "options"),
    [
        (s2jax.LocalStride(16, 8, 8), 4, 4, 64, 64, {}),
        (s2jax.LocalStride(512, 1, 2), 4, 4, 128, 128, {}),
        (s2jax.LocalStride(128, 2, 4), 9, 3, 256, 256, {}),
        (s2jax.LocalStride(64, 4, 8, residues="query_head"), 8, 2, 96, 200, {"logits_soft_cap": 30.0}),
        (WINDOW, 4, 2, 128, 128, {"segments": True}),
        (WINDOW, 4, 2, 128, 128, {"dtype": "float32"}),
        (s2jax.Dense(causal=False), 4, 4, 128, 128, {}),
    ],
)
def test_shapes(pattern, heads, kv_heads, d, e, options):
    compiled("v5e", pattern, 2048, heads, kv_heads, d, e, **options)


def gradients(*arrays, sinks=None, **options):
    query, key, value, dout = arrays
    out, pull = jax.vjp(
        lambda *given: s2jax.attention(*given[:3], WINDOW, sinks=given[3], implementation="mosaic_tpu", **options),
        query, key, value, sinks,
    )  # fmt: skip
    return out, pull(dout)


@pytest.mark.slow
@pytest.mark.parametrize("sinks", [None, 0])
def test_vmap(sinks):
    """Of sequences; and of sinks too, which have no axis for them."""
    shapes = [jax.ShapeDtypeStruct((3, 1, 1024, heads, 128), jnp.bfloat16) for heads in (4, 2, 2, 4)]
    mapped = jax.vmap(lambda *arrays: gradients(*arrays[:4], sinks=arrays[4]), in_axes=(0, 0, 0, 0, sinks))
    compile_for("v5e:2x2", mapped, *shapes, jax.ShapeDtypeStruct((4,) if sinks is None else (3, 4), jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize("segments", [False, True])
def test_mesh(segments):
    """Batch and heads over four chips, with no communication."""
    chips, kinds = np.array(devices("v5e:2x2")).reshape(2, 2), (AxisType.Auto,) * 2
    mesh = jax.sharding.Mesh(chips, ("data", "model"), axis_types=kinds)
    spec = PartitionSpec("data", None, "model", None)

    def function(query, key, value, dout, ids):
        given = {"query_segment_ids": ids, "kv_segment_ids": ids} if segments else {}
        return gradients(query, key, value, dout, query_spec=spec, **given)

    whole, by_batch = NamedSharding(mesh, spec), NamedSharding(mesh, PartitionSpec("data"))
    shapes = [jax.ShapeDtypeStruct((2, 1024, heads, 128), jnp.bfloat16, sharding=whole) for heads in (8, 4, 4, 8)]
    with jax.set_mesh(mesh):
        code = compile_for(
            "v5e:2x2", function, *shapes, jax.ShapeDtypeStruct((2, 1024), jnp.int32, sharding=by_batch)
        ).as_text()
    assert not any(name in code for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


@pytest.mark.slow
def test_lists_too_long_for_the_gradients_are_left_to_xla():
    """Sixteen heads of a group that read apart: the forward pass keeps its kernel."""
    pattern = s2jax.LocalStride(16, 16, 8, residues="query_head")
    code = compiled("v5e", pattern, 64 << 10, 8, 1).as_text()
    assert "s2jax_forward" in code
    assert "s2jax_key_gradients" not in code


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [8 << 10, 128 << 10])
@pytest.mark.parametrize("chip", CHIPS)
def test_memory(chip, tokens):
    """What the call takes besides its arguments and results is at most three times those, at any length."""
    memory = compiled(chip, s2jax.LocalStride(), tokens, 32, 8).memory_analysis()
    assert memory.temp_size_in_bytes < 3 * (memory.argument_size_in_bytes + memory.output_size_in_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_a_million_tokens(chip):
    """One of 64 heads' share of them."""
    compiled(chip, s2jax.LocalStride(64, 1, 64), 1 << 20, 1, 1)


@pytest.mark.parametrize(("tokens", "most"), [(32 << 10, 12), (128 << 10, 64)])
def test_scalar_memory(tokens, most):
    """Kilobytes for one head of 64, forward and backward."""
    pattern = s2jax.LocalStride(64, 1, 64)
    schedule = s2jax.compile_schedule(pattern, num_heads=64, num_kv_heads=64, query_length=tokens, kv_length=tokens)
    shapes = schedule, 64, 64, tokens, tokens
    forward = q_tables(schedule, choose_config(*shapes))
    backward = kv_tables(schedule, choose_kv_grad_config(*shapes)).queries
    assert max(forward.scalar_bytes, backward.scalar_bytes) <= min(most << 10, SCALAR_BYTES)
