"""The operation by its definition: a token mask, dense, O(t · s) memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.problem import Operands, Problem, accumulation_dtype
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection
from pallas_kernels.sharding import Sharding
from pallas_kernels.softmax import add_sinks


def masked_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s k d"],
    value: Float[Array, "b s k e"],
    mask: Bool[Array, "#b #h t s"],
    *,
    scale: float,
    query_segment_ids: Int32[Array, "b t"] | None = None,
    kv_segment_ids: Int32[Array, "b s"] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " h"] | None = None,
) -> tuple[Float[Array, "b t h e"], Float[Array, "b h t"]]:
    """Softmax over the keys that the mask and the segments let through.

    Computes in float32, or float64 for float64 inputs. Returns the output in the query's dtype and the natural
    log-sum-exp of the logits. A row that reads nothing gives zeros, and the sink or -inf.
    """
    compute = accumulation_dtype(query.dtype)
    group = query.shape[2] // key.shape[2]
    precision = jax.lax.Precision.HIGHEST
    if query_segment_ids is not None and kv_segment_ids is not None:
        mask = mask & (query_segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :])
    batch, _, heads, _ = query.shape
    dtype = query.dtype
    mask = jnp.broadcast_to(mask, (batch, heads, *mask.shape[2:]))
    query, key, value = (array.astype(compute) for array in (query, key, value))
    # What no query reads is zeroed: 0 · NaN is NaN, and the zero gradient of a hidden logit is no better.
    read = mask.reshape(batch, key.shape[2], group, *mask.shape[2:]).any((2, 3)).swapaxes(1, 2)[..., None]
    key, value = jnp.where(read, key, 0), jnp.where(read, value, 0)
    grouped = query.reshape(*query.shape[:2], key.shape[2], group, query.shape[3])
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, key, precision=precision) * jnp.asarray(scale, compute)
    logits = logits.reshape(mask.shape)
    if logits_soft_cap is not None:
        cap = jnp.asarray(logits_soft_cap, compute)
        logits = cap * jnp.tanh(logits / cap)
    logits = jnp.where(mask, logits, -jnp.inf)
    most = logits.max(-1, initial=-jnp.inf)
    sink = None if sinks is None else jnp.broadcast_to(sinks.astype(compute)[None, :, None], most.shape)
    if sink is not None:
        most = jnp.maximum(most, sink)
    most = jax.lax.stop_gradient(jnp.where(jnp.isneginf(most), 0, most))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits, 0) - most[..., None]), 0)
    total = weights.sum(-1)
    if sink is not None:
        total = total + jnp.exp(sink - most)
    reads = total != 0  # a NaN is no zero: lse says so too
    safe = jnp.where(reads, total, 1)
    weights = (weights / safe[..., None]).reshape(batch, key.shape[2], group, *mask.shape[2:])
    out = jnp.einsum("bkgts,bske->btkge", weights, value, precision=precision)
    lse = jnp.where(reads, jnp.log(safe) + most, -jnp.inf)
    return out.reshape(*query.shape[:3], value.shape[3]).astype(dtype), lse


class ReferenceBackend:
    """The operation by its definition, for tests and small shapes."""

    name, platform, config_type = "reference", None, type(None)

    @property
    def differentiable(self) -> "ReferenceBackend":
        return self

    def unsupported_reason(self, problem: Problem, operands: Operands) -> str | None:
        return None

    def unsupported_device_reason(self, device) -> str | None:
        return None

    def forward_tables(self, problem: Problem, operands: Operands) -> Bool[np.ndarray, "h t s"] | None:
        """The token mask of every head; None for a selection."""
        schedule = operands.schedule
        return None if isinstance(schedule, BlockSelection) else _token_mask(schedule)

    backward_tables = forward_tables

    def table_specs(self, tables: Array, sharding: Sharding) -> PartitionSpec:
        return sharding.of(heads=0, ndim=3)

    def forward(self, problem: Problem, operands: Operands) -> tuple[Array, Array]:
        out, lse = _attend(problem, operands, operands.query, operands.key, operands.value)
        out, lse = add_sinks(out, lse, operands.sinks)
        return out.astype(operands.query.dtype), lse

    def backward(
        self, problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array, *, differentiable=False
    ) -> tuple[Array, Array, Array]:
        inputs = operands.query, operands.key, operands.value
        (out, alone), pull = jax.vjp(functools.partial(_attend, problem, operands), *inputs)
        # With sinks, and whatever else stands in lse, the weights are smaller by a factor, and so are their gradients:
        # out' = share · out, so that the pull-back of (share · dout, dlse') has to give share · (dP - delta).
        share = jnp.where(jnp.isneginf(alone), 0, jnp.exp(alone - jnp.where(jnp.isneginf(lse), 0, lse)))
        scaled = share.swapaxes(1, 2)[..., None] * dout.astype(out.dtype)
        dlse = jnp.einsum("bthe,bthe->bht", out, scaled) - share * delta
        return pull((scaled, jnp.where(jnp.isneginf(alone), 0, dlse)))

    def tangents(
        self, problem: Problem, operands: Operands, lse: Array, query, key, value, *, differentiable=False
    ) -> tuple[Array, Array]:
        inputs = operands.query, operands.key, operands.value
        moved = tuple(
            jnp.zeros_like(each) if change is None else change
            for each, change in zip(inputs, (query, key, value), strict=True)
        )
        (out, alone), (dout, dlse) = jax.jvp(functools.partial(_attend, problem, operands), inputs, moved)
        # Without sinks the weights sum to one; with them, they are smaller by a factor.
        share = jnp.where(jnp.isneginf(alone), 0, jnp.exp(alone - jnp.where(jnp.isneginf(lse), 0, lse)))
        of_rows = share.swapaxes(1, 2)[..., None]
        dlse = jnp.where(jnp.isneginf(alone), 0, dlse)
        return of_rows * (dout + dlse.swapaxes(1, 2)[..., None] * out), share * dlse


REFERENCE = ReferenceBackend()


@functools.lru_cache(maxsize=8)
def _token_mask(schedule: BlockSchedule) -> np.ndarray:
    return schedule.token_mask()


def _attend(problem: Problem, operands: Operands, query, key, value):
    compute = accumulation_dtype(query.dtype)
    return masked_attention(
        query.astype(compute), key.astype(compute), value.astype(compute), _mask(problem, operands),
        scale=problem.scale, logits_soft_cap=problem.logits_soft_cap,
        query_segment_ids=operands.query_segment_ids, kv_segment_ids=operands.kv_segment_ids,
    )  # fmt: skip


def _mask(problem: Problem, operands: Operands) -> Bool[Array, "#b #h t s"]:
    query, key, offset = operands.query, operands.key, operands.query_offset
    if isinstance(operands.schedule, BlockSelection):
        return selection_mask(operands.schedule, query.shape[1], key.shape[1], query.shape[2], offset)
    mask = jax.lax.optimization_barrier(jnp.asarray(operands.tables))  # else XLA folds reductions of it while compiling
    if offset is None:
        return mask[None]
    return jax.vmap(lambda first: jax.lax.dynamic_slice_in_dim(mask, first, query.shape[1], 1))(offset)


def selection_mask(
    selection: BlockSelection, query_length: int, kv_length: int, num_heads: int, query_offset: Array | None = None
) -> Bool[Array, "#b h t s"]:
    """A selection written out, query by key."""
    used = jnp.arange(selection.kv_blocks.shape[-1], dtype=jnp.int32)[None, None, None] < selection.counts[..., None]
    num_blocks = -(-kv_length // selection.block_size)
    blocks = jax.nn.one_hot(jnp.where(used, selection.kv_blocks, -1), num_blocks, dtype=bool).any(-2)
    mask = jnp.repeat(jnp.repeat(blocks, selection.query_block, 2), selection.block_size, 3)
    mask = mask[:, :, :query_length, :kv_length]
    mask = jnp.repeat(mask, num_heads // mask.shape[1], 1)
    if selection.causal:
        first = jnp.zeros(1, jnp.int32) if query_offset is None else query_offset
        position = first[:, None, None, None] + jnp.arange(query_length, dtype=jnp.int32)[None, None, :, None]
        mask = mask & (jnp.arange(kv_length, dtype=jnp.int32)[None, None, None] <= position)
    return mask
