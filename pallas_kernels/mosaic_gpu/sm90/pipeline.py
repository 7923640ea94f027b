"""The pipeline that all Hopper kernels share: a load warpgroup feeds two compute warpgroups through shared memory.

A thread block computes a tile of 128 rows, 64 for each compute warpgroup. It loops over the blocks of a list in steps
of `step_size` tokens. Softmax and gradients are sums, so a step may hold any blocks in any order. Each block, or chunk
of a longer block, has TMA copies of its own. Shared memory has buffers for `num_stages` steps. For each of these
stages, a full barrier counts arrived copies, and an empty barrier counts the compute warpgroups that have read them.
"""

import functools
import math
import operator
import typing
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as mosaic_gpu
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.modes import interpreted
from pallas_kernels.mosaic_gpu.sm90.config import ROWS, WARPGROUP_ROWS, WARPGROUPS, KernelSpec, bits_per_word
from pallas_kernels.schedule import NOTHING
from pallas_kernels.sharding import varying_like

plgpu: typing.Any = mosaic_gpu
"""Pallas Mosaic GPU, untyped: its annotations do not distinguish a kernel's references from arrays."""

WGMMA, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

Ref = typing.Any
"""A reference to an array in global or shared memory, or to barriers."""


# Launch.


class Registers(typing.NamedTuple):
    """Registers per thread. Two compute warpgroups and one load warpgroup share 504."""

    compute: int
    load: int


