"""Forward attention on Hopper: two warpgroups compute, a third walks the lists and loads what they read.

A tile is 128 rows: 128 consecutive queries of a head, or fewer queries of several heads that read the same keys.
Softmax does not care in which order keys come, so a step computes on any blocks: each is brought by a copy of its own
into a slot of the step's buffer. Steps without a mask come first; the blocks that they leave over, too few for a step,
are walked with the masked ones.

The warpgroups take turns, as in FlashAttention-3: while one multiplies matrices, the other exponentiates.
"""

import math
import typing

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.plan import ROWS, WARPGROUP_ROWS, WARPGROUPS, WORD, Plan
from pallas_kernels.mosaic_gpu.products import add_product, product
from pallas_kernels.mosaic_gpu.tables import EMPTY, Inputs
from pallas_kernels.mosaic_gpu.untyped import plgpu
from pallas_kernels.sharding import varying_like

WGMMA, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

LOWEST = -0.5 * float(np.finfo(np.float32).max)
"""The greatest of no logits: finite, so that a row that reads nothing makes no NaN of -inf - -inf."""

LOG2E = math.log2(math.e)
COMPUTE_REGISTERS, LOAD_REGISTERS = 224, 56


def attend(plan: Plan, inputs: Inputs) -> tuple[Array, Array]:
    """out [b, t, h, e] in the query's dtype, and lse [b, h, tiles · queries] in float32."""
    out = jax.ShapeDtypeStruct((*inputs.query.shape[:3], plan.value_dim), plan.dtype)
    lse = jax.ShapeDtypeStruct((plan.batch, plan.num_heads, plan.tiles * plan.queries), jnp.float32)
    leaves, structure = jax.tree.flatten(inputs)

    def body(*refs):
        *refs, out_ref, lse_ref, scratch = refs
        Tile(plan, jax.tree.unflatten(structure, refs), out_ref, lse_ref, scratch).run()

    kernel = plgpu.kernel(
        lambda *refs, **scratch: body(*refs, Scratch(**scratch)),
        out_type=(out, lse),
        scratch_types=_scratch(plan, inputs),
        grid=(plan.tiles, plan.batch, plan.num_heads // plan.heads),
        grid_names=("tile", "batch", "heads"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    out, lse = (varying_like(array, inputs.query) for array in kernel(*leaves))
    return out, lse


class Scratch(typing.NamedTuple):
    """Shared memory and barriers; `ready` barriers say that copies came, `free` ones that both warpgroups are done."""

    query: typing.Any
    key: typing.Any
    value: typing.Any
    out: typing.Any
    lse: typing.Any
    words: typing.Any
    segments: typing.Any
    positions: typing.Any
    query_ready: typing.Any
    key_ready: typing.Any
    value_ready: typing.Any
    mask_ready: typing.Any
    key_free: typing.Any
    value_free: typing.Any
    mask_free: typing.Any
    turn: typing.Any


def _scratch(plan: Plan, inputs: Inputs) -> dict:
    def tiles(rows: tuple[int, ...], features: int, summed: int | None = None):
        transforms = plan.transforms(features, summed)
        return plgpu.SMEM((*rows, features), plan.dtype, transforms=transforms)

    def barriers(number: int, arrivals: int):
        return plgpu.Barrier(num_barriers=number, num_arrivals=arrivals)

    stages, masks = plan.stages, inputs.num_mask_arrays
    per_key = plgpu.SMEM((stages, plan.keys), jnp.int32)
    words = plgpu.SMEM((stages, plan.slots * plan.words, ROWS), jnp.int32)
    own_out = plan.value_dim != plan.head_dim
    return {
        "query": tiles((WARPGROUPS, WARPGROUP_ROWS), plan.head_dim),
        "key": tiles((stages, plan.keys), plan.head_dim),
        "value": tiles((stages, plan.keys), plan.value_dim, plan.keys),
        "out": tiles((WARPGROUPS, WARPGROUP_ROWS), plan.value_dim) if own_out else None,
        "lse": plgpu.SMEM((WARPGROUPS, WARPGROUP_ROWS), jnp.float32),
        "words": None if inputs.words is None else words,
        "segments": None if inputs.kv_segments is None else per_key,
        "positions": None if inputs.kv_positions is None else per_key,
        "query_ready": barriers(WARPGROUPS, plan.pieces),
        "key_ready": barriers(stages, plan.slots),
        "value_ready": barriers(stages, plan.slots),
        "mask_ready": barriers(stages, plan.slots * masks),
        "key_free": barriers(stages, WARPGROUPS),
        "value_free": barriers(stages, WARPGROUPS),
        "mask_free": barriers(stages, WARPGROUPS),
        "turn": barriers(1, WARPGROUPS),
    }


class Tile:
    """One block of threads: the tile that it computes, and what its three warpgroups do."""

    def __init__(self, plan: Plan, inputs: typing.Any, out_ref, lse_ref, scratch: Scratch):
        self.plan, self.inputs, self.out_ref, self.lse_ref, self.scratch = plan, inputs, out_ref, lse_ref, scratch
        self.batch, self.heads = jax.lax.axis_index("batch"), jax.lax.axis_index("heads")
        # Blocks of threads start in the order of their numbers: with causal patterns, the longest first.
        self.tile = plan.tiles - 1 - jax.lax.axis_index("tile")
        self.warpgroup = jax.lax.axis_index("warpgroup")
        self.walk = Walk(plan, inputs, self.batch, self.heads, self.tile)

    def run(self) -> None:
        @pl.when(self.warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            self.compute()

        @pl.when(self.warpgroup == WARPGROUPS)
        def _():
            plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
            self.load()

    # The warpgroup that loads.

    def load(self) -> None:
        walk, stages = self.walk, self.plan.stages

        if self.plan.num_full:

            @pl.loop(0, walk.full_steps)
            def _(step):
                self._load_step(step, [walk.full_block(step, slot) for slot in range(self.plan.slots)])

        @pl.loop(0, walk.masked_steps)
        def _(masked_step):
            entries = [walk.masked_entry(masked_step, slot) for slot in range(self.plan.slots)]
            self._load_step(walk.full_steps + masked_step, [block for block, _ in entries])
            self._load_masks(masked_step, entries)

        # Every arrival is waited for, so that no barrier is left in the middle of a phase.
        for slot in range(stages):
            plgpu.barrier_wait(self.scratch.key_free.at[slot])
            plgpu.barrier_wait(self.scratch.value_free.at[slot])
            plgpu.barrier_wait(self.scratch.mask_free.at[slot])

    def _load_step(self, step, blocks) -> None:
        plan, scratch = self.plan, self.scratch
        stage = jax.lax.rem(step, plan.stages)
        kv_head = self.heads * plan.heads // (plan.num_heads // plan.num_kv_heads)
        for source, target, free, ready in (
            (self.inputs.key, scratch.key, scratch.key_free, scratch.key_ready),
            (self.inputs.value, scratch.value, scratch.value_free, scratch.value_ready),
        ):
            plgpu.barrier_wait(free.at[stage])
            for slot, block in enumerate(blocks):
                tokens = pl.ds(block * plan.slot, plan.slot)
                there = target.at[stage, pl.ds(slot * plan.slot, plan.slot)]
                plgpu.copy_gmem_to_smem(source.at[self.batch, tokens, kv_head], there, ready.at[stage])

    def _load_masks(self, masked_step, entries) -> None:
        plan, scratch, inputs = self.plan, self.scratch, self.inputs
        stage = jax.lax.rem(masked_step, plan.stages)
        plgpu.barrier_wait(scratch.mask_free.at[stage])
        ready = scratch.mask_ready.at[stage]
        for slot, (block, kind) in enumerate(entries):
            keys = pl.ds(slot * plan.slot, plan.slot)
            if inputs.words is not None:
                part = jax.lax.rem(block, plan.parts_of_block) * plan.words
                words = inputs.words.at[kind, pl.ds(part, plan.words)]
                there = scratch.words.at[stage, pl.ds(slot * plan.words, plan.words)]
                plgpu.copy_gmem_to_smem(words, there, ready)
            if inputs.kv_segments is not None:
                segments = inputs.kv_segments.at[self.batch, pl.ds(block * plan.slot, plan.slot)]
                plgpu.copy_gmem_to_smem(segments, scratch.segments.at[stage, keys], ready)
            if inputs.kv_positions is not None:
                # The last positions of all belong to no key: no query sees them.
                where = jnp.where(kind == EMPTY, inputs.kv_positions.shape[0] - plan.slot, block * plan.slot)
                positions = inputs.kv_positions.at[pl.ds(where, plan.slot)]
                plgpu.copy_gmem_to_smem(positions, scratch.positions.at[stage, keys], ready)

    # The warpgroups that compute.

    def compute(self) -> None:
        plan, scratch, walk = self.plan, self.scratch, self.walk
        for stage in range(plan.stages):
            plgpu.barrier_arrive(scratch.key_free.at[stage])
            plgpu.barrier_arrive(scratch.value_free.at[stage])
            plgpu.barrier_arrive(scratch.mask_free.at[stage])
        self._load_query()

        def rows(value: float):
            return plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), value, jnp.float32), ROW)

        out = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, plan.value_dim), jnp.float32), WGMMA)
        most, total = rows(LOWEST), rows(0)
        steps = walk.full_steps + walk.masked_steps

        @pl.when(steps > 0)
        def _():
            plgpu.barrier_wait(scratch.key_ready.at[0])

        pl.when(self.warpgroup == 1)(self._take_turns)
        carry = (out, most, total)
        if plan.num_full:
            carry = jax.lax.fori_loop(0, walk.full_steps, lambda step, carry: self._step(step, steps, carry), carry)
        carry = jax.lax.fori_loop(
            0, walk.masked_steps, lambda step, carry: self._step(walk.full_steps + step, steps, carry, step), carry
        )
        pl.when(self.warpgroup == 0)(self._take_turns)
        self._store(*carry)

    def _take_turns(self) -> None:
        plgpu.barrier_arrive(self.scratch.turn)
        plgpu.barrier_wait(self.scratch.turn)

    def _pieces(self):
        """Where a warpgroup's rows are: head, first token, and the rows, for every piece."""
        plan = self.plan
        for index in range(plan.pieces):
            first = self.warpgroup * WARPGROUP_ROWS + index * plan.piece
            head = self.heads * plan.heads + first // plan.queries
            token = self.tile * plan.queries + jax.lax.rem(first, plan.queries)
            yield head, pl.ds(token, plan.piece), pl.ds(index * plan.piece, plan.piece)

    def _load_query(self) -> None:
        ready = self.scratch.query_ready.at[self.warpgroup]
        for head, tokens, rows in self._pieces():
            there = self.scratch.query.at[self.warpgroup, rows]
            plgpu.copy_gmem_to_smem(self.inputs.query.at[self.batch, tokens, head], there, ready)
        plgpu.barrier_wait(ready)

    def _step(self, step, steps, carry, masked_step=None):
        """Online softmax over the keys of a step; maxima are of the logits times log2(e)."""
        plan, scratch = self.plan, self.scratch
        out, most, total = carry
        stage = jax.lax.rem(step, plan.stages)
        key, value = scratch.key.at[stage], scratch.value.at[stage]
        logits = product(
            scratch.query.at[self.warpgroup], key.transpose((1, 0)), (WARPGROUP_ROWS, plan.keys), self._take_turns
        )
        plgpu.barrier_arrive(scratch.key_free.at[stage])
        scale = plan.scale * LOG2E
        if plan.soft_cap is not None:
            logits, scale = jnp.tanh(logits * (plan.scale / plan.soft_cap)), plan.soft_cap * LOG2E
        if masked_step is not None:
            logits = jnp.where(self._allowed(masked_step), logits, -jnp.inf)
        new = jnp.maximum(most, logits.max(axis=1) * scale)
        shrink = jnp.exp2(most - new)
        weights = jnp.exp2(logits * scale - jax.lax.broadcast_in_dim(new, logits.shape, [0]))
        out = out * jax.lax.broadcast_in_dim(shrink, out.shape, [0])
        total = total * shrink + weights.sum(axis=1)
        weights = weights.astype(plan.dtype)
        out, total, new, weights = jax.lax.optimization_barrier((out, total, new, weights))
        plgpu.barrier_arrive(scratch.turn)
        plgpu.barrier_wait(scratch.value_ready.at[stage])
        plgpu.barrier_wait(scratch.turn)

        def wait_for_next_key():
            @pl.when(step + 1 < steps)
            def _():
                plgpu.barrier_wait(scratch.key_ready.at[jax.lax.rem(step + 1, plan.stages)])

        out = add_product(out, weights, value, wait_for_next_key)
        plgpu.barrier_arrive(scratch.value_free.at[stage])
        return out, new, total

    def _allowed(self, masked_step) -> Array:
        """Which keys of a step the rows may see: bool [WARPGROUP_ROWS, keys]."""
        plan, scratch, inputs = self.plan, self.scratch, self.inputs
        stage = jax.lax.rem(masked_step, plan.stages)
        shape = (WARPGROUP_ROWS, plan.keys)
        plgpu.barrier_wait(scratch.mask_ready.at[stage])
        rows = pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        conditions = []
        if inputs.words is not None:
            words = [
                plgpu.load(scratch.words.at[stage, index, rows], layout=ROW, optimized=False)
                for index in range(plan.slots * plan.words)
            ]
            conditions.append(_bits(words, shape, min(plan.slot, WORD)))
        for per_key, per_row, compare in (
            (scratch.segments, inputs.query_segments, jnp.equal),
            (scratch.positions, inputs.query_positions, jnp.less_equal),
        ):
            if per_key is not None:
                key = plgpu.load(per_key.at[stage], layout=COLUMN, optimized=False)
                row = plgpu.load(per_row.at[self.batch, self.tile, rows], layout=ROW, optimized=False)
                key, row = (jax.lax.broadcast_in_dim(array, shape, [axis]) for array, axis in ((key, 1), (row, 0)))
                conditions.append(compare(key, row))
        # What was read here is overwritten by copies: they go another way to shared memory.
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.mask_free.at[stage])
        allowed = conditions[0]
        for condition in conditions[1:]:
            allowed = allowed & condition
        return allowed

    def _store(self, out, most, total) -> None:
        plan, scratch, inputs = self.plan, self.scratch, self.inputs
        # A NaN is no zero: a row that reads one says so in its lse too.
        reads, nothing = total != 0, -jnp.inf
        if inputs.sinks is not None:
            # Where nothing is read, lse is the sink itself: there and back to base 2 would round it.
            nothing = self._sinks()
            out, most, total = _with_sinks(out, most, total, nothing * LOG2E)
        safe = jnp.where(total != 0, total, 1.0)
        out = out * jax.lax.broadcast_in_dim(1 / safe, out.shape, [0])
        lse = jnp.where(reads, (most + jnp.log2(safe)) * (1 / LOG2E), nothing)
        buffer = (scratch.query if scratch.out is None else scratch.out).at[self.warpgroup]
        buffer[...] = out.astype(plan.dtype)
        scratch.lse[self.warpgroup] = lse
        plgpu.commit_smem()
        for head, tokens, rows in self._pieces():
            plgpu.copy_smem_to_gmem(buffer.at[rows], self.out_ref.at[self.batch, tokens, head])
            plgpu.copy_smem_to_gmem(scratch.lse.at[self.warpgroup, rows], self.lse_ref.at[self.batch, head, tokens])
        plgpu.wait_smem_to_gmem(0)

    def _sinks(self) -> Array:
        rows = pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        return plgpu.load(self.inputs.sinks.at[self.heads, rows], layout=ROW, optimized=False)


