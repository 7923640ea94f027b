"""A tile of queries, which walks lists of keys: the forward pass, and the gradient of the queries."""

import typing

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.launch import barriers, row_buffer, step_buffer
from pallas_kernels.mosaic_gpu.plan import ROWS, WARPGROUP_ROWS, WARPGROUPS, Plan
from pallas_kernels.mosaic_gpu.steps import Condition, Steps, Stream
from pallas_kernels.mosaic_gpu.tables import EMPTY, Inputs
from pallas_kernels.mosaic_gpu.untyped import plgpu
from pallas_kernels.mosaic_gpu.walk import Entry, Walk


def shared_memory(plan: Plan, inputs: Inputs, *, summed: str) -> dict:
    """Buffers and barriers of every tile of queries; `ready` says that copies came, `free` that they were used.

    Args:
      summed: "key" or "value", over whose rows a product sums.
    """
    stages, masks = plan.num_stages, inputs.num_mask_arrays
    per_key = plgpu.SMEM((stages, plan.step_size), jnp.int32)
    mask_bits = plgpu.SMEM((stages, plan.slots * plan.mask_words, ROWS), jnp.int32)
    return {
        "query": row_buffer(plan, plan.head_dim, summed=summed == "key"),
        "key": step_buffer(plan, plan.head_dim, summed=summed == "key"),
        "value": step_buffer(plan, plan.value_dim, summed=summed == "value"),
        "mask_bits": None if inputs.mask_bits is None else mask_bits,
        "segments": None if inputs.kv_segments is None else per_key,
        "positions": None if inputs.kv_positions is None else per_key,
        "key_ready": barriers(stages, plan.slots),
        "value_ready": barriers(stages, plan.slots),
        "mask_ready": barriers(stages, plan.slots * masks),
        "key_free": barriers(stages, WARPGROUPS),
        "value_free": barriers(stages, WARPGROUPS),
        "mask_free": barriers(stages, WARPGROUPS),
    }


def tile_grid(plan: Plan) -> dict[str, int]:
    return {"tile": plan.num_tiles, "batch": plan.batch, "heads": plan.num_heads // plan.heads_per_tile}


class QueryTile(Steps):
    """One block of threads and its tile of 128 rows: so many queries of a head, or fewer of several heads."""

    plan: Plan

    def __init__(self, plan: Plan, at: dict, inputs: typing.Any, results: tuple, scratch: dict):
        self.inputs, self.results, self.scratch = inputs, results, scratch
        self.batch, self.heads = at["batch"], at["heads"]
        # Blocks of threads start in the order of their numbers: with causal patterns, the longest first.
        self.tile = plan.num_tiles - 1 - at["tile"]
        table = inputs.ranges
        mine = table.at[self.batch if table.shape[0] > 1 else 0, self.heads, self.tile]
        super().__init__(plan, lambda _: Walk(plan, inputs.blocks, inputs.mask_ids, mine))
        kv_head = self.heads * plan.heads_per_tile // plan.group

        def tokens_of(array):
            return lambda entry: array.at[self.batch, pl.ds(entry.piece * plan.slot, plan.slot), kv_head]

        self.streams = [
            Stream([(tokens_of(inputs.key), scratch["key"])], scratch["key_ready"], scratch["key_free"]),
            Stream([(tokens_of(inputs.value), scratch["value"])], scratch["value_ready"], scratch["value_free"]),
        ]
        self.masks = Stream(self._mask_copies(), scratch["mask_ready"], scratch["mask_free"])
        self.mask_bits = scratch["mask_bits"]
        self.conditions = [
            Condition(scratch[name], of_rows.at[self.batch, self.tile], compare)
            for name, of_rows, compare in (
                ("segments", inputs.query_segments, jnp.equal),
                ("positions", inputs.query_positions, jnp.less_equal),
            )
            if of_rows is not None
        ]

    def _mask_copies(self) -> list:
        plan, scratch, inputs = self.plan, self.scratch, self.inputs

        def mask_bits(entry: Entry):
            piece_of_block = jax.lax.rem(entry.piece, plan.pieces_of_block)
            return inputs.mask_bits.at[entry.mask_id, pl.ds(piece_of_block * plan.mask_words, plan.mask_words)]

        def segments(entry: Entry):
            return inputs.kv_segments.at[self.batch, pl.ds(entry.piece * plan.slot, plan.slot)]

        def positions(entry: Entry):
            # The last positions of all belong to no key: no query sees them.
            nowhere = inputs.kv_positions.shape[0] - plan.slot
            first = jnp.where(entry.mask_id == EMPTY, nowhere, entry.piece * plan.slot)
            return inputs.kv_positions.at[pl.ds(first, plan.slot)]

        each = (
            (inputs.mask_bits, mask_bits, "mask_bits"),
            (inputs.kv_segments, segments, "segments"),
            (inputs.kv_positions, positions, "positions"),
        )
        return [(part_of, scratch[name]) for array, part_of, name in each if array is not None]

    def pieces(self) -> typing.Iterator[tuple]:
        """Where a warpgroup's rows are: head, tokens, and the rows, for every piece."""
        plan = self.plan
        for index in range(plan.pieces):
            first = self.warpgroup * WARPGROUP_ROWS + index * plan.piece
            head = self.heads * plan.heads_per_tile + first // plan.block_q
            token = self.tile * plan.block_q + jax.lax.rem(first, plan.block_q)
            yield head, pl.ds(token, plan.piece), pl.ds(index * plan.piece, plan.piece)

    def bring_rows(self, *arrays: tuple) -> None:
        """Brings the warpgroup's rows of arrays [b, t, h, f] into buffers."""
        ready = self.scratch["query_ready"].at[self.warpgroup]
        for head, tokens, rows in self.pieces():
            for source, buffer in arrays:
                there = buffer.at[self.warpgroup, rows]
                plgpu.copy_gmem_to_smem(source.at[self.batch, tokens, head], there, ready)
        plgpu.barrier_wait(ready)
