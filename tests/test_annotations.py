"""The check of annotations catches planted errors, and leaves everything else alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.padding import QueryGrid
from tests.annotations import AnnotationError, decorated

SOURCE = """
from jax import Array
from jaxtyping import Float, Int32
import typing

def summed(query: Float[Array, "b t d"], ids: Int32[Array, "b t"] | None = None) -> Float[Array, "b t"]:
    return query.sum(-1)

def transposed(query: Float[Array, "b t"]) -> tuple[Float[Array, "t b"], int]:
    return query if query.shape[0] == 2 else query.T, 1

def without(query: typing.Any, number: int) -> int:
    return number
"""


@pytest.fixture
def module() -> dict:
    found: dict = {}
    exec(compile(decorated(SOURCE), "planted.py", "exec"), found)
    return found


def test_what_is_annotated_passes(module):
    assert module["summed"](jnp.ones((2, 3, 4)), jnp.ones((2, 3), "int32")).shape == (2, 3)
    assert module["summed"](np.ones((2, 3, 4), np.float32), None).shape == (2, 3)
    assert module["transposed"](jnp.ones((3, 2)))[0].shape == (2, 3)
    assert not hasattr(module["without"], "__wrapped__")


@pytest.mark.parametrize(
    "arguments",
    [
        (jnp.ones((2, 3)),),  # an axis is missing
        (jnp.ones((2, 3, 4), "int32"),),  # another dtype
        (jnp.ones((2, 3, 4)), jnp.ones((3, 2), "int32")),  # axes of one name differ
    ],
    ids=["rank", "dtype", "axes"],
)
def test_planted_arguments_are_caught(module, arguments):
    with pytest.raises(AnnotationError, match=r"summed: (query|ids|return) must be"):
        module["summed"](*arguments)


def test_a_planted_result_is_caught(module):
    with pytest.raises(AnnotationError, match=r"transposed: return\[0\] must be"):
        module["transposed"](jnp.ones((2, 3)))


def test_the_packages_are_checked():
    grid = QueryGrid(4, 2, 6, 0, 0)
    assert grid.edge_ids(jnp.zeros((2, 6), "int32")).shape == (2, 2, 4)
    with pytest.raises(AnnotationError, match=r"QueryGrid.edge_ids: ids must be"):
        grid.edge_ids(jnp.zeros((2, 6), "float32"))
