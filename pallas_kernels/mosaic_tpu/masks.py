"""Masks of a step's logits, from mask bits, block bits, segment ids and positions."""

import typing
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.config import LANES, SUBLANES, KernelSpec
from pallas_kernels.mosaic_tpu.primitives import broadcast_lanes
from pallas_kernels.mosaic_tpu.ring import Chunk
from pallas_kernels.tiling import WORD_BITS

HIDDEN_POSITION = 2**31 - 1
"""Position of the keys in a masked chunk, after every query."""


class MaskRefs(typing.NamedTuple):
    """Refs that masks are computed from; None if absent.

    Attributes:
      mask_bits: int32 [masks, words, columns].
      row_segment_ids: int32 [rows, LANES], the same in all lanes.
      row_positions: int32 [rows, LANES], the same in all lanes.
      column_segment_ids: int32 [tokens / LANES, LANES].
      first_position: position of the first streamed token, a scalar.
    """

    mask_bits: typing.Any
    row_segment_ids: typing.Any
    row_positions: typing.Any
    column_segment_ids: typing.Any
    first_position: typing.Any


def step_mask(spec: KernelSpec, refs: MaskRefs, chunks: list[Chunk]) -> Array:
    """The mask of a step: bool [tile_rows, step_size], True for logits that count."""
    masks = []
    if refs.mask_bits is not None:
        masks.append(_bit_mask(spec, refs.mask_bits, chunks))
    if spec.member_block_size is not None:
        masks.append(_block_bit_mask(spec, chunks))
    if refs.column_segment_ids is not None:
        ids = concat_chunks(spec, chunks, lambda chunk, _, lane: load_chunk(spec, refs.column_segment_ids, chunk, lane))
        masks.append(broadcast_lanes(refs.row_segment_ids[...], spec.step_size) == ids[:1])
    if refs.row_positions is not None:
        columns = _column_positions(spec, refs.first_position, chunks)
        rows = broadcast_lanes(refs.row_positions[...], spec.step_size)
        masks.append(columns <= rows if spec.rows_are_queries else columns >= rows)
    mask = masks[0]
    for each in masks[1:]:
        mask = mask & each
    return mask


def _bit_mask(spec: KernelSpec, mask_bits, chunks: list[Chunk]) -> Array:
    """The mask of token masks whose bits are rows: int32 words of up to 32 rows for every column."""
    word_rows = min(spec.tile_tokens, WORD_BITS)
    words = concat_chunks(spec, chunks, lambda chunk, *_: mask_bits[chunk.mask_id])
    bit = jnp.left_shift(1, jax.lax.broadcasted_iota(jnp.int32, (word_rows, spec.step_size), 0))
    masks = [
        jnp.broadcast_to(words[index : index + 1], bit.shape) & bit != 0
        for index in range(spec.tile_tokens // word_rows)
    ]
    return jnp.concatenate(masks * spec.tile_heads, 0)


def _block_bit_mask(spec: KernelSpec, chunks: list[Chunk]) -> Array:
    """The mask of entries that have one bit per block of the KV tile in place of a mask id."""
    assert spec.member_block_size is not None  # the caller checks it
    shape = SUBLANES, max(spec.chunk_size, LANES)
    bits = concat_chunks(spec, chunks, lambda chunk, *_: jnp.full(shape, chunk.mask_id, jnp.int32))
    row = jax.lax.broadcasted_iota(jnp.int32, (spec.tile_rows, spec.step_size), 0)
    block = row >> (spec.member_block_size.bit_length() - 1)
    return jnp.broadcast_to(bits[:1], block.shape) >> block & 1 != 0


def _column_positions(spec: KernelSpec, first_position, chunks: list[Chunk]) -> Array:
    """The position of every column: int32 [1, step_size]."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, max(spec.chunk_size, LANES)), 1)
    in_chunk = (lane & (spec.chunk_size - 1)) + first_position

    def positions(chunk: Chunk, *_) -> Array:
        found = chunk.token + in_chunk
        return (
            jnp.where(chunk.mask_id == spec.empty_mask_id, HIDDEN_POSITION, found) if spec.rows_are_queries else found
        )

    return concat_chunks(spec, chunks, positions)


def concat_chunks(spec: KernelSpec, chunks: list[Chunk], load: Callable[[Chunk, int, int], Array]) -> Array:
    """Concatenates what `load` returns for each head of each chunk: [rows, step_size].

    Args:
      load: function of a chunk, a head of the step and a lane. It returns [rows, chunk_size]; or for a chunk of fewer
        than LANES tokens [rows, LANES], with the chunk's tokens from the lane on.
    """
    pieces = [(chunk, head) for chunk in chunks for head in range(spec.step_heads)]
    per_register, registers = max(1, LANES // spec.chunk_size), []
    for first in range(0, len(pieces), per_register):
        found = load(*pieces[first], 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1)
        for index in range(1, per_register):
            first_lane = index * spec.chunk_size
            found = jnp.where(lane < first_lane, found, load(*pieces[first + index], first_lane))
        registers.append(found)
    return jnp.concatenate(registers, 1)


def load_chunk(spec: KernelSpec, table, chunk: Chunk, first_lane: int) -> Array:
    """A chunk's tokens of a table [tokens / LANES, LANES]: [SUBLANES, columns], all rows alike, from a lane on."""
    row = jax.lax.div(chunk.token, LANES)
    if spec.chunk_size >= LANES:
        found = [table[pl.ds(row + index, 1)] for index in range(spec.chunk_size // LANES)]
        return jnp.broadcast_to(jnp.concatenate(found, 1), (SUBLANES, spec.chunk_size))
    found = jnp.broadcast_to(table[pl.ds(row, 1)], (SUBLANES, LANES))
    shift = jax.lax.rem(first_lane + LANES - jax.lax.rem(chunk.token, LANES), LANES)
    return pltpu.roll(found, shift, 1)
