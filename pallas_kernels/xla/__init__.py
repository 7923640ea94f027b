"""Block-sparse attention in plain XLA: for CPUs, and for whatever the other backends do not support.

Time grows with the blocks that are read, memory with the tokens, plus a bounded chunk.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool

from pallas_kernels.problem import Operands, Problem
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection
from pallas_kernels.sharding import Sharding
from pallas_kernels.softmax import add_sinks
from pallas_kernels.xla.backward import KeyPass, all_gradients, key_value_gradients, query_gradient, read_keys
from pallas_kernels.xla.block_lists import (
    TileLists,
    backward_lists,
    forward_lists,
    selection_lists,
    transposed_selection_lists,
    unique_heads_per_kv_head,
)
from pallas_kernels.xla.forward import QueryPass, attend, attend_tangents
from pallas_kernels.xla.layout import Layout


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """Tile sizes of the XLA path, in tokens; rounded down to whole blocks, at least one.

    Attributes:
      block_q: rows of a query tile, the heads of a group counted.
      block_kv: the most keys gathered in a step of a pass over queries; fewer if lists then fill steps better.
      grad_block_kv: keys of a KV tile, in a pass over keys.
      grad_block_q: the most queries gathered in a step of such a pass, the heads of a group counted.
    """

    block_q: int = 128
    block_kv: int = 256
    grad_block_kv: int = 128
    grad_block_q: int = 256

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


ONE_PASS = ("cpu",)
"""Platforms whose scatters add in order, so that dk and dv have the same bits every time."""


class XlaBackend:
    """Gathers blocks and multiplies them in bounded chunks; supports everything, in both modes of derivative."""

    name, platform, config_type = "xla", None, XlaConfig

    @property
    def differentiable(self) -> "XlaBackend":
        return self

    def unsupported_reason(self, problem: Problem, operands: Operands) -> str | None:
        return None

    def unsupported_device_reason(self, device) -> str | None:
        return None

    def forward_tables(self, problem: Problem, operands: Operands) -> TileLists | None:
        """Lists of the pass over queries, the unique heads of all heads in order; None for a selection."""
        schedule, config = operands.schedule, _config(problem)
        if isinstance(schedule, BlockSelection):
            return None
        size = schedule.block_size
        return forward_lists(schedule, _blocks(config.block_q, size * _group(schedule)), _blocks(config.block_kv, size))

    def key_tables(self, problem: Problem, operands: Operands) -> TileLists | None:
        """Lists of the pass over keys; None for a selection."""
        schedule, config = operands.schedule, _config(problem)
        if isinstance(schedule, BlockSelection):
            return None
        size, group = schedule.block_size, _group(schedule)
        return backward_lists(schedule, _blocks(config.grad_block_kv, size), _blocks(config.grad_block_q, size * group))

    def backward_tables(self, problem: Problem, operands: Operands) -> tuple[TileLists, TileLists] | None:
        """Lists of the passes over queries and over keys; None for a selection."""
        over_queries, over_keys = self.forward_tables(problem, operands), self.key_tables(problem, operands)
        return None if over_queries is None or over_keys is None else (over_queries, over_keys)

    def table_specs(self, tables: TileLists | tuple[TileLists, TileLists], sharding: Sharding) -> typing.Any:
        """Unique heads are split with their heads; the lists that they share are not split."""
        if isinstance(tables, tuple):
            return tuple(self.table_specs(each, sharding) for each in tables)
        return dataclasses.replace(
            jax.tree.map(lambda array: PartitionSpec(), tables),
            ranges=sharding.of(heads=1, ndim=5),
            members=None if tables.members is None else sharding.of(heads=0, ndim=3),
            places=None if tables.places is None else sharding.of(heads=0, ndim=2),
        )

    def forward(self, problem: Problem, operands: Operands) -> tuple[Array, Array]:
        out, lse = attend(_over_queries(problem, operands, operands.tables))
        out, lse = add_sinks(out, lse.swapaxes(1, 2), operands.sinks)
        return out.astype(operands.query.dtype), lse

    def backward(
        self, problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array, *, differentiable=False
    ) -> tuple[Array, Array, Array]:
        """dq, dk and dv; if `differentiable`, every tile takes as many steps as the longest."""
        # A row that reads nothing has no weights: exp(logit - inf) is zero.
        lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse).swapaxes(1, 2)
        of_rows = dout, lse, delta.swapaxes(1, 2)
        lists, lists_of_keys = (None, None) if operands.tables is None else operands.tables
        queries = _over_queries(problem, operands, lists)
        if problem.platform in ONE_PASS and not differentiable:
            gradients = all_gradients(queries, *of_rows)
        else:
            keys = _over_keys(problem, operands, lists_of_keys)
            dquery = query_gradient(queries, *of_rows, bounded=differentiable)
            gradients = dquery, *key_value_gradients(keys, *of_rows, bounded=differentiable)
        dquery, dkey, dvalue = (each.astype(operands.query.dtype) for each in gradients)
        return dquery, dkey, dvalue

    def tangents(
        self, problem: Problem, operands: Operands, lse: Array, query, key, value, *, differentiable=False
    ) -> tuple[Array, Array]:
        of_rows = jnp.where(lse == -jnp.inf, jnp.inf, lse).swapaxes(1, 2)
        given = {"query": query, "key": key, "value": value}
        moved = {
            name: jnp.zeros_like(getattr(operands, name)) if each is None else each for name, each in given.items()
        }
        of_tangents = dataclasses.replace(operands, **moved)
        queries, changes = (_over_queries(problem, each, operands.tables) for each in (operands, of_tangents))
        out, total = attend_tangents(queries, changes, of_rows, bounded=differentiable)
        return out, total.swapaxes(1, 2)

    def read_keys(self, problem: Problem, operands: Operands) -> Bool[Array, "b s k"]:
        """True for keys that some query of the KV head's group reads; the tables are those of `key_tables`."""
        return read_keys(_over_keys(problem, operands, operands.tables))


XLA = XlaBackend()


def _config(problem: Problem) -> XlaConfig:
    return problem.config or XlaConfig()


def _group(schedule: BlockSchedule) -> int:
    """Query heads of a unique head."""
    return schedule.num_heads // schedule.num_kv_heads // unique_heads_per_kv_head(schedule)


def _blocks(tokens: int, size: int) -> int:
    return max(1, tokens // size)


def _over_queries(problem: Problem, operands: Operands, lists: TileLists | None) -> QueryPass:
    """A pass over the queries, by the lists of a schedule or those of the selection."""
    schedule = operands.schedule
    if isinstance(schedule, BlockSelection):
        per_step = _blocks(_config(problem).block_kv, schedule.block_size)
        lists = selection_lists(schedule, operands.key.shape[2], per_step)
    assert lists is not None  # a schedule has tables
    return QueryPass(Layout(problem, operands, lists))


def _over_keys(problem: Problem, operands: Operands, lists: TileLists | None) -> KeyPass:
    """A pass over the keys."""
    schedule, (kv_length, num_kv_heads) = operands.schedule, operands.key.shape[1:3]
    if isinstance(schedule, BlockSelection):
        group = operands.query.shape[2] // max(schedule.counts.shape[1], num_kv_heads)
        per_step = _blocks(_config(problem).grad_block_q, schedule.query_block * group)
        num_blocks = -(-kv_length // schedule.block_size)
        lists = transposed_selection_lists(schedule, num_kv_heads, num_blocks, per_step)
    assert lists is not None  # a schedule has tables
    return KeyPass(Layout(problem, operands, lists))
