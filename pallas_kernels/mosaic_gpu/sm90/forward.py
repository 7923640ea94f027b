"""Forward attention on Hopper.

A thread block computes 128 rows: 128 consecutive queries of a head, or fewer queries of several heads that read the
same keys. Its two compute warpgroups ping-pong as in FlashAttention-3: one of them uses the tensor cores while the
other computes its softmax.
"""

import functools
import typing
from collections.abc import Iterator

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.sm90 import pipeline
from pallas_kernels.mosaic_gpu.sm90.config import WARPGROUP_ROWS, WARPGROUPS, QKernelSpec
from pallas_kernels.mosaic_gpu.sm90.inputs import KernelInputs
from pallas_kernels.mosaic_gpu.sm90.pipeline import Chunk, Ref, Step, add_dot_nn, broadcast_rows, dot_nt, plgpu
from pallas_kernels.schedule import NOTHING
from pallas_kernels.softmax import LOG2E

INITIAL_M = -0.5 * float(np.finfo(np.float32).max)
"""The initial running maximum. It is finite, so that rows that read nothing compute no -inf - -inf."""

REGISTERS = pipeline.Registers(compute=224, load=56)
"""No case in `benchmarks/results/ptxas_report.json` spills in its steps, and one does in its load warpgroup.

More cases spilled there with 232 and 40, or 240 and 24.
"""


def forward_kernel(spec: QKernelSpec, inputs: KernelInputs) -> tuple[Array, Array]:
    """Attention output and log-sum-exp.

    Returns:
      out [b, t, h, e] in the query's dtype, and lse [b, h, num_tiles · block_q] in float32, sinks included.
    """
    out = jax.ShapeDtypeStruct((*inputs.query.shape[:3], spec.value_dim), spec.dtype)
    lse = jax.ShapeDtypeStruct((spec.batch, spec.num_heads, spec.num_tiles * spec.block_q), jnp.float32)
    smem = query_tile_smem(spec, inputs, contracted="value") | {
        # The output is staged in the query's buffer if it has the same shape.
        "out": pipeline.tile_buffer(spec, spec.value_dim) if spec.value_dim != spec.head_dim else None,
        "lse": plgpu.SMEM((WARPGROUPS, WARPGROUP_ROWS), jnp.float32),
        "rows_full": pipeline.barriers(WARPGROUPS, spec.copies_per_warpgroup),
        "ping_pong": pipeline.barriers(1, WARPGROUPS),
    }
    out, lse = pipeline.launch("attend", spec, QueryTile, _compute, inputs, (out, lse), smem, REGISTERS)
    return out, lse


# The tile, which dq has too.


def query_tile_smem(spec: QKernelSpec, inputs: KernelInputs, *, contracted: str) -> dict:
    """Shared memory for the query, keys, values and masks of a tile.

    Args:
      spec: configuration of the kernel.
      inputs: arrays of the call.
      contracted: "key" or "value", over whose tokens a product contracts.
    """
    has_bits, has_segments, has_positions = (
        array is not None for array in (inputs.tables.mask_bits, inputs.kv_segments, inputs.kv_positions)
    )
    return {
        "query": pipeline.tile_buffer(spec, spec.head_dim, contracted=contracted == "key"),
        "key": pipeline.step_buffer(spec, spec.head_dim, contracted=contracted == "key"),
        "value": pipeline.step_buffer(spec, spec.value_dim, contracted=contracted == "value"),
        **pipeline.mask_buffers(spec, has_bits, has_segments, has_positions),
        **pipeline.stage_barriers(spec, key=1, value=1, mask=has_bits + has_segments + has_positions),
    }


