"""Docstrings of the op: the function of patterns and the function of schedules say the same of the same argument."""

import inspect
import re

import pytest

from pallas_kernels import block_sparse_attention
from s2jax import attention

OWN = {"pattern", "schedule", "query_offset"}
"""Arguments that the two functions take in different ways."""


def sections(function) -> dict[str, str]:
    """The text of each argument and of the other sections, with single spaces."""
    text = inspect.getdoc(function)
    assert text
    found = re.split(r"\n\n?(\w+):\n", text)
    of = dict(zip(found[1::2], found[2::2], strict=True))
    arguments = re.split(r"(?:^|\n)  (\w+): ", of.pop("Args"))
    of |= zip(arguments[1::2], arguments[2::2], strict=True)
    return {name: " ".join(each.split()) for name, each in of.items()}


@pytest.mark.parametrize("function", [attention, block_sparse_attention])
def test_every_argument_is_documented(function):
    assert set(sections(function)) == {*inspect.signature(function).parameters, "Returns", "Raises"}


def test_the_same_argument_has_the_same_text():
    one, other = sections(attention), sections(block_sparse_attention)
    assert one.keys() - OWN == other.keys() - OWN
    assert {name for name in one.keys() & other.keys() if one[name] != other[name]} <= OWN
