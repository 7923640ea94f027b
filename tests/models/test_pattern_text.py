"""Patterns out of text: what it says, and nothing else."""

import pytest

from models.pattern_text import pattern_of
from s2jax import Dense, FirstTokens, Local, LocalStride, Ranges


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("Dense()", Dense()),
        (" LocalStride(64, 16, vert_stride=8) ", LocalStride(64, 16, 8)),
        ("Local(tokens=100) | FirstTokens(4)", Local(tokens=100) | FirstTokens(4)),
        ("Local(4) & (Dense() | FirstTokens(2))", Local(4) & (Dense() | FirstTokens(2))),
        ("Ranges(((2, 1), (None, 3)))", Ranges(((2, 1), (None, 3)))),
    ],
)
def test_patterns(text, pattern):
    assert pattern_of(text) == pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a pattern such as .* got ''"),
        ("LocalStride", "expected a pattern such as"),
        ("LocalStride(64,", "expected a pattern such as"),
        ("Local(__import__('os').getpid())", "expected a pattern such as"),
        ("Local(4) + Dense()", "expected a pattern such as"),
        ("os.system('ls')", "expected a pattern such as"),
        ("Local(stripes=3)", "is no pattern: .*stripes"),
        ("LocalStride(50)", "block_size"),
        ("LocalStride(64, **{'vert_stride': 8})", "is no pattern|expected a pattern such as"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ValueError, match=message):
        pattern_of(text)
