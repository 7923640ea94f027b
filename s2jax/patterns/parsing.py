"""The parser of patterns in text, such as `LocalStride(64, 16, 8) | FirstTokens(4)`. Nothing is executed."""

import difflib
import functools
import inspect
import re
import typing

from s2jax.messages import MOST_SHOWN
from s2jax.patterns.base import Intersection, Pattern, Union, join
from s2jax.patterns.local_stride import LocalStride
from s2jax.patterns.per_head import PerHead
from s2jax.patterns.ranges import Ranges
from s2jax.patterns.relative_stride import RelativeStride
from s2jax.patterns.simple import Dense, FirstBlocks, FirstTokens, Local
from s2jax.patterns.striped import Strided

FAMILIES: dict[str, type[Pattern]] = {
    family.__name__: family
    for family in (Dense, FirstBlocks, FirstTokens, Local, LocalStride, PerHead, Ranges, RelativeStride, Strided)
}
ARRAYS = ("BlockMask", "MaskMod", "TokenMask")
"""Families that hold arrays or functions, which text cannot express."""

CONSTANTS = {"None": None, "True": True, "False": False}

MOST_CHARACTERS, MOST_DEPTH, MOST_DIGITS = 1 << 16, 50, 15
MOST_MESSAGE = 300
"""Characters of an error."""

TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>[+-]?\d[\d_]*(?:\.\d*)?(?:[eE][+-]?\d+)?)
      | (?P<string>'[^'\\\n]*'|"[^"\\\n]*")
      | (?P<name>(?:s2jax\.)?(?:patterns\.)?[A-Za-z_]\w*)
      | (?P<symbol>[()\[\],=|&])
    )""",
    re.VERBOSE | re.ASCII,
)


class Token(typing.NamedTuple):
    kind: str
    text: str
    start: int


@functools.lru_cache(maxsize=256)
def parse_pattern(text: str) -> Pattern:
    """Parses an expression of pattern families, `|` and `&`.

    The `repr` of a pattern is parsed to an equal one, except for patterns that hold arrays or functions.

    Args:
      text: such as "LocalStride(64, 16, 8)", "Local(tokens=1000) | FirstTokens(4)" or "PerHead([Dense(), Local(4)])";
        at most 65,536 characters.

    Raises:
      ValueError: the text is no such expression, or its numbers do not make a pattern; one line.
    """
    if not isinstance(text, str):
        raise ValueError(f"a pattern's text must be a string, got {type(text).__name__}")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"a pattern's text has at most {MOST_CHARACTERS} characters, got {len(text)}")
    return _Parser(text).pattern()


class _Parser:
    def __init__(self, text: str):
        self._text = text
        self._tokens = self._split()
        self._place, self._depth = 0, 0

    def _split(self) -> list[Token]:
        found, place, end = [], 0, len(self._text.rstrip())
        while place < end:
            match = TOKEN.match(self._text, place)
            if match is None:
                raise self._error(place)
            kind = typing.cast(str, match.lastgroup)
            found.append(Token(kind, match[kind], match.start(kind)))
            place = match.end()
        return [*found, Token("end", "", end)]

    def pattern(self) -> Pattern:
        found = self._union()
        if self._next.kind != "end":
            raise self._error()
        return found

    # The grammar, in which & binds tighter than |, as in Python.

    def _union(self) -> Pattern:
        return join(Union, self._joined("|", self._intersection))

    def _intersection(self) -> Pattern:
        return join(Intersection, self._joined("&", self._operand))

    def _joined(self, symbol: str, operand: typing.Callable[[], Pattern]) -> list[Pattern]:
        found = [operand()]
        while self._take(symbol):
            found.append(operand())
        return found

    def _operand(self) -> Pattern:
        if self._take("("):
            with_parentheses = self._nested(self._union)
            self._expect(")")
            return with_parentheses
        return self._family()

    def _family(self) -> Pattern:
        name = self._next
        if name.kind != "name":
            raise self._error()
        family = self._family_named(name.text.rpartition(".")[2])
        self._place += 1
        self._expect("(")
        values, named = self._nested(self._arguments)
        self._expect(")")
        return self._made(family, values, named, self._text[name.start : self._tokens[self._place - 1].start + 1])

    def _arguments(self) -> tuple[list, dict[str, typing.Any]]:
        values: list = []
        named: dict[str, typing.Any] = {}
        while self._next.text != ")":
            keyword = self._next
            if keyword.kind == "name" and self._tokens[self._place + 1].text == "=":
                self._place += 2
                if keyword.text in named:
                    raise self._error(keyword.start, f"{keyword.text} is given twice")
                named[keyword.text] = self._value()
            elif named:
                raise self._error(keyword.start, "a value without a name follows one with a name")
            else:
                values.append(self._value())
            if not self._take(","):
                break
        return values, named

    def _value(self) -> typing.Any:
        token = self._next
        if token.kind == "number":
            self._place += 1
            return self._number(token)
        if token.kind == "string":
            self._place += 1
            return token.text[1:-1]
        if token.kind == "name" and token.text in CONSTANTS:
            self._place += 1
            return CONSTANTS[token.text]
        if self._take("["):
            found = self._nested(lambda: self._sequence("]")[0])
            self._expect("]")
            return found
        if token.text == "(":
            return self._parenthesised()
        return self._union()

    def _parenthesised(self) -> typing.Any:
        """A tuple, a value in parentheses, or the first operand of a pattern."""
        start = self._place
        self._expect("(")
        found, comma = self._nested(lambda: self._sequence(")"))
        self._expect(")")
        if comma or not found:
            return tuple(found)
        if isinstance(found[0], Pattern) and self._next.text in ("|", "&"):
            self._place = start
            return self._union()
        return found[0]

    def _sequence(self, closing: str) -> tuple[list, bool]:
        """Values up to the closing bracket, and True if there is a comma."""
        found, comma = [], False
        while self._next.text != closing:
            found.append(self._value())
            if not self._take(","):
                break
            comma = True
        return found, comma

    def _number(self, token: Token) -> int | float:
        if len(token.text) > MOST_DIGITS:
            raise self._error(token.start, f"a number has at most {MOST_DIGITS} digits")
        try:
            return float(token.text) if re.search("[.eE]", token.text) else int(token.text)
        except ValueError:
            raise self._error(token.start) from None

    # Steps.

    @property
    def _next(self) -> Token:
        return self._tokens[self._place]

    def _take(self, symbol: str) -> bool:
        taken = self._next.kind == "symbol" and self._next.text == symbol
        self._place += taken
        return taken

    def _expect(self, symbol: str) -> None:
        if not self._take(symbol):
            raise self._error()

    def _nested[T](self, parse: typing.Callable[[], T]) -> T:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise self._error(reason=f"brackets are nested deeper than {MOST_DEPTH}")
        found = parse()
        self._depth -= 1
        return found

    # Families and errors.

    def _family_named(self, name: str) -> type[Pattern]:
        if name in FAMILIES:
            return FAMILIES[name]
        if name in ARRAYS:
            raise self._error(reason=f"a {name} holds an array or a function, which text cannot say: make it in Python")
        near = difflib.get_close_matches(name[:MOST_SHOWN], FAMILIES, 1)
        raise self._error(reason=f"did you mean {near[0]}?" if near else "")

    def _made(self, family: type[Pattern], values: list, named: dict, text: str) -> Pattern:
        try:
            inspect.signature(family).bind(*values, **named)
        except TypeError as error:  # an argument that does not exist, or one too many
            raise ValueError(_shortened(f"{_excerpt(text)} is no pattern: {error}")) from None
        try:
            return family(*values, **named)
        except ValueError as error:
            raise ValueError(_shortened(f"{_excerpt(text)} is no pattern: {error}")) from None

    def _error(self, place: int | None = None, reason: str = "") -> ValueError:
        place = self._next.start if place is None else place
        rest = self._text[place:].strip()
        at = f", at {_excerpt(rest)!r}" if place and rest else ", which ends too early" if place else ""
        return ValueError(
            "expected a pattern such as 'LocalStride(64, 16, 8)' or 'Local(16) | FirstTokens(4)', made of "
            f"{', '.join(FAMILIES)}, got {_excerpt(self._text)!r}{at}{f': {reason}' if reason else ''}"
        )


def _excerpt(text: str) -> str:
    line = " ".join(text[: 2 * MOST_SHOWN].split())
    return line if len(line) <= MOST_SHOWN and len(text) <= 2 * MOST_SHOWN else f"{line[:MOST_SHOWN]}…"


def _shortened(message: str) -> str:
    message = " ".join(message.split())
    return message if len(message) <= MOST_MESSAGE else f"{message[:MOST_MESSAGE]}…"
