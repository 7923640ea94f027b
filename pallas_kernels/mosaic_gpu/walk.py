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
    mask_id: typing.Any
    group_head: typing.Any


class Cursor(typing.NamedTuple):
    """Where a walk stands.

    Attributes:
      turn: of the entries without a mask; those with one are walked in as many turns more.
      piece: the number of the piece in this turn.
    """

    group_head: typing.Any
    piece: typing.Any


class Walk:
    """The entries of one tile: where they stand in the lists, and how they fill steps.

    The entries without a mask that do not fill a step are walked with the masked ones.
    """

    def __init__(self, plan, blocks, mask_ids, ranges, group_heads: int = 1, first_group_head=0):
        """Args:
        plan: says how a step is filled.
        blocks, masks: int32 [entries], the lists.
        slices: int32 [ranges, 2], those of the tile.
        turns: how many heads walk the lists.
        first_turn: which head is the first.
        """
        self.plan, self.blocks, self.mask_ids, self.group_heads, self.first_group_head = (
            plan,
            blocks,
            mask_ids,
            group_heads,
            first_group_head,
        )
        parts = [(ranges[part, 0], ranges[part, 1]) for part in range(plan.num_ranges)]
        self.full_parts, self.masked_parts = parts[: plan.num_full_ranges], parts[plan.num_full_ranges :]
        # Of one turn, in pieces.
        self.full, self.masked = (_count(some) * plan.pieces_of_block for some in (self.full_parts, self.masked_parts))
        self.full_steps = group_heads * self.full // plan.slots
        left = group_heads * self.full - self.full_steps * plan.slots
        self.masked_steps = -(-(left + group_heads * self.masked) // plan.slots)

    def full_start(self) -> Cursor:
        """Where the steps without a mask begin."""
        return Cursor(jnp.int32(0), jnp.int32(0))

    def masked_start(self) -> Cursor:
        """Where they end."""
        walked = self.full_steps * self.plan.slots
        group_head = jnp.where(self.full > 0, walked // jnp.maximum(self.full, 1), self.group_heads)
        return Cursor(group_head, walked - group_head * self.full)

    def after(self, cursor: Cursor) -> Cursor:
        """One piece on."""
        piece = cursor.piece + 1
        ends = piece == jnp.where(cursor.group_head < self.group_heads, self.full, self.masked)
        return Cursor(cursor.group_head + ends.astype(jnp.int32), jnp.where(ends, 0, piece))

    def full_entry(self, cursor: Cursor) -> Entry:
        """One without a mask."""
        return self._entry(cursor.piece, self._position(cursor.piece, self.full_parts), cursor.group_head, None)

    def masked_entry(self, cursor: Cursor) -> Entry:
        """One of a masked step. Where nothing is left, the last one that was read, with a mask that hides it all."""
        group_head, piece = cursor
        exists = (group_head < self.group_heads) | ((group_head < 2 * self.group_heads) & (self.masked > 0))
        full = jnp.where(exists, group_head < self.group_heads, self.masked == 0)
        piece = jnp.where(exists, piece, jnp.where(full, self.full, self.masked) - 1)
        group_head = jnp.where(exists, jnp.where(full, group_head, group_head - self.group_heads), self.group_heads - 1)
        position = self._position(piece, self.masked_parts)
        if self.full_parts:
            position = jnp.where(full, self._position(piece, self.full_parts), position)
        return self._entry(piece, position, group_head, jnp.where(exists, self.mask_ids[position], EMPTY))

    def _entry(self, piece, position, group_head, mask_id) -> Entry:
        pieces = self.plan.pieces_of_block
        return Entry(
            self.blocks[position] * pieces + jax.lax.rem(piece, pieces), mask_id, self.first_group_head + group_head
        )

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
