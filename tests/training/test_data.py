"""The pipeline: the same rows in the same order whatever the processes, from any row on."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from training.corpus import Corpus
from training.data import Share, evaluation_batches, process_share, to_devices, training_batches
from training.mesh import AXES, BATCH_SPEC
from training.packing import PackedRows


@pytest.fixture
def rows(memory_document) -> PackedRows:
    """24 rows of 4 pairs, whose tokens all differ."""
    return PackedRows(Corpus((memory_document("d", tuple(range(97))),), False), 4)


def take(batches, count) -> np.ndarray:
    """Tokens of the next batches, row by row."""
    return np.concatenate([batch["tokens"] for batch in itertools.islice(batches, count)])


def test_an_epoch_has_every_row_once_and_the_next_is_shuffled_anew(rows):
    batches = training_batches(rows, batch_size=6, seed=3)
    first, second = take(batches, 4), take(batches, 4)
    assert sorted(first.ravel()) == sorted(second.ravel()) == list(range(96))
    assert first.tolist() != second.tolist()
    assert first.ravel().tolist() != list(range(96))


def test_the_order_is_the_seed_s(rows):
    first, again, other = (take(training_batches(rows, batch_size=6, seed=seed), 4).tolist() for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("first_row", [0, 12, 23, 24, 25, 300])
def test_going_on_from_a_row_is_having_come_there(rows, first_row):
    straight = take(training_batches(rows, batch_size=1, seed=0), first_row + 12)
    resumed = take(training_batches(rows, batch_size=4, seed=0, first_row=first_row), 3)
    assert resumed.tolist() == straight[first_row:].tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_the_shares_of_the_processes_are_the_batch(rows, count):
    whole = training_batches(rows, batch_size=6, seed=0, first_row=18)
    parts = [training_batches(rows, batch_size=6, seed=0, first_row=18, share=Share(i, count)) for i in range(count)]
    for _ in range(5):
        assert take(whole, 1).tolist() == np.concatenate([take(part, 1) for part in parts]).tolist()


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_scores_each_row_once_in_order(rows, count):
    parts = [list(evaluation_batches(rows, batch_size=10, share=Share(i, count))) for i in range(count)]
    batches = [np.concatenate([batch["tokens"] for batch in together]) for together in zip(*parts, strict=True)]
    masks = [np.concatenate([batch["loss_mask"] for batch in together]) for together in zip(*parts, strict=True)]
    assert [len(batch) for batch in batches] == [10, 10, 10]
    assert np.concatenate(batches)[np.concatenate(masks) == 1].tolist() == list(range(96))


def test_batches_come_to_lie_on_the_mesh_in_order(rows):
    mesh = jax.make_mesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    sharding = NamedSharding(mesh, BATCH_SPEC)
    assert process_share(sharding, 8) == Share(0, 1)
    batch = next(training_batches(rows, batch_size=8, seed=0))
    arrays = to_devices(batch, sharding, 8)
    assert arrays["tokens"].sharding.is_equivalent_to(sharding, 2)
    assert np.asarray(arrays["tokens"]).tolist() == batch["tokens"].tolist()


class _OfOneProcess:
    """A sharding as a process of several sees it: the slices of its own devices."""

    def __init__(self, *slices):
        self.slices = slices

    def addressable_devices_indices_map(self, _shape):
        return {i: (piece,) for i, piece in enumerate(self.slices)}


@pytest.mark.parametrize(
    ("slices", "share"),
    [
        ([slice(4, 6), slice(6, 8)], Share(1, 2)),
        ([slice(0, 8), slice(0, 8)], Share(0, 1)),  # a tensor axis over several processes: all hold all rows
        ([slice(None)], Share(0, 1)),
        ([slice(2, 4), slice(2, 4)], Share(1, 4)),
    ],
)
def test_a_process_loads_what_its_devices_hold(slices, share):
    assert process_share(_OfOneProcess(*slices), 8) == share


def test_rows_scattered_over_processes_are_refused():
    with pytest.raises(ValueError, match="equal, contiguous part"):
        process_share(_OfOneProcess(slice(0, 2), slice(4, 6)), 8)