def launch(
    name: str, spec: KernelSpec, make_tile: Callable, compute: Callable, inputs: typing.Any, results: tuple, smem: dict,
    registers: Registers, load: Callable = lambda tile: tile.loop.load_steps(),
) -> tuple[Array, ...]:  # fmt: skip
    """Runs a kernel and returns its results.

    Args:
      name: name of the compiled kernel.
      spec: configuration of the kernel.
      make_tile: makes the tile of a thread block from `spec`, its indices in `spec.grid`, and references to `inputs`,
        `results` and `smem`. The tile has a `loop`.
      compute: body of the compute warpgroups, a function of the tile.
      inputs: pytree of arrays, with a `query`.
      results: shapes and dtypes of the results.
      smem: buffers and barriers in shared memory, by name.
      registers: registers per thread.
      load: body of the load warpgroup, a function of the tile.
    """
    leaves, structure = jax.tree.flatten(inputs)

    def kernel(*refs, **smem):
        inputs, results = jax.tree.unflatten(structure, refs[: len(leaves)]), refs[len(leaves) :]
        warpgroup = jax.lax.axis_index("warpgroup")

        # Each role makes the tile for itself: values that both need would occupy registers of both across the branch.
        def make_own_tile():
            return make_tile(spec, _grid_indices(spec.grid), inputs, results, smem)

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(registers.compute, action="increase")
            tile = make_own_tile()
            tile.loop.release_all()
            compute(tile)

        @pl.when(warpgroup == WARPGROUPS)
        def _():
            plgpu.set_max_registers(registers.load, action="decrease")
            tile = make_own_tile()
            load(tile)
            tile.loop.drain()

    kernel.__name__ = name
    run = plgpu.kernel(
        kernel,
        out_type=results,
        scratch_types=smem,
        grid=(math.prod(spec.grid),),
        grid_names=("thread_block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return tuple(varying_like(array, inputs.query) for array in run(*leaves))


def _grid_indices(grid: tuple[int, ...]) -> list:
    """Indices of a thread block in a grid whose last axis is the fastest.

    CUDA's own grid has a single axis, since it limits all axes but the first to 65,535.
    """
    rest, indices = jax.lax.axis_index("thread_block"), []
    for size in reversed(grid):
        indices.insert(0, jax.lax.rem(rest, size))
        rest = rest // size
    return indices


# Shared memory.


def tile_buffer(spec: KernelSpec, features: int, *, contracted: bool = False):
    """Buffer for the rows of a tile, [WARPGROUPS, WARPGROUP_ROWS, features].

    Args:
      spec: configuration of the kernel.
      features: length of a row.
      contracted: True if the rows are multiplied with a `contracted` step buffer, as both operands of a product have
        the same swizzle.
    """
    return _buffer(spec, (WARPGROUPS, WARPGROUP_ROWS, features), contracted)


def step_buffer(spec: KernelSpec, features: int, *, contracted: bool):
    """Buffer for the tokens of all stages, [num_stages, step_size, features].

    Args:
      spec: configuration of the kernel.
      features: length of a row.
      contracted: True if a product contracts over the tokens.
    """
    return _buffer(spec, (spec.num_stages, spec.step_size, features), contracted)


def _buffer(spec: KernelSpec, shape: tuple[int, int, int], contracted: bool):
    """Buffer in the widest swizzle that divides a row and, if a product contracts over the tokens of a step, those."""
    lengths = [length * spec.dtype.itemsize for length in (shape[2], spec.step_size if contracted else shape[2])]
    swizzle = next(size for size in (128, 64, 32) if not any(length % size for length in lengths))
    tiling = plgpu.TilingTransform((8, swizzle // spec.dtype.itemsize))
    return plgpu.SMEM(shape, spec.dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def barriers(count: int, arrivals: int):
    return plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)


def stage_barriers(spec: KernelSpec, **copies: int) -> dict:
    """Full and empty barriers of every stage: NAME_full and NAME_empty.

    Args:
      spec: configuration of the kernel.
      **copies: NAME = arrays that are copied for every chunk.
    """
    found = {}
    for name, arrays in copies.items():
        found[f"{name}_full"] = barriers(spec.num_stages, spec.chunks_per_step * arrays)
        found[f"{name}_empty"] = barriers(spec.num_stages, WARPGROUPS)
    return found


def mask_buffers(spec: KernelSpec, bits: bool, segments: bool, positions: bool) -> dict:
    """Buffers of the masks that a kernel has: "mask_bits", "segments" and "positions", None for the others."""
    mask_bits = plgpu.SMEM((spec.num_stages, spec.chunks_per_step * spec.words_per_chunk, ROWS), jnp.int32)
    ids = token_buffer(spec, jnp.int32)
    return {
        "mask_bits": mask_bits if bits else None,
        "segments": ids if segments else None,
        "positions": ids if positions else None,
    }


def token_buffer(spec: KernelSpec, dtype):
    """Buffer for one number per token of all stages."""
    return plgpu.SMEM((spec.num_stages, spec.step_size), dtype)


# Block iterator.


class Chunk(typing.NamedTuple):
    """A block, or the part of a longer block that fills a step.

    Attributes:
      index: number of the chunk in the sequence.
      mask_id: mask of the block; None in unmasked steps.
      group_head: query head within the group.
    """

    index: typing.Any
    mask_id: typing.Any
    group_head: typing.Any


class Position(typing.NamedTuple):
    """Position of a block iterator.

    Attributes:
      group_head: below `group_heads` in full blocks of that head; `group_heads` more in its partial blocks.
      chunk: number of the chunk among the head's full, or partial, blocks.
    """

    group_head: typing.Any
    chunk: typing.Any


class BlockIterator:
    """Iterates over the chunks of a tile's blocks: unmasked steps of full blocks first, then masked steps.

    Full blocks that do not fill a step join the masked steps, with a mask that hides nothing. If several heads share
    the lists, the iterator visits the blocks once for each head, and all heads together fill the steps.

    Attributes:
      unmasked_steps: number of unmasked steps.
      masked_steps: number of masked steps.
    """

    def __init__(self, spec: KernelSpec, blocks: Ref, mask_ids: Ref, ranges: Ref, group_heads=1, first_group_head=0):
        """Reads the tile's ranges.

        Args:
          spec: configuration of the kernel.
          blocks: int32 [entries], lists of blocks.
          mask_ids: int32 [entries], their masks.
          ranges: int32 [ranges, 2], the entries of this tile; ranges of full blocks first.
          group_heads: number of heads that share the lists.
          first_group_head: the first of them.
        """
        self.spec, self.blocks, self.mask_ids = spec, blocks, mask_ids
        self.group_heads, self.first_group_head = group_heads, first_group_head
        bounds = [(ranges[index, 0], ranges[index, 1]) for index in range(spec.num_ranges)]
        self.full_ranges, self.partial_ranges = bounds[: spec.num_full_ranges], bounds[spec.num_full_ranges :]
        # Chunks of each head.
        self.full, self.partial = (
            _num_entries(some) * spec.chunks_per_block for some in (self.full_ranges, self.partial_ranges)
        )
        self.unmasked_steps = group_heads * self.full // spec.chunks_per_step
        left = group_heads * self.full - self.unmasked_steps * spec.chunks_per_step
        self.masked_steps = -(-(left + group_heads * self.partial) // spec.chunks_per_step)

    def start(self, masked: bool) -> Position:
        """Position of the first unmasked or masked step."""
        if not masked:
            return Position(jnp.int32(0), jnp.int32(0))
        visited = self.unmasked_steps * self.spec.chunks_per_step
        group_head = jnp.where(self.full > 0, visited // jnp.maximum(self.full, 1), self.group_heads)
        return Position(group_head, visited - group_head * self.full)

    def next(self, position: Position) -> Position:
        chunk = position.chunk + 1
        ends = chunk == jnp.where(position.group_head < self.group_heads, self.full, self.partial)
        return Position(position.group_head + ends.astype(jnp.int32), jnp.where(ends, 0, chunk))

    def chunk(self, position: Position, masked: bool) -> Chunk:
        """The chunk at a position in an unmasked or masked step.

        Repetitions of the last chunk, with a mask that hides everything, fill the last step.
        """
        group_head, chunk = position
        if not masked:
            return self._chunk(chunk, self._entry(chunk, self.full_ranges), group_head, None)
        exists = (group_head < self.group_heads) | ((group_head < 2 * self.group_heads) & (self.partial > 0))
        full = jnp.where(exists, group_head < self.group_heads, self.partial == 0)
        chunk = jnp.where(exists, chunk, jnp.where(full, self.full, self.partial) - 1)
        group_head = jnp.where(exists, jnp.where(full, group_head, group_head - self.group_heads), self.group_heads - 1)
        entry = self._entry(chunk, self.partial_ranges)
        if self.full_ranges:
            entry = jnp.where(full, self._entry(chunk, self.full_ranges), entry)
        return self._chunk(chunk, entry, group_head, jnp.where(exists, self.mask_ids[entry], NOTHING))

    def _chunk(self, chunk, entry, group_head, mask_id) -> Chunk:
        chunks = self.spec.chunks_per_block
        index = self.blocks[entry] * chunks + jax.lax.rem(chunk, chunks)
        return Chunk(index, mask_id, self.first_group_head + group_head)

    def _entry(self, chunk, ranges: list):
        """Index into the lists of the entry that holds a head's chunk."""
        if not ranges:
            return 0
        number = chunk // self.spec.chunks_per_block
        (start, stop), *rest = ranges
        entry, end = start + number, stop - start
        for start, stop in rest:
            entry = jnp.where(number >= end, start + number - end, entry)
            end = end + stop - start
        return entry


def _num_entries(ranges: list):
    return sum((stop - start for start, stop in ranges), jnp.int32(0))


# Loop over steps.


Copies = dict[str, Callable[[Chunk], Ref]]
"""TMA copies of a chunk that share barriers: for each buffer [stages, tokens, …], the source in global memory."""


class IdMask(typing.NamedTuple):
    """A mask by comparison of ids, such as segments or positions.

    Attributes:
      buffer: name of the buffer with the ids of a step's tokens, int32 [stages, tokens].
      rows: int32 [ROWS], ids of the tile's rows, in global memory.
      compare: function of the ids of tokens and of rows; True where a row reads a token.
    """

    buffer: str
    rows: Ref
    compare: Callable[[Array, Array], Array]


class Step(typing.NamedTuple):
    """A step of a compute warpgroup.

    Attributes:
      index: number of the step.
      stage: stage with its tokens.
      mask: None in unmasked steps; else waits for the mask and returns it, bool [WARPGROUP_ROWS, step_size], True where
        a row reads a token.
    """

    index: typing.Any
    stage: typing.Any
    mask: Callable[[], Array] | None


class StepLoop:
    """The loop over all steps of a thread block: loads by the load warpgroup, `fold` by the compute warpgroups.

    Attributes:
      unmasked_steps: number of unmasked steps, which come first.
      masked_steps: number of masked steps.
      warpgroup: number of this warpgroup.
      rows: rows of the tile that this warpgroup computes.
    """

    def __init__(
        self, spec: KernelSpec, smem: dict, iterate: Callable[[typing.Any], BlockIterator], loads: dict[str, Copies],
        mask_copies: Copies, id_masks: list[IdMask], head_passes: int = 1,
    ):  # fmt: skip
        """Counts the steps.

        Args:
          spec: configuration of the kernel.
          smem: buffers by name; barriers NAME_full and NAME_empty for each name in `loads`, and for "mask". The buffer
            "mask_bits", int32 [stages, words, ROWS], holds a bit for each column; None if there are only `id_masks`.
          iterate: makes the block iterator of a head pass.
          loads: copies of every step.
          mask_copies: further copies of masked steps.
          id_masks: masks besides "mask_bits".
          head_passes: number of passes. The unmasked steps of all passes come first.
        """
        self.spec, self.smem, self.loads, self.mask_copies = spec, smem, loads, mask_copies
        self.id_masks, self.head_passes = id_masks, head_passes
        single = iterate(0) if head_passes == 1 else None
        self.iterate = iterate if single is None else lambda head_pass: single
        self.warpgroup = jax.lax.axis_index("warpgroup")
        self.rows = pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        self.unmasked_steps = self._fold_passes(lambda iterator, steps: steps + iterator.unmasked_steps)
        self.masked_steps = self._fold_passes(lambda iterator, steps: steps + iterator.masked_steps)

    def _fold_passes(self, function: Callable[[BlockIterator, typing.Any], typing.Any]):
        """Applies `steps = function(iterator, steps)` for each head pass, from zero."""
        steps = jnp.int32(0)
        if self.head_passes == 1:
            return function(self.iterate(0), steps)
        return jax.lax.fori_loop(0, self.head_passes, lambda i, steps: function(self.iterate(i), steps), steps)

    # The load warpgroup.

    def load_steps(self) -> None:
        """Copies the tokens and masks of all steps to shared memory."""
        if self.spec.num_full_ranges:
            self._fold_passes(lambda iterator, steps: self._load_pass(iterator, steps, False))
        self._fold_passes(lambda iterator, steps: self._load_pass(iterator, steps, True))

    def _load_pass(self, iterator: BlockIterator, steps, masked: bool):
        """Loads the unmasked or masked steps of a head pass, after as many `steps` of earlier passes."""

        def load_step(step, position: Position) -> Position:
            chunks = []
            for _ in range(self.spec.chunks_per_step):
                chunks.append(iterator.chunk(position, masked))
                position = iterator.next(position)
            for name, copies in self.loads.items():
                self._load_stage(name, copies, (self.unmasked_steps + steps if masked else steps) + step, chunks)
            if masked:
                self._load_stage("mask", self.mask_copies, steps + step, chunks)
            return position

        count = iterator.masked_steps if masked else iterator.unmasked_steps
        jax.lax.fori_loop(0, count, load_step, iterator.start(masked))
        return steps + count

    def _load_stage(self, name: str, copies: Copies, step, chunks: list[Chunk]) -> None:
        stage = self._wait_until_empty(name, step)
        for buffer_name, source in copies.items():
            buffer = self.smem[buffer_name]
            size = buffer.shape[1] // self.spec.chunks_per_step
            # Arrays of one number per token are padded to whole blocks, so that copies need no bounds checks. A tensor
            # copy, which checks bounds, requires 128-byte aligned destinations; 16 numbers take 64 bytes.
            oob_mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS if len(buffer.shape) == 2 else None
            for number, chunk in enumerate(chunks):
                destination = buffer.at[stage, pl.ds(number * size, size)]
                full = self.smem[f"{name}_full"].at[stage]
                plgpu.copy_gmem_to_smem(source(chunk), destination, full, oob_mode=oob_mode)

    def _wait_until_empty(self, name: str, step):
        """Waits until the stage of a step is released, and returns the stage."""
        stage = jax.lax.rem(step, self.spec.num_stages)
        plgpu.barrier_wait(self.smem[f"{name}_empty"].at[stage])
        return stage

    def drain(self) -> None:
        """Waits until all stages are released, so that no barrier is left in the middle of a phase."""
        for number in range(self.spec.num_stages):
            for name in self.loads:
                self._wait_until_empty(name, self.unmasked_steps + self.masked_steps + number)
            self._wait_until_empty("mask", self.masked_steps + number)

    # The compute warpgroups.

    def release_all(self) -> None:
        """Releases all stages before the first loads."""
        for name in (*self.loads, "mask"):
            for stage in range(self.spec.num_stages):
                plgpu.barrier_arrive(self.smem[f"{name}_empty"].at[stage])

    def next_stage(self, stage):
        """The stage of the next step. It is counted, as a remainder would take more registers than there are."""
        return jnp.where(stage == self.spec.num_stages - 1, 0, stage + 1)

    def fold(self, function: Callable[[Step, typing.Any], typing.Any], carry: typing.Any) -> typing.Any:
        """Applies `carry = function(step, carry)` for each step."""
        stage = jnp.int32(0)
        row_ids = [load_row_values(id_mask.rows.at[self.rows]) for id_mask in self.id_masks]

        def unmasked_step(index, state):
            stage, carry = state
            return self.next_stage(stage), function(Step(index, stage, None), carry)

        def masked_step(index, state):
            stage, mask_stage, carry = state
            carry = function(Step(self.unmasked_steps + index, stage, lambda: self._mask(mask_stage, row_ids)), carry)
            return self.next_stage(stage), self.next_stage(mask_stage), carry

        if self.spec.num_full_ranges:
            stage, carry = jax.lax.fori_loop(0, self.unmasked_steps, unmasked_step, (stage, carry))
        return jax.lax.fori_loop(0, self.masked_steps, masked_step, (stage, jnp.int32(0), carry))[2]

    def _mask(self, stage, row_ids: list[Array]) -> Array:
        """The mask of a stage, bool [WARPGROUP_ROWS, step_size]."""
        shape, masks, mask_bits = (WARPGROUP_ROWS, self.spec.step_size), [], self.smem["mask_bits"]
        plgpu.barrier_wait(self.smem["mask_full"].at[stage])
        if mask_bits is not None:
            words = [load_row_values(mask_bits.at[stage, word, self.rows]) for word in range(mask_bits.shape[1])]
            masks.append(_unpack_bits(words, shape, bits_per_word(self.spec.chunk_size)))
        for id_mask, ids in zip(self.id_masks, row_ids, strict=True):
            columns = broadcast_columns(load_column_values(self.smem[id_mask.buffer].at[stage]), shape)
            masks.append(id_mask.compare(columns, broadcast_rows(ids, shape)))
        # Orders these reads before the copies that overwrite the stage: those go through the async proxy.
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.smem["mask_empty"].at[stage])
        return functools.reduce(operator.and_, masks)


def _unpack_bits(words: list[Array], shape: tuple[int, int], width: int) -> Array:
    """Bit `column % width` of word `column // width` of every row: bool `shape`."""
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
    word = broadcast_rows(words[0], shape)
    for index, other in enumerate(words[1:], 1):
        word = jnp.where(column // width == index, broadcast_rows(other, shape), word)
    # In the WGMMA layout, bits 1 and 2 of a column's number depend on the thread and the others on the register.
    # Shifted by the former, a word is tested against one constant per register.
    word = word >> (column & 6)
    return (word & (1 << (column & (width - 1) & ~6))) != 0


def mask_bits_of(spec: KernelSpec, mask_bits: Ref) -> Callable[[Chunk], Ref]:
    """Function that returns the mask words of a chunk, int32 [words_per_chunk, ROWS]."""

    def of_chunk(chunk: Chunk):
        first = jax.lax.rem(chunk.index, spec.chunks_per_block) * spec.words_per_chunk
        return mask_bits.at[chunk.mask_id, pl.ds(first, spec.words_per_chunk)]

    return of_chunk


# Arrays in registers.


def load_row_values(ref: Ref) -> Array:
    """One number for each row of an accumulator."""
    return plgpu.load(ref, layout=ROW, optimized=False)


def load_column_values(ref: Ref) -> Array:
    """One number for each column of an accumulator."""
    return plgpu.load(ref, layout=COLUMN, optimized=False)


def broadcast_rows(values: Array, shape: tuple[int, ...]) -> Array:
    """Repeats one number per row along the columns."""
    return jax.lax.broadcast_in_dim(values, shape, [0])


def broadcast_columns(values: Array, shape: tuple[int, ...]) -> Array:
    """Repeats one number per column along the rows."""
    return jax.lax.broadcast_in_dim(values, shape, [1])


def zeros(features: int) -> Array:
    """An accumulator of zeros, float32 [WARPGROUP_ROWS, features]."""
    return plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, features), jnp.float32), WGMMA)


# Matrix products of a warpgroup. On the chip they read shared memory at any time until they are waited for; in the
# interpreter they complete at once. It reads each operand twice, before and after `overlap`. So tests find a buffer
# that is released too early or waited for too late.


def dot_nt(a: Ref, b: Ref, overlap: Callable[[], None] = lambda: None) -> Array:
    """The product a · bᵀ in float32, both in shared memory.

    Args:
      a: [WARPGROUP_ROWS, features].
      b: [step_size, features].
      overlap: called while the product is computed.
    """

    def compute(acc):
        plgpu.wgmma(acc, a, b.transpose((1, 0)))
        overlap()
        if not interpreted():
            return acc[...]
        plgpu.wgmma(acc, a, b.transpose((1, 0)))
        return acc[...] / 2

    return pl.run_scoped(compute, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))


def dot_nt_pair(first: tuple[Ref, Ref], second: tuple[Ref, Ref]) -> tuple[Array, ...]:
    """Two products a · bᵀ of the same shape, issued one right after the other."""

    def compute(*accs):
        for acc, (a, b) in zip(accs, (first, second), strict=True):
            plgpu.wgmma(acc, a, b.transpose((1, 0)))
        return tuple(acc[...] for acc in accs)

    shape = first[0].shape[0], first[1].shape[0]
    return pl.run_scoped(compute, *[plgpu.ACC(shape, jnp.float32)] * 2)


def add_dot_nn(acc: Array, a: Array, b: Ref, overlap: Callable[[], None] = lambda: None) -> Array:
    """The sum acc + a · b in float32.

    Args:
      acc: [WARPGROUP_ROWS, features], in registers.
      a: [WARPGROUP_ROWS, step_size], in registers.
      b: [step_size, features], in shared memory.
      overlap: called while the product is computed.
    """

    def compute(acc):
        plgpu.wgmma(acc, a, b)
        overlap()

    if not interpreted():
        return pl.run_state(compute)(plgpu.ACC.init(acc))
    # The interpreter has no product with an operand in registers.
    early = jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    overlap()
    late = jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    plgpu.commit_smem()
    return acc + (early + late) / 2
