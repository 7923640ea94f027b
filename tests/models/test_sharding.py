"""Partition specs by parameter path."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from models import Transformer, partition_specs, presets

CONFIG = dataclasses.replace(presets["tiny"], num_layers=2, tie_embeddings=False)


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
    for name in presets:
        model = nnx.eval_shape(lambda name=name: Transformer(presets[name], rngs=nnx.Rngs(0)))
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
