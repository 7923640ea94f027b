"""Running a backend on the shards of a mesh, each on its own batch elements and heads, with no communication."""


from jax.sharding import PartitionSpec as P

from pallas_kernels.problem import Operands


def over_shards(function, operands: Operands, query_spec: P | None, results: tuple[str, ...], extra: tuple = ()):
    """`function(operands, *extra)` on every shard.

    Args:
      query_spec: the query's PartitionSpec, for meshes with Auto axes.
      results: what the function gives back: names of operands' fields whose sharding it shares, "out" or "lse".
      extra: out, lse, dout and dlse of the forward pass, if the function takes them.
    """
    return function(operands, *extra)
