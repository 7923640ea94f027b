"""Models and batches that cannot fit are refused at once."""

import dataclasses

import jax
import pytest

from training import memory
from training.config import recipe
from training.mesh import AXES, with_batch_size


@pytest.fixture
def mesh(one_device):
    return one_device


def test_what_fits_is_let_through(mesh):
    memory.check_memory(with_batch_size(recipe("tiny"), mesh), mesh)


def test_a_model_that_does_not_fit_is_refused_with_what_it_takes(mesh, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda: 80e9)
    with pytest.raises(
        ValueError, match=r"in 80.0 GB a device, got one of 70,\d*,\d*,\d* parameters, which takes 8\d\d.\d GB"
    ):
        memory.check_memory(with_batch_size(recipe("s2-70b"), mesh), mesh)


def test_rows_that_do_not_fit_are_refused_and_accumulation_helps(mesh, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda: 1e9)
    config = recipe("tiny")
    config = dataclasses.replace(config, input=dataclasses.replace(config.input, batch_size=1024))
    with pytest.raises(
        ValueError, match=r"--seq-len, --batch-size: expected rows .* got 1,048,576 tokens at once on each"
    ):
        memory.check_memory(config, mesh)
    parts = dataclasses.replace(config.optimizer, accumulate=64)
    memory.check_memory(dataclasses.replace(config, optimizer=parts), mesh)


def test_more_devices_hold_more(monkeypatch):
    config = recipe("s2-7b")
    monkeypatch.setattr(memory, "device_memory", lambda: 80e9)
    model = jax.sharding.AbstractMesh((1, 8, 1), AXES)
    config = dataclasses.replace(config, input=dataclasses.replace(config.input, batch_size=8))
    memory.check_memory(config, model)
    with pytest.raises(ValueError, match=r"a model that can be trained in 80.0 GB a device"):
        memory.check_memory(config, jax.sharding.AbstractMesh((8, 1, 1), AXES))


def test_a_cpu_s_devices_share_the_machine_s_memory():
    assert memory.device_memory() * jax.local_device_count() > 1e9
