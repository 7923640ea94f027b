"""The loop of a TPU kernel over the blocks that a tile reads, with DMA prefetch.

A tile makes `head_passes` passes, each over a block list of its own: ranges of entries, those without a mask first.
Entries are taken in steps of as many chunks as fill a ring slot. While one group of steps is computed, the next one is
copied, across the ends of passes and tiles of a head, so that only a head's first group is waited for in full.

    tile = pipeline.current_tile(spec, inputs, scratch)
    pipeline.start(tile)
    pipeline.for_each_step_group(tile, compute)
"""

import dataclasses
import typing
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32

from pallas_kernels.mosaic_tpu.config import LANES, STEPS_PER_GROUP, KernelSpec
from pallas_kernels.mosaic_tpu.launch import KernelInputs
from pallas_kernels.mosaic_tpu.masks import MaskRefs, step_mask
from pallas_kernels.mosaic_tpu.primitives import lanes_to_rows
from pallas_kernels.mosaic_tpu.ring import Ring, advance, entry_chunk


class Scratch(typing.NamedTuple):
    """Scratch of the loop.

    Attributes:
      ring: the streamed steps.
      iterator: int32 [3] in SMEM, the `BlockIterator` of the next step to copy.
      row_segment_ids: int32 [tile_rows, LANES], the same in all lanes; None without segments.
      row_positions: int32 [tile_rows, LANES], the same in all lanes; None if masks need no positions.
    """

    ring: Ring
    iterator: typing.Any
    row_segment_ids: typing.Any
    row_positions: typing.Any


class StepGroup(typing.NamedTuple):
    """Steps that are computed together.

    Attributes:
      head_pass: number of the pass over the tile.
      slots: ring slots of the steps.
      masked: False if no entry of the steps has a mask.
      prefetch: starts the copies of the next group. A compute function calls it once, after its loads from the ring:
        the compiler orders loads after copies into the same buffer.
    """

    head_pass: int
    slots: list
    masked: bool
    prefetch: Callable[[], None]


class TilePass(typing.NamedTuple):
    """The block list of one pass.

    Attributes:
      num_entries: entries in all ranges.
      num_full_entries: entries without a mask; they come first.
      range_ends: entries up to the end of each range, but for the last one.
      range_offsets: for each range, the offset from an entry's number in the pass to its position in the list.
      next_pass: the next pass that reads anything; the last such pass is its own.
    """

    num_entries: typing.Any
    num_full_entries: typing.Any
    range_ends: tuple
    range_offsets: tuple
    next_pass: typing.Any

    def num_steps(self, spec: KernelSpec):
        return jax.lax.div(self.num_entries + spec.chunks_per_step - 1, spec.chunks_per_step)

    def num_full_groups(self, spec: KernelSpec):
        """Groups of steps without a mask. All later steps are computed with one."""
        return jax.lax.div(self.num_full_entries, STEPS_PER_GROUP * spec.chunks_per_step)


