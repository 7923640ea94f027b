"""Partition specs by parameter path."""

import dataclasses
import functools
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from models import PRESETS, Transformer, partition_specs

COLLECTIVE = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\("
CONFIG = dataclasses.replace(PRESETS["tiny"], num_layers=2, tie_embeddings=False)


def test_specs_stand_in_the_places_of_the_parameters():
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    state, specs = nnx.state(model), partition_specs(model)
    assert jax.tree.structure(state) == jax.tree.structure(specs)
    assert specs["layers"][1]["attention"]["query"]["kernel"].get_value() == P("fsdp", "tensor", None)
    assert specs["layers"][1]["attention"]["out"]["kernel"].get_value() == P("tensor", None, "fsdp")
    assert specs["embed"]["embedding"].get_value() == P("tensor", "fsdp")
    assert specs["final_norm"]["scale"].get_value() == P()
    jax.tree.map(lambda array, spec: None if len(spec) in (0, array.ndim) else pytest.fail(f"{spec}"), state, specs)


def test_every_matrix_is_split_over_fsdp_and_tensor():
    for name in PRESETS:
        model = nnx.eval_shape(lambda name=name: Transformer(PRESETS[name], rngs=nnx.Rngs(0)))
        state = nnx.state(model)
        specs = jax.tree.leaves(partition_specs(state))
        for array, spec in zip(jax.tree.leaves(state), specs, strict=True):
            assert {axis for axis in spec if axis} == ({"fsdp", "tensor"} if array.ndim > 1 else set())
            assert all(size % 2 == 0 for size, axis in zip(array.shape, spec, strict=False) if axis)


def test_optimizer_states_follow_the_parameters():
    state = nnx.state(Transformer(CONFIG, rngs=nnx.Rngs(0)))
    specs = partition_specs(optax.adamw(1e-3).init(state))
    assert specs[0].mu["lm_head"]["kernel"].get_value() == P("fsdp", "tensor")
    assert specs[0].count == P()


@pytest.mark.parametrize(
    "state",
    [{"layers": {0: {"attention": {"gate": {"weight": jnp.ones((2, 2))}}}}}, {"query": {"kernel": jnp.ones((2, 2))}}],
    ids=["name", "rank"],
)
def test_unknown_parameters_are_refused(state):
    with pytest.raises(ValueError, match=r"no parameter of Transformer is called .*PARAMETER_SPECS"):
        partition_specs(state)


ON_EIGHT_DEVICES = r"""
import dataclasses, re, jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from models import Transformer, partition_specs, PRESETS

mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)
config = dataclasses.replace(PRESETS["tiny"], num_layers=2, d_ff=96)
tokens = jax.random.randint(jax.random.key(0), (4, 64), 0, 272)
graph, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
expected = nnx.merge(graph, state)(tokens)

state = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), state, partition_specs(state))
tokens = jax.device_put(tokens, NamedSharding(mesh, P(("data", "fsdp"))))
with jax.set_mesh(mesh):
    run = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens)).lower(state, tokens).compile()
np.testing.assert_allclose(run(state, tokens), expected, atol=1e-5)
# Each device has one sequence of 64: activations are gathered where a result has more than one, or all of 96 / 2.
gathered = re.findall(r"= f32\[([0-9,]+)\]\S* all-gather", run.as_text())
assert gathered and not any(shape.startswith(("2,64", "4,64", "1,64,96")) for shape in gathered), gathered
"""


def test_a_mesh_of_eight_gives_one_devices_logits_and_gathers_weights_not_activations():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-c", ON_EIGHT_DEVICES]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_caches_on_a_mesh_give_one_devices_logits_and_stay_where_they_are():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)
    config = dataclasses.replace(CONFIG, num_layers=1, dense_layers=(), implementation="reference")
    tokens = jax.random.randint(jax.random.key(0), (4, 21), 0, 272)
    graph, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    expected = jax.jit(lambda state: nnx.merge(graph, state)(tokens))(state)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
    def step(name, state, tokens, caches):
        return getattr(nnx.merge(graph, state), name)(tokens, caches, last=True)

    state = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), state, partition_specs(state))
    tokens = jax.device_put(tokens, NamedSharding(mesh, P(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        caches = nnx.merge(graph, state).create_caches(4, max_length=64)
        kept = caches[0].buffers[0].key
        split = NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
        first, caches = step("prefill", state, tokens[:, :20], caches)
        run = step.lower("extend", state, tokens[:, 20:], caches).compile()
        second, caches = run(state, tokens[:, 20:], caches)
    np.testing.assert_allclose(np.stack([first[:, 0], second[:, 0]], 1), expected[:, 19:], atol=1e-5)
    for each in (kept, *(cache.buffers[0].key for cache in caches)):
        assert each.sharding.is_equivalent_to(split, 5)
    # Activations of one token, and nothing of the cache or of the weights.
    lines = [line for line in run.as_text().splitlines() if re.search(COLLECTIVE, line)]
    sizes = [math.prod(map(int, re.findall(r"\[([\d,]+)\]", line)[0].split(","))) for line in lines]
    assert 0 < max(sizes) <= 4 * CONFIG.d_ff