class QueryTile:
    """A tile of 128 rows: `block_q` consecutive queries of each of `heads_per_tile` heads.

    Attributes:
      tile: number of the tile along the queries.
      batch: number of the sequence.
      head_tile: number of the group of `heads_per_tile` query heads.
      loop: the loop over the keys.
      warpgroup: number of this warpgroup.
    """

    def __init__(self, spec: QKernelSpec, indices: list, inputs: typing.Any, results: tuple, smem: dict):
        """Describes which keys, values and masks are loaded.

        Args:
          spec: configuration of the kernel.
          indices: indices of the thread block in `spec.grid`.
          inputs: references to `KernelInputs`.
          results: references to the results.
          smem: references to shared memory.
        """
        self.spec, self.inputs, self.results, self.smem = spec, inputs, results, smem
        tile, self.batch, self.head_tile = indices
        # Thread blocks start in order: under a causal pattern the last tiles, which are the longest, start first.
        self.tile = spec.num_tiles - 1 - tile
        tables = inputs.tables
        ranges = tables.ranges.at[self.batch if tables.ranges.shape[0] > 1 else 0, self.head_tile, self.tile]
        kv_head = self.head_tile * spec.heads_per_tile // spec.group_size

        def tokens(chunk: Chunk):
            return pl.ds(chunk.index * spec.chunk_size, spec.chunk_size)

        def positions(chunk: Chunk):
            # The last positions belong to no key and are read by no query.
            nowhere = inputs.kv_positions.shape[0] - spec.chunk_size
            first = jnp.where(chunk.mask_id == NOTHING, nowhere, chunk.index * spec.chunk_size)
            return inputs.kv_positions.at[pl.ds(first, spec.chunk_size)]

        mask_copies: pipeline.Copies = {}
        id_masks: list[pipeline.IdMask] = []
        if inputs.tables.mask_bits is not None:
            mask_copies["mask_bits"] = pipeline.mask_bits_of(spec, inputs.tables.mask_bits)
        if inputs.kv_segments is not None:
            mask_copies["segments"] = lambda chunk: inputs.kv_segments.at[self.batch, tokens(chunk)]
            id_masks.append(pipeline.IdMask("segments", inputs.query_segments.at[self.batch, self.tile], jnp.equal))
        if inputs.kv_positions is not None:
            mask_copies["positions"] = positions
            rows = inputs.query_positions.at[self.batch, self.tile]
            id_masks.append(pipeline.IdMask("positions", rows, jnp.less_equal))
        loads: dict[str, pipeline.Copies] = {
            "key": {"key": lambda chunk: inputs.key.at[self.batch, tokens(chunk), kv_head]},
            "value": {"value": lambda chunk: inputs.value.at[self.batch, tokens(chunk), kv_head]},
        }
        iterator = pipeline.BlockIterator(spec, tables.blocks, tables.mask_ids, ranges)
        self.loop = pipeline.StepLoop(spec, smem, lambda head_pass: iterator, loads, mask_copies, id_masks)
        self.warpgroup = self.loop.warpgroup

    def row_copies(self) -> Iterator[tuple]:
        """Head, tokens, and rows of the warpgroup's buffer, for each copy of its rows."""
        spec = self.spec
        for index in range(spec.copies_per_warpgroup):
            first = self.warpgroup * WARPGROUP_ROWS + index * spec.rows_per_copy
            head = self.head_tile * spec.heads_per_tile + first // spec.block_q
            token = self.tile * spec.block_q + jax.lax.rem(first, spec.block_q)
            yield head, pl.ds(token, spec.rows_per_copy), pl.ds(index * spec.rows_per_copy, spec.rows_per_copy)

    def load_rows(self, *arrays: tuple[Ref, Ref]) -> None:
        """Copies the warpgroup's rows of arrays [b, t, h, features] to buffers, and waits for them."""
        full = self.smem["rows_full"].at[self.warpgroup]
        for head, tokens, rows in self.row_copies():
            for source, buffer in arrays:
                destination = buffer.at[self.warpgroup, rows]
                plgpu.copy_gmem_to_smem(source.at[self.batch, tokens, head], destination, full)
        plgpu.barrier_wait(full)


# The compute warpgroups.


class Softmax(typing.NamedTuple):
    """Online softmax of a warpgroup's rows over the keys so far, where x is a logit times log2(e).

    Attributes:
      acc: float32 [WARPGROUP_ROWS, e], Σ exp2(x - m) · value.
      m: float32 [WARPGROUP_ROWS], the maximum of x.
      l: float32 [WARPGROUP_ROWS], Σ exp2(x - m).
    """

    acc: Array
    m: Array
    l: Array


def _compute(tile: QueryTile) -> None:
    """Computes out and lse of a warpgroup's 64 rows."""
    smem, loop = tile.smem, tile.loop
    tile.load_rows((tile.inputs.query, smem["query"]))

    def row_values(value: float):
        return plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), value, jnp.float32), pipeline.ROW)

    softmax = Softmax(pipeline.zeros(tile.spec.value_dim), row_values(INITIAL_M), row_values(0))

    @pl.when(loop.unmasked_steps + loop.masked_steps > 0)
    def _():
        plgpu.barrier_wait(smem["key_full"].at[0])

    # Warpgroup 1 starts one phase later, so that its products run during the other one's softmax.
    pl.when(tile.warpgroup == 1)(lambda: _ping_pong(tile))
    softmax = loop.fold(functools.partial(_step, tile), softmax)
    pl.when(tile.warpgroup == 0)(lambda: _ping_pong(tile))
    _store(tile, softmax)


