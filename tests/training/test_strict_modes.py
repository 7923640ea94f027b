"""A run's functions under JAX's strict modes, from the weights to a sample: compiled, called, and fed from the host."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import strict_modes
from training.data import to_devices
from training.evaluate import sample_text
from training.mesh import batch_sharding
from training.step import Trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::s2jax.PatternWarning"),
]

ALL, SLOW = list(strict_modes.MODES), pytest.mark.slow


def config_of(config, optimizer: str, dtype: str, **changes):
    model = dataclasses.replace(config.model, num_layers=1, dense_layers=(), dtype=dtype)
    options = dataclasses.replace(config.optimizer, optimizer=optimizer)
    return dataclasses.replace(config, model=model, optimizer=dataclasses.replace(options, **changes))


@pytest.mark.parametrize(
    ("optimizer", "dtype", "modes"),
    [
        pytest.param("adamw", "bfloat16", strict_modes.QUICK, id="adamw"),
        pytest.param("adamw", "bfloat16", ALL, id="adamw-all", marks=SLOW),
        pytest.param("muon", "float32", ALL, id="muon-all", marks=SLOW),
        *(pytest.param("muon", "bfloat16", [mode], id=f"muon-{mode}", marks=SLOW) for mode in ALL),
    ],
)
def test_a_step(small_config, one_device, random_batch, optimizer: str, dtype: str, modes: list[str]):
    config = config_of(small_config, optimizer, dtype)
    with strict_modes.on(*modes):
        trainer = Trainer(config, one_device)
        state = trainer.init(0)
        state, metrics = trainer.step(state, to_devices(random_batch(0), batch_sharding(one_device), 8))
        assert trainer.not_finite(state) == []
    assert {str(leaf.dtype) for leaf in (*jax.tree.leaves(state.params), *metrics)} == {"float32"}
    assert np.isfinite(jax.device_get(metrics)).all()


@SLOW
@pytest.mark.parametrize("modes", [ALL, *([mode] for mode in ALL)], ids=lambda modes: "all" if modes[1:] else modes[0])
def test_parts_evaluation_and_sample(small_config, one_device, random_batch, modes: list[str]):
    """A step whose batch comes in parts, losses of targets, and a drawn text; all the same without any mode."""

    def run() -> tuple[float, np.ndarray, str]:
        trainer = Trainer(config_of(small_config, "adamw", "float32", accumulate=2), one_device)
        batch = to_devices(random_batch(0), batch_sharding(one_device), 8)
        state, metrics = trainer.step(trainer.init(0), batch)
        text = sample_text(trainer, state.params, prompt="so ", length=8, temperature=1.0, seed=3)
        return jax.device_get(metrics.loss), jax.device_get(trainer.token_nll(state.params, batch)), text

    with strict_modes.on(*modes):
        loss, losses, text = run()
    expected_loss, expected_losses, expected_text = run()
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4, atol=1e-5)
    assert losses.dtype == jnp.float32
    assert "x64" in modes or text == expected_text  # a 64-bit session draws other numbers
