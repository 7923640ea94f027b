"""Small configs, meshes and documents that several training tests share."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from training.config import Config, DataOptions, ModelOptions, OptimizerOptions, recipe
from training.mesh import AXES


@dataclasses.dataclass(frozen=True)
class MemoryDocument:
    """A document that is a tuple of tokens."""

    name: str
    stream: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.stream)

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.array(self.stream[start:stop], np.int32)


@pytest.fixture(scope="session")
def memory_document():
    return MemoryDocument


@pytest.fixture(scope="session")
def small_model() -> ModelOptions:
    """Two layers, dense and sparse, that compile in seconds."""
    return dataclasses.replace(
        recipe("tiny").model,
        num_layers=2,
        d_model=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=48,
        pattern="LocalStride(16, 1, 2)",
        dense_layers=(0,),
    )


@pytest.fixture(scope="session")
def small_config(small_model) -> Config:
    return Config(
        small_model,
        steps=8,
        input=DataOptions(seq_len=64, batch_size=8),
        optimizer=OptimizerOptions(warmup_steps=2),
    )


@pytest.fixture(scope="session")
def one_device() -> Mesh:
    """A mesh of the first device alone, whatever the number of devices."""
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES, axis_types=(AxisType.Explicit,) * 3)


@pytest.fixture(scope="session")
def random_batch():
    """Makes batches [b, t] of two segments a row, with some targets that do not count."""

    def make(seed: int, batch_size: int = 8, length: int = 64) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        cut = length // 3
        place = np.broadcast_to(np.arange(length), (batch_size, length))
        return {
            "tokens": rng.integers(0, 257, (batch_size, length), np.int32),
            "targets": rng.integers(0, 257, (batch_size, length), np.int32),
            "segment_ids": np.where(place < cut, 1, 2).astype(np.int32),
            "positions": np.where(place < cut, place, place - cut).astype(np.int32),
            "loss_mask": (rng.random((batch_size, length)) < rng.random((batch_size, 1))).astype(np.float32),
        }

    return make
