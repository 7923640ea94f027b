"""One step: the same on one device, on eight, and in parts."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from training.config import Config, DeviceOptions, ModelOptions
from training.data import to_devices
from training.mesh import batch_sharding, make_mesh, with_batch_size
from training.step import Trainer, accumulated_gradient

EIGHT = DeviceOptions((2, 2, 2))


def losses(trainer: Trainer, batches) -> list[float]:
    state = trainer.init(0)
    result = []
    for batch in batches:
        state, metrics = trainer.step(state, to_devices(batch, batch_sharding(trainer.mesh), 8))
        result.append(float(metrics.loss))
    return result


def changed(config: Config, **optimizer) -> Config:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **optimizer))


@pytest.fixture(scope="module")
def eight_devices(small_config):
    return make_mesh(dataclasses.replace(small_config, devices=EIGHT))


@pytest.fixture(scope="module")
def batches(random_batch):
    return [random_batch(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def adam_losses(small_config, one_device, batches):
    """Of AdamW on one device, each batch whole: what the variants are compared to (Muon takes long to compile)."""
    return losses(Trainer(changed(small_config, optimizer="adamw"), one_device), batches)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_eight_devices_give_the_losses_of_one(small_config, eight_devices, batches, adam_losses, parts):
    config = changed(small_config, optimizer="adamw", accumulate=parts)
    np.testing.assert_allclose(losses(Trainer(config, eight_devices), batches), adam_losses, atol=1e-5, rtol=0)
    assert len(set(np.round(adam_losses, 4))) == len(batches)  # the weights moved


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one_under_muon(small_config, one_device, eight_devices, batches):
    single, sharded = (losses(Trainer(small_config, mesh), batches) for mesh in (one_device, eight_devices))
    np.testing.assert_allclose(sharded, single, atol=1e-5, rtol=0)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_state_lies_split_over_the_mesh(small_config, eight_devices, optimizer):
    options = dataclasses.replace(small_config.optimizer, optimizer=optimizer)
    trainer = Trainer(dataclasses.replace(small_config, optimizer=options), eight_devices)
    leaves = jax.tree_util.tree_flatten_with_path(trainer.shardings)[0]
    specs = {jax.tree_util.keystr(path, simple=True, separator="."): s.spec for path, s in leaves}
    params = {name.removeprefix("params."): spec for name, spec in specs.items() if name.startswith("params.")}
    assert params["layers.0.attention.query.kernel"] == PartitionSpec("fsdp", "tensor", None)
    moments = 0
    for name, spec in specs.items():
        if name.startswith("opt_state."):
            owner = next((param for param in params if name.endswith(f".{param}")), None)
            assert spec == (params[owner] if owner else PartitionSpec())
            moments += owner is not None
    matrices = sum(name.startswith("layers") and name.endswith("kernel") for name in params)
    assert moments == 2 * len(params) - (matrices if optimizer == "muon" else 0)  # Muon keeps one moment
    state = trainer.init(0)
    for array, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(trainer.shardings), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)


def test_steps_and_scores_are_traced_once(small_config, one_device, batches, monkeypatch):
    """Neither the step count, a restored state nor other weights compile anything again."""
    chex.clear_trace_counter()
    for name in ("_step", "_token_nll"):  # the loss is traced in the step, too
        monkeypatch.setattr(Trainer, name, chex.assert_max_traces(getattr(Trainer, name), 1 + (name == "_token_nll")))
    trainer = Trainer(changed(small_config, optimizer="adamw"), one_device)
    state = trainer.init(0)
    for batch in batches:
        on_device = to_devices(batch, batch_sharding(one_device), 8)
        trainer.token_nll(state.params, on_device)
        state, _ = trainer.step(state, on_device)
        state = jax.device_put(jax.device_get(state), trainer.shardings)
    assert int(state.step) == len(batches)


@pytest.mark.slow
def test_initial_weights_do_not_depend_on_the_mesh(small_config, one_device, eight_devices):
    single, sharded = (Trainer(small_config, mesh).init(7).params for mesh in (one_device, eight_devices))
    chex.assert_trees_all_close(single, sharded, rtol=1e-6)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_batch_in_parts_has_the_gradient_of_the_batch(random_batch, parts):
    """Rows count for very different shares, so that a mean of the parts' means would be another."""
    batch = random_batch(0)

    def summed_loss(weight, part):
        return (part["loss_mask"] * jnp.sin(weight * part["tokens"] + part["targets"])).sum()

    loss, gradient = accumulated_gradient(summed_loss, 0.3, batch, parts)
    expected = jax.value_and_grad(lambda weight: summed_loss(weight, batch) / batch["loss_mask"].sum())(0.3)
    np.testing.assert_allclose((loss, gradient), expected, rtol=1e-4)


