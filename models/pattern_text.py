"""Patterns as one writes them on a command line: `LocalStride(64, 16, 8) | FirstTokens(4)`."""

import ast

import s2jax
from s2jax import patterns

FAMILIES = {
    name: family
    for name in ("Dense", "FirstBlocks", "FirstTokens", "Local", "LocalStride", "Ranges", "RelativeStride", "Strided")
    if (family := getattr(patterns, name))
}


def pattern_of(text: str) -> s2jax.Pattern:
    """The pattern that an expression of families, `|` and `&` stands for; nothing is run.

    Raises:
        ValueError: in one line, if it is no such expression, or its numbers do not make a pattern.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise _no_pattern(text) from error
    return _build(tree, text)


def _build(node: ast.expr, text: str) -> s2jax.Pattern:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitOr, ast.BitAnd)):
        left, right = _build(node.left, text), _build(node.right, text)
        return left | right if isinstance(node.op, ast.BitOr) else left & right
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FAMILIES):
        raise _no_pattern(text)
    try:
        values = [ast.literal_eval(value) for value in node.args]
        named = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in node.keywords}
    except ValueError as error:
        raise _no_pattern(text) from error
    try:
        return FAMILIES[node.func.id](*values, **named)
    except TypeError as error:  # an argument that there is not, or one too many
        raise ValueError(f"{ast.unparse(node)} is no pattern: {error}") from error


def _no_pattern(text: str) -> ValueError:
    return ValueError(
        f"expected a pattern such as 'LocalStride(64, 16, 8)' or 'Local(16) | FirstTokens(4)', made of "
        f"{', '.join(FAMILIES)}, got {text!r}"
    )