class BlockIterator(typing.NamedTuple):
    """Position of the prefetch: a step of a pass, and the ring slot that it is copied to."""

    pass_index: typing.Any
    step: typing.Any
    slot: typing.Any


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile: the work of one grid point.

    Attributes:
      inputs: refs.
      head_tile: its number along the heads.
      index: its number along the tokens.
      is_first: True for the first tile of a head tile.
      is_last: True for the last tile of a head tile.
      list_start: position of the head tile's list among all lists.
      streamed_head: the first head of `inputs.streamed` that the tile's first pass reads.
      first_chunk: the number of the first chunk in `inputs.streamed`; None for 0.
      mask_refs: what masks are computed from.
    """

    spec: KernelSpec
    inputs: KernelInputs
    scratch: Scratch
    head_tile: typing.Any
    index: typing.Any
    is_first: typing.Any
    is_last: typing.Any
    list_start: typing.Any
    streamed_head: typing.Any
    first_chunk: typing.Any
    mask_refs: MaskRefs

    @property
    def ring(self) -> Ring:
        return self.scratch.ring


def scratch_shapes(spec: KernelSpec, inputs: KernelInputs) -> Scratch:
    """Scratch shapes of the loop."""
    rows = pltpu.VMEM((spec.tile_rows, LANES), jnp.int32)
    return Scratch(
        Ring.scratch(spec),
        pltpu.SMEM((len(BlockIterator._fields),), jnp.int32),
        None if inputs.row_segment_ids is None else rows,
        None if inputs.row_positions is None else rows,
    )


def current_tile(spec: KernelSpec, inputs: KernelInputs, scratch: Scratch) -> Tile:
    """Returns the tile of the current grid point."""
    batch, head_tile, index = (pl.program_id(axis) for axis in range(3))
    separate_lists = inputs.list_ids.shape[0] > spec.num_head_tiles
    list_id = inputs.list_ids[head_tile + (batch * spec.num_head_tiles if separate_lists else 0)]
    list_start, is_first, is_last = list_id * spec.entries_per_list, index == 0, index == spec.num_tiles - 1
    if spec.rows_are_queries:
        num_kv_heads = spec.num_head_tiles * spec.tile_heads // spec.group_size
        streamed_head = batch * num_kv_heads + jax.lax.div(head_tile * spec.tile_heads, spec.group_size)
    else:
        streamed_head = (batch * spec.num_head_tiles + head_tile) * spec.group_size
    first_chunk = None if inputs.first_chunk is None else inputs.first_chunk[batch]
    first_position = 0 if inputs.first_position is None else inputs.first_position[batch]
    mask_refs = MaskRefs(
        inputs.mask_bits, scratch.row_segment_ids, scratch.row_positions, inputs.column_segment_ids, first_position
    )
    return Tile(
        spec, inputs, scratch, head_tile, index, is_first, is_last, list_start, streamed_head, first_chunk, mask_refs
    )


def start(tile: Tile) -> None:
    """Loads the rows' segment ids and positions. On a head's first tile, starts the copies of the first group."""
    for ref, given in (
        (tile.scratch.row_segment_ids, tile.inputs.row_segment_ids),
        (tile.scratch.row_positions, tile.inputs.row_positions),
    ):
        if ref is not None:
            ref[...] = lanes_to_rows(given[...])

    @pl.when(tile.is_first)
    def _():
        spec = tile.spec
        first_pass = tile.inputs.pass_scalars[0, spec.num_tiles * spec.head_passes * spec.scalars_per_pass]
        iterator = BlockIterator(first_pass, jnp.int32(0), jnp.int32(0))
        iterator = jax.lax.fori_loop(0, STEPS_PER_GROUP, lambda _, iterator: _copy_step(tile, iterator), iterator)
        _store_iterator(tile, iterator)


def for_each_step_group(tile: Tile, compute: Callable[[StepGroup], None]) -> None:
    """Calls `compute` for every group of steps, while the copies of the next group, or the next tile's first, run."""
    for head_pass in range(tile.spec.head_passes):
        _run_pass(tile, head_pass, compute)

    @pl.when(tile.is_last)
    def _():
        # The steps that were prefetched beyond the end of the head.
        slot = tile.scratch.iterator[2]
        for step in range(STEPS_PER_GROUP):
            tile.ring.wait(tile.spec, advance(slot, STEPS_PER_GROUP + step))


def step_masks(tile: Tile, group: StepGroup) -> list[Array] | list[None]:
    """The mask of every step of a group, bool [tile_rows, step_size]; None for steps without one."""
    if not group.masked:
        return [None] * len(group.slots)
    return [step_mask(tile.spec, tile.mask_refs, tile.ring.chunks(tile.spec, slot)) for slot in group.slots]


def _run_pass(tile: Tile, head_pass: int, compute: Callable[[StepGroup], None]) -> None:
    """Computes a pass: groups of steps without a mask, groups with one, and at last a step that is left over."""
    spec = tile.spec
    tile_pass = _read_pass(tile, tile.index * spec.head_passes + head_pass)

    def group_body(masked: bool, num_steps: int):
        def body(_, iterator: BlockIterator) -> BlockIterator:
            # The iterator is one group ahead of what is computed, which is half the ring.
            slots = [advance(iterator.slot, STEPS_PER_GROUP + step) for step in range(num_steps)]
            for slot in slots:
                tile.ring.wait(spec, slot)
            reached = []  # the iterator after `prefetch`, which `compute` calls while it is traced

            def prefetch():
                ahead = iterator
                for _ in range(num_steps):
                    ahead = _copy_step(tile, ahead)
                reached.append(ahead)

            compute(StepGroup(head_pass, slots, masked, prefetch))
            return reached[0]

        return body

    iterator = BlockIterator(*(tile.scratch.iterator[field] for field in range(len(BlockIterator._fields))))
    num_steps, full_groups = tile_pass.num_steps(spec), tile_pass.num_full_groups(spec)
    groups = jax.lax.div(num_steps, STEPS_PER_GROUP)
    if spec.num_full_ranges:
        iterator = jax.lax.fori_loop(0, full_groups, group_body(False, STEPS_PER_GROUP), iterator)
    iterator = jax.lax.fori_loop(full_groups, groups, group_body(True, STEPS_PER_GROUP), iterator)
    iterator = jax.lax.fori_loop(groups * STEPS_PER_GROUP, num_steps, group_body(True, 1), iterator)
    _store_iterator(tile, iterator)


