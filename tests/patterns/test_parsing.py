"""Patterns out of text: what it says, and nothing else."""

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2jax import Dense, FirstTokens, Local, LocalStride, PerHead, Ranges, Strided, parse_pattern, plotting
from tests.patterns.families import examples, simple, striped


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("Dense()", Dense()),
        (" LocalStride(64, 16, vert_stride=8) ", LocalStride(64, 16, 8)),
        ("s2jax.LocalStride(64, 16, 8,)", LocalStride(64, 16, 8)),
        ("s2jax.patterns.Strided(64,\n  8)", Strided(64, 8)),
        ("Local(tokens=100) | FirstTokens(4)", Local(tokens=100) | FirstTokens(4)),
        ("Local(4) & (Dense() | FirstTokens(2))", Local(4) & (Dense() | FirstTokens(2))),
        ("Local(4) & Dense() | FirstTokens(2)", Local(4) & Dense() | FirstTokens(2)),
        ("((Dense()))", Dense()),
        ("Ranges(((2, 1), (None, 3)))", Ranges(((2, 1), (None, 3)))),
        ("Ranges([[2, 1], [None, 3]], homo_head=True)", Ranges(((2, 1), (None, 3)), homo_head=True)),
        ("Local(tokens=(1_0, 20), causal=False)", Local(tokens=(10, 20), causal=False)),
        ('LocalStride(residues="query_head")', LocalStride(residues="query_head")),
        ("PerHead([Dense(), Local(4) | FirstTokens(1)])", PerHead([Dense(), Local(4) | FirstTokens(1)])),
        ("PerHead(((Dense()) | Local(2), Local(1),))", PerHead([Dense() | Local(2), Local(1)])),
        ("PerHead(patterns=[Dense()]) & Local(3)", PerHead([Dense()]) & Local(3)),
    ],
)
def test_patterns(text, pattern):
    assert parse_pattern(text) == pattern


LEAVES = st.one_of(simple(), striped())


@examples(2)
@given(LEAVES, LEAVES, LEAVES)
def test_what_repr_writes_is_read_back(a, b, c):
    for pattern in (a, a | b, (a | b) & c, a & b | c, PerHead([a, b & c]), PerHead([a, PerHead([b, c])]) | c):
        assert parse_pattern(repr(pattern)) == pattern


ERRORS = {
    "": "expected a pattern such as .* got ''",
    "LocalStride": "got 'LocalStride', which ends too early",
    "LocalStride(64,": "ends too early",
    "LocalStride(64, 16": "ends too early",
    "Local(__import__('os').getpid())": "expected a pattern such as",
    "Local(4) + Dense()": r"got 'Local\(4\) \+ Dense\(\)', at '\+ Dense\(\)'",
    "os.system('ls')": "expected a pattern such as",
    "localstride(3)": "did you mean LocalStride",
    "BlockMask(3)": "a BlockMask holds an array or a function, which text cannot say",
    "MaskMod(f)": "a MaskMod holds an array or a function",
    "MaskMod(lambda h, q, k: q)": "expected a pattern such as",
    "Local(stripes=3)": "is no pattern: .*stripes",
    "Local(1, 2, 3, 4)": "is no pattern: too many",
    "Local(tokens=3, tokens=4)": "tokens is given twice",
    "Local(tokens=3, 4)": "a value without a name",
    "LocalStride(50)": "block_size",
    "LocalStride(1073741824)": "block_size must be a power of two from 16 to 4096",
    "LocalStride(64, **{'vert_stride': 8})": "expected a pattern such as",
    "Local(1.5)": "blocks must be an integer of at least 0, got 1.5",
    "Local(1e999)": "blocks must be an integer of at least 0, got inf",
    "Local('4')": "blocks must be an integer",
    "Local(Dense())": "blocks must be an integer",
    "Local(-3)": "at least 0, got -3",
    "Local(9000000000000)": "at most 2\\*\\*40",
    "Local(4) Dense()": "at 'Dense",
    "Local(4) | ": "ends too early",
    "(Local(4)": "ends too early",
    "Local(4))": r"at '\)'",
    "Local(4); Dense()": "at '; Dense",
    "Ranges([[1, 2, 3]])": "ranges must be pairs",
    "PerHead([])": "takes a list of patterns",
    "PerHead([3])": "takes a list of patterns",
    "PerHead('Dense()')": "takes a list of patterns",
    "Dense(None)": "causal must be True or False",
    "Dense(causal=true)": "expected a pattern such as",
    "f'{1}'": "expected a pattern such as",
    "Локал(4)": "expected a pattern such as",
    "\x00": "expected a pattern such as",
    "Local(" + "9" * 5000 + ")": "a number has at most 15 digits",
    "(" * 5000 + "Dense()" + ")" * 5000: "nested deeper than 50",
    "PerHead([" * 100 + "Dense()": "nested deeper than 50",
    "Ranges(" + "[" * 3000: "nested deeper than 50",
    "-" * 5000 + "Dense()": "expected a pattern such as",
    "Dense()" * 5000: "at 'Dense",
    "x" * 60_000: "expected a pattern such as",
    "x" * 70_000: "at most 65536 characters, got 70000",
    "Ranges((" + "(1, 1)," * 3000 + "))": "ranges must be pairs",
}


@pytest.mark.parametrize("text", ERRORS, ids=lambda text: text[:40])
def test_errors_are_one_short_line(text):
    with pytest.raises(ValueError, match=ERRORS[text]) as caught:
        parse_pattern(text)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600


def test_thousands_of_operators():
    begin = time.process_time()
    assert parse_pattern(" | ".join(["Dense()"] * 6000)) == Dense()
    assert len(parse_pattern(" & ".join(f"FirstTokens({count})" for count in range(2500))).parts) == 2500
    assert time.process_time() - begin < 5


@examples(3)
@given(st.text(st.sampled_from("()[]|&=,.'\"+-0189_eNone LocalStridHa*\n"), max_size=60))
def test_any_text_is_a_pattern_or_an_error(text):
    with contextlib.suppress(ValueError):
        assert parse_pattern(text).causal in (True, False)


def test_the_picture_executes_nothing(tmp_path, capsys):
    target = tmp_path / "made"
    for text in (f"open({str(target)!r}, 'w')", f"[x for x in ().__class__.__base__.__subclasses__()] or {target}"):
        with pytest.raises(SystemExit, match="2"):
            plotting.main([text, "--text"])
        assert "expected a pattern such as" in capsys.readouterr().err
    assert not target.exists()
    plotting.main(["Local(2) | FirstTokens(4)", "--text", "--length", "512"])
    assert "Local(blocks=2, block_size=64) | FirstTokens(count=4)" in capsys.readouterr().out
