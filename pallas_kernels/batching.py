"""`vmap` of a pass as more sequences.

Pallas would add an axis to the grid instead, which cannot leave an array in HBM.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp

from pallas_kernels.problem import Operands

OF_SEQUENCES = ("query", "key", "value", "query_segment_ids", "kv_segment_ids", "query_offset", "selection")


def over_sequences(function: typing.Callable[..., tuple]) -> typing.Callable[..., tuple]:
    """`function(operands, *arrays)`, whose arrays and results begin with the batch; a mapped axis joins it.

    Sinks and tables have no batch. If they are mapped, the elements are computed one after the other.
    """

    @jax.custom_batching.custom_vmap
    def call(operands: Operands, *arrays):
        return function(operands, *arrays)

    @call.def_vmap
    def rule(size: int, batched, operands: Operands, *arrays):
        of_operands, *of_arrays = batched
        shared = jax.tree.leaves((of_operands.sinks, of_operands.tables))
        if any(shared):
            arguments = operands, *arrays
            mapped = _mapped_only(batched, arguments)
            results = jax.lax.map(lambda each: call(*_merge(each, batched, arguments)), mapped)
            return results, jax.tree.map(lambda _: True, results)
        batch = operands.query.shape[1 if of_operands.query else 0]

        def join(array, is_mapped: bool):
            array = array if is_mapped else jnp.broadcast_to(array, (size, *array.shape))
            # A selection may be one for all sequences.
            array = jnp.broadcast_to(array, (size, batch, *array.shape[2:]))
            return array.reshape(size * batch, *array.shape[2:])

        joined = {
            name: jax.tree.map(join, getattr(operands, name), getattr(of_operands, name)) for name in OF_SEQUENCES
        }
        arrays = [join(array, is_mapped) for array, is_mapped in zip(arrays, of_arrays, strict=True)]
        results = call(dataclasses.replace(operands, **joined), *arrays)
        results = jax.tree.map(lambda each: each.reshape(size, batch, *each.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return call


def _mapped_only(batched, arguments) -> list:
    """The mapped leaves."""
    pairs = zip(jax.tree.leaves(batched), jax.tree.leaves(arguments), strict=True)
    return [array for is_mapped, array in pairs if is_mapped]


def _merge(mapped: list, batched, arguments):
    """The arguments with one element of what is mapped."""
    leaves, structure = jax.tree.flatten(arguments)
    elements, pairs = iter(mapped), zip(jax.tree.leaves(batched), leaves, strict=True)
    found = [next(elements) if is_mapped else leaf for is_mapped, leaf in pairs]
    return jax.tree.unflatten(structure, found)
