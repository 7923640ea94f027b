"""How one block of threads walks its tile's lists: in steps without a mask first, then in masked ones."""

import typing

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.tables import EMPTY


class Entry(typing.NamedTuple):
    """What a slot of a step holds.

    Attributes:
      piece: the number of the piece of tokens, in slots.
      kind: of its mask; None where nothing is masked.
      turn: which of the heads that walk the same lists one after the other.
    """

    piece: typing.Any
    kind: typing.Any
    turn: typing.Any


class Walk:
    """The entries of one tile: where they stand in the lists, and how they fill steps.

    The entries without a mask that do not fill a step are walked with the masked ones.
    """

    def __init__(self, plan, blocks, masks, slices, turns: int = 1):
        """Args:
        plan: says how a step is filled.
        blocks, masks: int32 [entries], the lists.
        slices: int32 [parts, 2], those of the tile.
        turns: how many heads walk the lists.
        """
        self.plan, self.blocks, self.masks, self.turns = plan, blocks, masks, turns
        parts = [(slices[part, 0], slices[part, 1]) for part in range(plan.num_parts)]
        self.full_parts, self.masked_parts = parts[: plan.num_full], parts[plan.num_full :]
        self.full, self.masked = _count(self.full_parts), _count(self.masked_parts)
        pieces = turns * plan.pieces_of_block
        self.full_steps = self.full * pieces // plan.slots
        self.left = self.full * pieces - self.full_steps * plan.slots
        self.masked_pieces = self.left + self.masked * pieces
        self.masked_steps = -(-self.masked_pieces // plan.slots)

    def full_entry(self, step, slot: int) -> Entry:
        """A slot of a step without a mask."""
        piece, _, turn = self._entry(step * self.plan.slots + slot, self.full, self.full_parts)
        return Entry(piece, None, turn)

    def masked_entry(self, step, slot: int) -> Entry:
        """A slot of a masked step. Where nothing is left, something that was read, with a mask that hides it all."""
        entry = step * self.plan.slots + slot
        exists = entry < self.masked_pieces
        entry = jnp.minimum(entry, self.masked_pieces - 1)
        first = self.full_steps * self.plan.slots
        if self.turns == 1:
            # The masked entries go on where the others end.
            piece, position, turn = self._entry(first + entry, None, self.full_parts + self.masked_parts)
        else:
            left = self._entry(jnp.minimum(first + entry, first + self.left - 1), self.full, self.full_parts)
            masked = self._entry(jnp.maximum(entry - self.left, 0), self.masked, self.masked_parts)
            piece, position, turn = (jnp.where(entry < self.left, *pair) for pair in zip(left, masked, strict=True))
        return Entry(piece, jnp.where(exists, self.masks[position], EMPTY), turn)

    def _entry(self, entry, count, parts: list):
        """The piece, the position in the lists and the turn of an entry; `count` blocks are walked in every turn."""
        pieces = self.plan.pieces_of_block
        entry, piece_of_block, turn = entry // pieces, jax.lax.rem(entry, pieces), 0
        if not parts:
            return 0, 0, 0
        if self.turns > 1:
            count = jnp.maximum(count, 1)
            turn, entry = entry // count, jax.lax.rem(entry, count)
        (start, stop), *rest = parts
        position, end = start + entry, stop - start
        for start, stop in rest:
            position = jnp.where(entry >= end, start + entry - end, position)
            end = end + stop - start
        if self.turns > 1:
            # Where there is nothing to walk, what comes out is not used; but it is read.
            position = jnp.clip(position, 0, self.blocks.shape[0] - 1)
        return self.blocks[position] * pieces + piece_of_block, position, turn


def _count(parts: list):
    return sum((stop - start for start, stop in parts), jnp.int32(0))
