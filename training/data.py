"""The input pipeline: packed rows, shuffled, batched, each process its own share of every batch.

The position is the number of rows that the whole run has taken so far, one integer, and no state of an iterator: a run
can go on with another number of processes, or another batch size, and no row is then read twice or left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from training.packing import PackedRows, Row, arrays, empty_row


@dataclass(frozen=True)
class Share:
    """This process loads the `index`-th of `count` equal parts of every batch."""

    index: int = 0
    count: int = 1


def process_share(sharding: NamedSharding, batch_size: int) -> Share:
    """The part of a batch `[b, ...]` that this process's devices hold under `sharding`.

    Processes that hold the same rows (the tensor axis may span several) get the same share and load the same rows.

    Raises:
        ValueError: the rows of this process are no equal part of the batch.
    """
    slices = [index[0] for index in sharding.addressable_devices_indices_map((batch_size,)).values() if index]
    low = min(s.start or 0 for s in slices)
    high = max(batch_size if s.stop is None else s.stop for s in slices)
    held = {row for s in slices for row in range(*s.indices(batch_size))}
    count, rest = divmod(batch_size, high - low)
    if rest or low % (high - low) or len(held) != high - low:
        raise ValueError(
            f"expected each process to hold an equal, contiguous part of the {batch_size} rows of a batch, got rows "
            f"{sorted(held)} for process {jax.process_index()}; put the data and fsdp axes of --mesh outermost"
        )
    return Share(low // (high - low), count)


def training_batches(
    rows: PackedRows, *, batch_size: int, seed: int, first_row: int = 0, share: Share = Share()
) -> Iterator[Row]:
    """Endless batches from row `first_row` of the shuffled order on; each epoch is shuffled anew, by `seed`.

    Returns:
        This process's share of each batch: arrays `[b / share.count, t]`.
    """
    order = cast(grain.MapDataset[Row], grain.MapDataset.source(rows)).seed(seed).shuffle().repeat()
    batches = order[first_row:].batch(batch_size // share.count, drop_remainder=True)[share.index :: share.count]
    # Two threads are ahead of any device: a row is a few reads of the page cache.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def evaluation_batches(rows: PackedRows, *, batch_size: int, share: Share = Share()) -> Iterator[Row]:
    """Every row once, in order; the last batch is filled up with empty rows."""
    per_process = batch_size // share.count
    empty = empty_row(rows.length)
    for start in range(0, len(rows), batch_size):
        first = start + share.index * per_process
        chosen = [rows[i] if i < len(rows) else empty for i in range(first, first + per_process)]
        yield cast(Row, {name: np.stack([row[name] for row in chosen]) for name in empty})


def to_devices(batch: Row, sharding: NamedSharding, batch_size: int) -> dict[str, Array]:
    """Assembles the shares of all processes to global arrays `[b, t]`."""
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (batch_size, array.shape[1]))
        for name, array in arrays(batch).items()
    }
