"""Packs documents into rows of one length, so that no token is wasted on padding and none is left out.

The (input, target) pairs of all documents, one document after another, form one long line; row `i` is its `i`-th piece
of `length` pairs. A long document thus lies in consecutive whole rows, its far context real; several short ones share a
row, told apart by segment ids. A pair never spans two documents, so no target crosses a boundary.
"""

from __future__ import annotations

from typing import TypedDict, cast

import numpy as np
from jaxtyping import Float, Int

from training.corpus import Corpus


class Row(TypedDict):
    """One row, or rows stacked to a batch: `t` pairs, and what each pair needs to know of its document."""

    tokens: Int[np.ndarray, "*b t"]  # inputs
    targets: Int[np.ndarray, "*b t"]  # tokens[i] is followed by targets[i]
    segment_ids: Int[np.ndarray, "*b t"]  # 1, 2, … by document within the row; 0 where nothing is
    positions: Int[np.ndarray, "*b t"]  # from 0 at the first token of each segment
    loss_mask: Float[np.ndarray, "*b t"]  # 1 where the pair counts


def empty_row(length: int) -> Row:
    """A row that holds nothing and weighs nothing: it fills the last batch of an evaluation."""
    tokens, targets, segment_ids, positions = np.zeros((4, length), np.int32)
    loss_mask = np.zeros(length, np.float32)
    return Row(tokens=tokens, targets=targets, segment_ids=segment_ids, positions=positions, loss_mask=loss_mask)


def arrays(row: Row) -> dict[str, np.ndarray]:
    """The arrays of a row or batch by name, for what treats all alike."""
    return cast(dict[str, np.ndarray], row)


class PackedRows:
    """Random access to the rows of a corpus; holds one number per document.

    With `overlap`, each row opens with the last `overlap` pairs of the row before as context only (not counted), so
    every pair still counts once. That is for evaluation; training rows do not overlap.
    """

    def __init__(self, corpus: Corpus, length: int, *, overlap: int = 0):
        if not 0 <= overlap < length:
            raise ValueError(f"expected an overlap from 0 to {length - 1}, got {overlap}")
        self.documents = corpus.documents
        self.length = length
        self.overlap = overlap
        pairs = np.array([document.length - 1 for document in corpus.documents], np.int64)
        self.ends = np.cumsum(pairs)
        self.starts = self.ends - pairs
        self.num_pairs = int(self.ends[-1])

    def __len__(self) -> int:
        """Rows it takes to count every pair once."""
        beyond_first = max(0, self.num_pairs - self.length)
        return 1 + -(-beyond_first // (self.length - self.overlap))

    def __getitem__(self, index: int) -> Row:
        first = index * (self.length - self.overlap)
        last = min(first + self.length, self.num_pairs)
        row = empty_row(self.length)
        place, segment = first, 0
        document = int(np.searchsorted(self.ends, first, side="right"))
        while place < last:
            stop = min(int(self.ends[document]), last)
            offset = place - int(self.starts[document])
            stream = self.documents[document].read(offset, offset + stop - place + 1)
            segment += 1
            here = slice(place - first, stop - first)
            row["tokens"][here] = stream[:-1]
            row["targets"][here] = stream[1:]
            row["segment_ids"][here] = segment
            row["positions"][here] = np.arange(stop - place)
            row["loss_mask"][here] = 1
            place, document = stop, document + 1
        if index:
            row["loss_mask"][: self.overlap] = 0
        return row