def _copy_step(tile: Tile, iterator: BlockIterator) -> BlockIterator:
    """Starts the copies of a step and returns the iterator of the next one."""
    spec, tile_pass, head = tile.spec, _read_pass(tile, iterator.pass_index), tile.streamed_head
    if spec.head_passes > 1:
        head = head + jax.lax.rem(iterator.pass_index, spec.head_passes) * spec.step_heads
    first_entry = iterator.step * spec.chunks_per_step
    for chunk in range(spec.chunks_per_step):
        entry = _read_entry(spec, tile_pass, tile.inputs.entries, first_entry + chunk)
        tile.ring.start_copy(spec, iterator.slot, chunk, entry, tile.inputs.streamed, head, tile.first_chunk)
    at_end = iterator.step + 1 >= tile_pass.num_steps(spec)
    return BlockIterator(
        jnp.where(at_end, tile_pass.next_pass, iterator.pass_index),
        jnp.where(at_end, 0, iterator.step + 1),
        advance(iterator.slot),
    )


def _store_iterator(tile: Tile, iterator: BlockIterator) -> None:
    for field, value in enumerate(iterator):
        tile.scratch.iterator[field] = value


def pass_scalars(ranges: Int32[Array, "#b h passes ranges 2"]) -> Int32[Array, "#b h 1 scalars"]:
    """The scalars that `_read_pass` reads: per pass, the ends of its ranges and the next pass that reads anything.

    Passes without entries get no step; the last pass with entries is followed by itself. After all passes comes the
    first one that reads anything.
    """
    *outer, passes, _, _ = ranges.shape
    index = jnp.arange(passes, dtype=jnp.int32)
    reads = (ranges[..., 1] > ranges[..., 0]).any(-1)
    last = jnp.where(reads, index, 0).max(-1, keepdims=True)
    ahead = jax.lax.cummin(jnp.where(reads, index, passes), len(outer), reverse=True)
    next_pass = jnp.minimum(jnp.concatenate([ahead[..., 1:], last], -1), last)
    scalars = jnp.concatenate([ranges.reshape(*outer, passes, -1), next_pass[..., None]], -1)
    first = jnp.minimum(ahead[..., :1], last)
    return jnp.concatenate([scalars.reshape(*outer, -1), first], -1)[..., None, :]


def _read_pass(tile: Tile, pass_index) -> TilePass:
    """The block list of a pass, from its scalars in SMEM."""
    spec, scalars, start = tile.spec, tile.inputs.pass_scalars, pass_index * tile.spec.scalars_per_pass
    num_entries, num_full_entries, range_ends, range_offsets = jnp.int32(0), jnp.int32(0), [], []
    for index in range(spec.num_ranges):
        range_start, range_stop = scalars[0, start + 2 * index], scalars[0, start + 2 * index + 1]
        range_offsets.append(range_start - tile.list_start - num_entries)
        num_entries = num_entries + jnp.maximum(range_stop - range_start, 0)
        range_ends.append(num_entries)
        num_full_entries = num_entries if index < spec.num_full_ranges else num_full_entries
    next_pass = scalars[0, start + 2 * spec.num_ranges]
    return TilePass(num_entries, num_full_entries, tuple(range_ends[:-1]), tuple(range_offsets), next_pass)


def _read_entry(spec: KernelSpec, tile_pass: TilePass, entries, number):
    """An entry of a pass, by its number; beyond the last one, the last one's chunk with the mask that hides it.

    Args:
      entries: ref, int32 [1, entries_per_list].
    """
    if spec.padded_to_steps:
        return entries[0, tile_pass.range_offsets[0] + number]
    clamped = jnp.minimum(number, jnp.maximum(tile_pass.num_entries, 1) - 1)
    offset = tile_pass.range_offsets[0]
    for end, range_offset in zip(tile_pass.range_ends, tile_pass.range_offsets[1:], strict=True):
        offset = jnp.where(clamped >= end, range_offset, offset)
    entry, exists = entries[0, clamped + offset], number < tile_pass.num_entries
    return jnp.where(exists, entry, entry_chunk(spec, entry) | spec.empty_mask_id << spec.chunk_bits)