def _ping_pong(tile: QueryTile) -> None:
    """Ends a phase of the ping-pong barrier: waits until the other warpgroup ends its own."""
    plgpu.barrier_arrive(tile.smem["ping_pong"])
    plgpu.barrier_wait(tile.smem["ping_pong"])


def _step(tile: QueryTile, step: Step, softmax: Softmax) -> Softmax:
    """Adds a step's keys to the online softmax."""
    spec, smem, loop = tile.spec, tile.smem, tile.loop
    acc, m, l = softmax
    q, k, v = smem["query"].at[tile.warpgroup], smem["key"].at[step.stage], smem["value"].at[step.stage]

    # Scores. The previous step has waited for the keys.
    logits = dot_nt(q, k, overlap=lambda: _ping_pong(tile))
    plgpu.barrier_arrive(smem["key_empty"].at[step.stage])
    scale = spec.scale * LOG2E
    if spec.soft_cap is not None:
        logits, scale = jnp.tanh(logits * (spec.scale / spec.soft_cap)), spec.soft_cap * LOG2E
    if step.mask is not None:
        logits = jnp.where(step.mask(), logits, -jnp.inf)

    # Online softmax.
    m_new = jnp.maximum(m, logits.max(axis=1) * scale)
    alpha = jnp.exp2(m - m_new)
    p = jnp.exp2(logits * scale - broadcast_rows(m_new, logits.shape))
    acc = acc * broadcast_rows(alpha, acc.shape)
    l = l * alpha + p.sum(axis=1)
    p = p.astype(spec.dtype)
    acc, l, m, p = jax.lax.optimization_barrier((acc, l, m_new, p))

    # Product with the values, in the next phase of the ping-pong.
    plgpu.barrier_arrive(smem["ping_pong"])
    plgpu.barrier_wait(smem["value_full"].at[step.stage])
    plgpu.barrier_wait(smem["ping_pong"])

    def wait_for_next_key():
        @pl.when(step.index + 1 < loop.unmasked_steps + loop.masked_steps)
        def _():
            plgpu.barrier_wait(smem["key_full"].at[loop.next_stage(step.stage)])

    acc = add_dot_nn(acc, p, v, overlap=wait_for_next_key)
    plgpu.barrier_arrive(smem["value_empty"].at[step.stage])
    return Softmax(acc, m, l)


def _store(tile: QueryTile, softmax: Softmax) -> None:
    """Normalizes the accumulator and writes out and lse."""
    smem, inputs = tile.smem, tile.inputs
    acc, m, l = softmax
    # l is NaN, not 0, in rows that read a NaN: their lse is NaN too.
    reads, lse_of_empty = l != 0, -jnp.inf
    if inputs.sinks is not None:
        # The lse of an empty row is the sink itself; converted to base 2 and back, it would be rounded.
        lse_of_empty = pipeline.load_row_values(inputs.sinks.at[tile.head_tile, tile.loop.rows])
        acc, m, l = _add_sinks(softmax, lse_of_empty * LOG2E)
    safe = jnp.where(l != 0, l, 1.0)
    out = acc * broadcast_rows(1 / safe, acc.shape)
    lse = jnp.where(reads, (m + jnp.log2(safe)) * (1 / LOG2E), lse_of_empty)
    out_smem = smem["query" if smem["out"] is None else "out"].at[tile.warpgroup]
    out_smem[...] = out.astype(tile.spec.dtype)
    lse_smem = smem["lse"].at[tile.warpgroup]
    lse_smem[...] = lse
    plgpu.commit_smem()
    out_ref, lse_ref = tile.results
    for head, tokens, rows in tile.row_copies():
        plgpu.copy_smem_to_gmem(out_smem.at[rows], out_ref.at[tile.batch, tokens, head])
        plgpu.copy_smem_to_gmem(lse_smem.at[rows], lse_ref.at[tile.batch, head, tokens])
    plgpu.wait_smem_to_gmem(0)


def _add_sinks(softmax: Softmax, sinks: Array) -> Softmax:
    """Adds one logit per row that has no value; `sinks` are times log2(e)."""
    acc, m, l = softmax
    m_new = jnp.maximum(m, sinks)
    alpha = jnp.exp2(m - m_new)
    acc = acc * broadcast_rows(alpha, acc.shape)
    return Softmax(acc, m_new, l * alpha + jnp.where(sinks == m_new, 1, jnp.exp2(sinks - m_new)))