def _with_sinks(out: Array, most: Array, total: Array, sinks: Array) -> tuple[Array, Array, Array]:
    """One more logit for every row, which has no value."""
    new = jnp.maximum(most, sinks)
    shrink = jnp.exp2(most - new)
    out = out * jax.lax.broadcast_in_dim(shrink, out.shape, [0])
    return out, new, total * shrink + jnp.exp2(sinks - new)


def _bits(words: list, shape: tuple[int, int], width: int) -> Array:
    """Bit `column % width` of word `column // width` of every row: bool `shape`."""
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
    word = jax.lax.broadcast_in_dim(words[0], shape, [0])
    for index, other in enumerate(words[1:], 1):
        word = jnp.where(column // width == index, jax.lax.broadcast_in_dim(other, shape, [0]), word)
    # Of a column's number, bits 1 and 2 depend on the thread and the rest on the register: shifted by the first, a
    # word is tested against a constant for every register.
    word = word >> (column & 6)
    return (word & (1 << (column & (width - 1) & ~6))) != 0


class Walk:
    """The entries of one tile: where they stand in the lists, and how they fill steps."""

    def __init__(self, plan: Plan, inputs: typing.Any, batch, heads, tile):
        self.plan, self.inputs = plan, inputs
        table = inputs.slices
        mine = batch if table.shape[0] > 1 else 0
        self.slices = [
            (table[mine, heads, tile, part, 0], table[mine, heads, tile, part, 1]) for part in range(plan.num_parts)
        ]
        full, masked = self.slices[: plan.num_full], self.slices[plan.num_full :]
        self.full, self.masked = _count(full) * plan.parts_of_block, _count(masked) * plan.parts_of_block
        self.full_steps = self.full // plan.slots
        self.left = self.full - self.full_steps * plan.slots
        self.masked_steps = -(-(self.left + self.masked) // plan.slots)

    def full_block(self, step, slot: int):
        """The number of the piece of the keys, in slots, that a slot of a step without a mask holds."""
        return self._block(step * self.plan.slots + slot, self.slices[: self.plan.num_full])[0]

    def masked_entry(self, masked_step, slot: int):
        """The same for a step with a mask, and the kind of its mask. Where nothing is left, a block that was read."""
        entry = masked_step * self.plan.slots + slot
        exists = entry < self.left + self.masked
        entry = jnp.minimum(entry, self.left + self.masked - 1)
        first = self.full_steps * self.plan.slots
        # The left ones are the last of the full entries; the rest goes on where they end.
        block, position = self._block(first + entry, self.slices)
        kind = self.inputs.masks[position]
        return block, jnp.where(exists, kind, EMPTY)

    def _block(self, entry, slices):
        plan = self.plan
        entry, part_of_block = entry // plan.parts_of_block, jax.lax.rem(entry, plan.parts_of_block)
        (start, stop), *rest = slices
        position, end = start + entry, stop - start
        for start, stop in rest:
            position = jnp.where(entry >= end, start + entry - end, position)
            end = end + stop - start
        return self.inputs.blocks[position] * plan.parts_of_block + part_of_block, position


def _count(slices: list):
    return sum((stop - start for start, stop in slices), jnp.int32(0))
