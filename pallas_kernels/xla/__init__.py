"""Block-sparse attention in plain XLA: for CPUs, and wherever no kernel of its own fits.

Time grows with the blocks that are read, memory with the tokens, plus a bounded chunk.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from pallas_kernels.problem import Operands, Problem
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.sharding import Sharding
from pallas_kernels.softmax import add_sinks
from pallas_kernels.xla.backward import key_value_gradients, query_gradient
from pallas_kernels.xla.forward import RowPass, attend
from pallas_kernels.xla.layout import Layout
from pallas_kernels.xla.one_pass import all_gradients
from pallas_kernels.xla.tangents import attend_tangents
from pallas_kernels.xla.walks import (
    Walks,
    backward_walks,
    forward_walks,
    selection_walks,
    transposed_selection_walks,
    unique_heads_per_kv_head,
)


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """Tile sizes of the XLA path, in tokens; in whole blocks, at least one.

    Attributes:
      block_q: rows of a tile of queries, the heads of a group counted.
      block_kv: at most so many keys gathered in a step of a pass over queries.
      grad_block_kv: keys whose gradients a tile computes, in a pass over keys.
      grad_block_q: queries gathered in a step of such a pass, the heads of a group counted, at most.
    """

    block_q: int = 128
    block_kv: int = 256
    grad_block_kv: int = 128
    grad_block_q: int = 256

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


CONFIG = XlaConfig

ONE_PASS = ("cpu",)
"""Platforms whose scatters add in order, so that dk and dv have the same bits every time."""


def unsupported_reason(problem: Problem, operands: Operands) -> str | None:
    """Why this backend cannot do it; it can do everything."""
    return None


def forward_tables(problem: Problem, operands: Operands) -> Walks | None:
    """What the pass over the queries walks, the walkers of all heads in order; None for a selection."""
    schedule, config = problem.schedule, _config(problem)
    if schedule is None:
        return None
    size = schedule.block_size
    return forward_walks(schedule, _blocks(config.block_q, size * _group(schedule)), _blocks(config.block_kv, size))


def backward_tables(problem: Problem, operands: Operands) -> tuple[Walks, Walks] | None:
    """What the passes over queries and over keys walk; None for a selection."""
    schedule, config, forward = problem.schedule, _config(problem), forward_tables(problem, operands)
    if schedule is None or forward is None:
        return None
    size, group = schedule.block_size, _group(schedule)
    packed, walked = _blocks(config.grad_block_kv, size), _blocks(config.grad_block_q, size * group)
    return forward, backward_walks(schedule, packed, walked)


def _group(schedule: BlockSchedule) -> int:
    """Query heads that walk as one."""
    return schedule.num_heads // schedule.num_kv_heads // unique_heads_per_kv_head(schedule)


def _blocks(tokens: int, size: int) -> int:
    return max(1, tokens // size)


def table_specs(tables: Walks | tuple[Walks, Walks], sharding: Sharding) -> typing.Any:
    """How the tables are split over a mesh: walkers with their heads, the lists that they share not at all."""
    if isinstance(tables, tuple):
        return tuple(table_specs(each, sharding) for each in tables)
    return dataclasses.replace(
        jax.tree.map(lambda array: PartitionSpec(), tables),
        ranges=sharding.of(heads=1, ndim=5),
        members=None if tables.members is None else sharding.of(heads=0, ndim=3),
        places=None if tables.places is None else sharding.of(heads=0, ndim=2),
    )


def forward(problem: Problem, operands: Operands, *, bounded: bool = False) -> tuple[Array, Array]:
    """out [b, t, h, e] in the query's dtype and lse [b, h, t] in the accumulation dtype, sinks included."""
    out, lse = attend(_row_pass(problem, operands, operands.tables), bounded=bounded)
    out, lse = add_sinks(out, lse.swapaxes(1, 2), operands.sinks)
    return out.astype(operands.query.dtype), lse


