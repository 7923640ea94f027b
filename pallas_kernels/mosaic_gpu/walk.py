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
      turn: which head of those that walk one after the other.
    """

    piece: typing.Any
    kind: typing.Any
    turn: typing.Any


class Cursor(typing.NamedTuple):
    """Where a walk stands.

    Attributes:
      turn: of the entries without a mask; those with one are walked in as many turns more.
      piece: the number of the piece in this turn.
    """

    turn: typing.Any
    piece: typing.Any


class Walk:
    """The entries of one tile: where they stand in the lists, and how they fill steps.

    The entries without a mask that do not fill a step are walked with the masked ones.
    """

    def __init__(self, plan, blocks, masks, slices, turns: int = 1, first_turn=0):
        """Args:
        plan: says how a step is filled.
        blocks, masks: int32 [entries], the lists.
        slices: int32 [parts, 2], those of the tile.
        turns: how many heads walk the lists.
        first_turn: which head is the first.
        """
        self.plan, self.blocks, self.masks, self.turns, self.first_turn = plan, blocks, masks, turns, first_turn
        parts = [(slices[part, 0], slices[part, 1]) for part in range(plan.num_parts)]
        self.full_parts, self.masked_parts = parts[: plan.num_full], parts[plan.num_full :]
        # Of one turn, in pieces.
        self.full, self.masked = (_count(some) * plan.pieces_of_block for some in (self.full_parts, self.masked_parts))
        self.full_steps = turns * self.full // plan.slots
        left = turns * self.full - self.full_steps * plan.slots
        self.masked_steps = -(-(left + turns * self.masked) // plan.slots)

    def full_start(self) -> Cursor:
        """Where the steps without a mask begin."""
        return Cursor(jnp.int32(0), jnp.int32(0))

    def masked_start(self) -> Cursor:
        """Where they end."""
        walked = self.full_steps * self.plan.slots
        turn = jnp.where(self.full > 0, walked // jnp.maximum(self.full, 1), self.turns)
        return Cursor(turn, walked - turn * self.full)

    def after(self, cursor: Cursor) -> Cursor:
        """One piece on."""
        piece = cursor.piece + 1
        ends = piece == jnp.where(cursor.turn < self.turns, self.full, self.masked)
        return Cursor(cursor.turn + ends.astype(jnp.int32), jnp.where(ends, 0, piece))

    def full_entry(self, cursor: Cursor) -> Entry:
        """One without a mask."""
        return self._entry(cursor.piece, self._position(cursor.piece, self.full_parts), cursor.turn, None)

    def masked_entry(self, cursor: Cursor) -> Entry:
        """One of a masked step. Where nothing is left, the last one that was read, with a mask that hides it all."""
        turn, piece = cursor
        exists = (turn < self.turns) | ((turn < 2 * self.turns) & (self.masked > 0))
        full = jnp.where(exists, turn < self.turns, self.masked == 0)
        piece = jnp.where(exists, piece, jnp.where(full, self.full, self.masked) - 1)
        turn = jnp.where(exists, jnp.where(full, turn, turn - self.turns), self.turns - 1)
        position = self._position(piece, self.masked_parts)
        if self.full_parts:
            position = jnp.where(full, self._position(piece, self.full_parts), position)
        return self._entry(piece, position, turn, jnp.where(exists, self.masks[position], EMPTY))

    def _entry(self, piece, position, turn, kind) -> Entry:
        pieces = self.plan.pieces_of_block
        return Entry(self.blocks[position] * pieces + jax.lax.rem(piece, pieces), kind, self.first_turn + turn)

    def _position(self, piece, parts: list):
        """Where in the lists a piece of one turn stands."""
        if not parts:
            return 0
        entry = piece // self.plan.pieces_of_block
        (start, stop), *rest = parts
        position, end = start + entry, stop - start
        for start, stop in rest:
            position = jnp.where(entry >= end, start + entry - end, position)
            end = end + stop - start
        return position


def _count(parts: list):
    return sum((stop - start for start, stop in parts), jnp.int32(0))
