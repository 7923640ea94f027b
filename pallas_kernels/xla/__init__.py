"""Block-sparse attention in plain XLA: for CPUs, and wherever no kernel of its own fits.

Time grows with the blocks that are read, memory with the tokens, plus a bounded chunk.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from pallas_kernels.problem import Operands, Problem
from pallas_kernels.sharding import Sharding
from pallas_kernels.xla.backward import key_value_gradients, query_gradient
from pallas_kernels.xla.forward import RowPass, attend
from pallas_kernels.xla.layout import Layout
from pallas_kernels.xla.walks import (
    Walks,
    backward_walks,
    forward_walks,
    selection_walks,
    transposed_selection_walks,
    walkers_per_kv_head,
)


@dataclasses.dataclass(frozen=True)
class XlaTiles:
    """Tile sizes of the XLA path, in tokens; in whole blocks, at least one.

    Attributes:
      queries: rows of a tile of queries, the heads of a group counted.
      keys: keys gathered in a step of the forward and dq passes.
      packed_keys: keys whose gradients a tile computes.
      walked_queries: queries gathered in a step of the dk/dv pass, the heads of a group counted.
    """

    queries: int = 128
    keys: int = 256
    packed_keys: int = 128
    walked_queries: int = 256

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


TILES = XlaTiles


def refuse(problem: Problem, operands: Operands) -> str | None:
    """Why this backend cannot do it; it can do everything."""
    return None


def tables(problem: Problem) -> tuple[Walks, Walks] | None:
    """What the passes over queries and over keys walk, the walkers of all heads in order; None for a selection."""
    schedule, tiles = problem.schedule, _tiles(problem)
    if schedule is None:
        return None
    group = schedule.num_heads // schedule.num_kv_heads // walkers_per_kv_head(schedule)
    size = schedule.block_size
    return (
        forward_walks(schedule, _blocks(tiles.queries, size * group)),
        backward_walks(schedule, _blocks(tiles.packed_keys, size)),
    )


def _blocks(tokens: int, size: int) -> int:
    return max(1, tokens // size)


def table_specs(tables: tuple[Walks, Walks], sharding: Sharding) -> tuple[Walks, Walks]:
    """How the tables are split over a mesh: walkers with their heads, the lists that they share not at all."""
    return tuple(
        dataclasses.replace(
            jax.tree.map(lambda array: PartitionSpec(), walks),
            slices=sharding.of(heads=1, ndim=5),
            members=None if walks.members is None else sharding.of(heads=0, ndim=3),
            places=None if walks.places is None else sharding.of(heads=0, ndim=2),
        )
        for walks in tables
    )


def forward(problem: Problem, operands: Operands, *, bounded: bool = False) -> tuple[Array, Array]:
    """out [b, t, h, e] and lse [b, h, t] without sinks, both in the accumulation dtype."""
    out, lse = attend(_row_pass(problem, operands), bounded=bounded)
    return out, lse.swapaxes(1, 2)


def backward(
    problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array, *, differentiable: bool = False
) -> tuple[Array, Array, Array]:
    """dq, dk and dv in the accumulation dtype.

    Args:
      dout: [b, t, h, e].
      lse: [b, h, t], sinks included.
      delta: [b, h, t], Σ out · dout - dlse.
      differentiable: in turn, at the price of as many steps for every tile as the longest needs.
    """
    # A row that reads nothing has no weights: exp(logit - inf) is zero.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse).swapaxes(1, 2)
    delta = delta.swapaxes(1, 2)
    dquery = query_gradient(_row_pass(problem, operands), dout, lse, delta, bounded=differentiable)
    layout = _layout(problem, operands, of_keys=True)
    entries = _blocks(_tiles(problem).walked_queries, layout.row_size * layout.group)
    dkey, dvalue = key_value_gradients(layout, entries, dout, lse, delta, bounded=differentiable)
    return dquery, dkey, dvalue


def _tiles(problem: Problem) -> XlaTiles:
    return problem.tiles or XlaTiles()


def _row_pass(problem: Problem, operands: Operands) -> RowPass:
    layout = _layout(problem, operands, of_keys=False)
    return RowPass(layout, _blocks(_tiles(problem).keys, layout.block_size))


def _layout(problem: Problem, operands: Operands, *, of_keys: bool) -> Layout:
    """The call arranged for a pass over the queries, or over the keys."""
    selection, (kv_length, num_kv_heads) = operands.selection, operands.key.shape[1:3]
    if selection is None:
        assert problem.schedule is not None  # one of the two says what is read
        size = problem.schedule.block_size
        return Layout(problem, operands, operands.tables[of_keys], size, size)
    if of_keys:
        walks = transposed_selection_walks(selection, num_kv_heads, -(-kv_length // selection.block_size))
    else:
        walks = selection_walks(selection, num_kv_heads)
    return Layout(problem, operands, walks, selection.query_block, selection.block_size)