def backward(
    problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array, *, differentiable: bool = False
) -> tuple[Array, Array, Array]:
    """dq, dk and dv in the inputs' dtype.

    Args:
      dout: [b, t, h, e].
      lse: [b, h, t], sinks included.
      delta: [b, h, t], Σ out · dout - dlse.
      differentiable: in turn, at the price of as many steps for every tile as the longest needs.
    """
    # A row that reads nothing has no weights: exp(logit - inf) is zero.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse).swapaxes(1, 2)
    delta = delta.swapaxes(1, 2)
    if differentiable:
        return _as_inputs(operands, _two_passes(problem, operands, dout, lse, delta, bounded=True))
    passes = _one_pass if problem.platform in ONE_PASS else _two_passes
    return _as_inputs(operands, passes(problem, operands, dout, lse, delta))


def tangents(
    problem: Problem, operands: Operands, lse: Array, query, key, value, *, differentiable: bool = False
) -> tuple[Array, Array]:
    """What the op's tangents are made of, in the accumulation dtype: see `attend_tangents`.

    Args:
      lse: [b, h, t], sinks included.
      query, key, value: tangents, None for zero.
      differentiable: in turn, at the price of as many steps for every tile as the longest needs.
    """
    of_rows = jnp.where(lse == -jnp.inf, jnp.inf, lse).swapaxes(1, 2)
    given = {"query": query, "key": key, "value": value}
    moved = {name: jnp.zeros_like(getattr(operands, name)) if each is None else each for name, each in given.items()}
    of_tangents = dataclasses.replace(operands, **moved)
    queries, changes = (_row_pass(problem, each, operands.tables) for each in (operands, of_tangents))
    out, total = attend_tangents(queries, changes, of_rows, bounded=differentiable)
    return out, total.swapaxes(1, 2)


def _as_inputs(operands: Operands, gradients: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    dquery, dkey, dvalue = gradients
    dtype = operands.query.dtype
    return dquery.astype(dtype), dkey.astype(dtype), dvalue.astype(dtype)


def _one_pass(problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array):
    over_queries = None if operands.tables is None else operands.tables[0]
    return all_gradients(_row_pass(problem, operands, over_queries), dout, lse, delta)


def _two_passes(problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array, *, bounded: bool = False):
    over_queries, over_keys = (None, None) if operands.tables is None else operands.tables
    dquery = query_gradient(_row_pass(problem, operands, over_queries), dout, lse, delta, bounded=bounded)
    layout = _layout(problem, operands, over_keys, of_keys=True)
    return dquery, *key_value_gradients(layout, dout, lse, delta, bounded=bounded)


def _config(problem: Problem) -> XlaConfig:
    return problem.config or XlaConfig()


def _row_pass(problem: Problem, operands: Operands, walks: Walks | None) -> RowPass:
    return RowPass(_layout(problem, operands, walks, of_keys=False))


def _layout(problem: Problem, operands: Operands, walks: Walks | None, *, of_keys: bool) -> Layout:
    """The call arranged for a pass over the queries, or over the keys."""
    selection, (kv_length, num_kv_heads) = operands.selection, operands.key.shape[1:3]
    if selection is None:
        assert problem.schedule is not None  # one of the two says what is read
        assert walks is not None
        return Layout(problem, operands, walks, problem.schedule.block_size, problem.schedule.block_size)
    if of_keys:
        group = operands.query.shape[2] // max(selection.counts.shape[1], num_kv_heads)
        per_step = _blocks(_config(problem).grad_block_q, selection.query_block * group)
        num_blocks = -(-kv_length // selection.block_size)
        walks = transposed_selection_walks(selection, num_kv_heads, num_blocks, per_step)
    else:
        walks = selection_walks(selection, num_kv_heads, _blocks(_config(problem).block_kv, selection.block_size))
    return Layout(problem, operands, walks, selection.query_block, selection.block_size)