def test_a_batch_that_counts_nothing_has_no_gradient(random_batch):
    batch = {**random_batch(0), "loss_mask": np.zeros((8, 64), np.float32)}
    loss, gradient = accumulated_gradient(lambda w, part: (w * part["loss_mask"]).sum(), 0.3, batch, 2)
    assert (float(loss), float(gradient)) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [pytest.param("attention", marks=pytest.mark.slow), "full"])
def test_what_is_computed_anew_changes_nothing(small_config, one_device, batches, adam_losses, remat):
    config = changed(small_config, optimizer="adamw")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
    np.testing.assert_allclose(losses(Trainer(config, one_device), batches), adam_losses, atol=2e-6, rtol=0)


def test_bfloat16_computes_on_float32_parameters(small_config, one_device, random_batch):
    model = dataclasses.replace(small_config.model, dtype="bfloat16")
    trainer = Trainer(dataclasses.replace(small_config, model=model), one_device)
    state = trainer.init(0)
    chex.assert_type(jax.tree.leaves(state.params), jnp.float32)
    batch = to_devices(random_batch(0), batch_sharding(one_device), 8)
    exact = Trainer(small_config, one_device).token_nll(state.params, batch)
    rounded = trainer.token_nll(state.params, batch)
    assert 0 < np.abs(exact - rounded).max() < 0.1


def test_only_counted_targets_weigh(small_config, one_device, random_batch):
    trainer = Trainer(small_config, one_device)
    params, batch = trainer.init(0).params, random_batch(0)
    other = {**batch, "targets": np.where(batch["loss_mask"] > 0, batch["targets"], 5)}
    nll, same = (np.asarray(trainer.token_nll(params, dict(b))) for b in (batch, other))
    np.testing.assert_array_equal(nll, same)
    np.testing.assert_array_equal(nll > 0, batch["loss_mask"] > 0)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ((3, 1, 1), "counts for 8 devices, got 3 × 1 × 1 = 3"),
        ((3, -1, 1), "whose product divides 8 devices, got 3"),
        ((1, 2, 4), "tensor axis that divides 2 KV heads, got 4"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(small_config, mesh, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(dataclasses.replace(small_config, devices=DeviceOptions(mesh)))


@pytest.mark.parametrize("mesh", [(2, -1, 2), (-1, 2, 2), (2, 2, -1)])
def test_one_axis_takes_the_devices_that_are_left(small_config, mesh):
    made = make_mesh(dataclasses.replace(small_config, devices=DeviceOptions(mesh)))
    assert dict(made.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_the_batch_fills_the_mesh(small_config, eight_devices, one_device):
    def rows(asked: int, mesh, accumulate: int = 1) -> int:
        options = dataclasses.replace(small_config.input, batch_size=asked)
        config = changed(dataclasses.replace(small_config, input=options), accumulate=accumulate)
        return with_batch_size(config, mesh).input.batch_size

    assert rows(0, one_device) == 1
    assert rows(0, eight_devices) == 4
    assert rows(0, eight_devices, accumulate=3) == 12
    assert rows(8, eight_devices, accumulate=2) == 8
    with pytest.raises(ValueError, match="multiple of data × fsdp × --accumulate = 2 × 2 × 1, got 6"):
        rows(6, eight_devices)


def test_a_width_that_does_not_divide_is_refused(small_config):
    model: ModelOptions = dataclasses.replace(small_config.model, d_model=36)
    config = dataclasses.replace(small_config, model=model, devices=DeviceOptions((1, 8, 1)))
    with pytest.raises(ValueError, match=r"expected a fsdp axis that divides .*, got 8 for 36"):
        Trainer(config, make_mesh(config))
