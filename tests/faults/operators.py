"""Changes to the syntax tree of one definition, each of which says in words what it does."""

import ast
import dataclasses
import typing

COMPARISONS = {"<": ast.Lt, "<=": ast.LtE, ">": ast.Gt, ">=": ast.GtE, "==": ast.Eq, "!=": ast.NotEq}
BINARY = {"+": ast.Add, "-": ast.Sub, "*": ast.Mult, "/": ast.Div, "//": ast.FloorDiv, "%": ast.Mod, "&": ast.BitAnd}


@dataclasses.dataclass(frozen=True)
class Operator:
    """A change of a definition.

    Attributes:
      text: the change in words, for the page.
      plant: changes a definition in place; raises ValueError if there is nothing to change, or more than it says.
    """

    text: str
    plant: typing.Callable[[ast.stmt], None]


def on_nodes(text: str, matches, change, about: str | None = None, hits: int | None = 1) -> Operator:
    """Returns an operator that changes single nodes.

    Args:
      matches: True for a node to change.
      change: the node to put in its place.
      about: changes only nodes that mention this name, attribute, keyword or constant.
      hits: number of nodes that are changed; None for any number above zero.
    """
    text += "" if about is None else f", in what mentions `{about}`"

    def plant(definition: ast.stmt) -> None:
        found = [node for node in ast.walk(definition) if matches(node) and (about is None or about in mentioned(node))]
        if not found or hits not in (None, len(found)):
            raise ValueError(f"{text}: hits {len(found)} nodes, expected {hits or 'some'}")

        class Change(ast.NodeTransformer):
            def visit(self, node: ast.AST):
                node = self.generic_visit(node)
                return ast.copy_location(change(node), node) if node in found else node

        Change().visit(definition)

    return Operator(text, plant)


def mentioned(node: ast.AST) -> set[str]:
    """Names, attributes, keywords and constants in a tree."""
    fields = (getattr(each, field, None) for each in ast.walk(node) for field in ("id", "attr", "arg", "value"))
    return {str(each) for each in fields if isinstance(each, str | int | float)}


def called(node: ast.AST) -> str | None:
    """The last name of the function that a call calls."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", None))


def expression(text: str) -> ast.expr:
    """Parses an expression."""
    return ast.parse(text, mode="eval").body


def drops_call(name: str, **which) -> Operator:
    """Returns an operator that removes the statement which calls `name`."""

    def matches(node):
        return isinstance(node, ast.Expr) and called(node.value) == name

    return on_nodes(f"drops the call of `{name}`", matches, lambda node: ast.Pass(), **which)


def unwraps(name: str, argument: int = 0, **which) -> Operator:
    """Returns an operator that replaces the call of `name` by one of its arguments."""
    text = f"takes argument {argument} of `{name}` for its result"
    return on_nodes(text, lambda node: called(node) == name, lambda node: node.args[argument], **which)


def passes(name: str, argument: int | str, value: str, **which) -> Operator:
    """Returns an operator that passes another argument, by position or keyword, to `name`."""

    def matches(node):
        there = range(len(node.args)) if isinstance(argument, int) else [each.arg for each in node.keywords]
        return argument in there

    def change(node):
        if isinstance(argument, int):
            node.args[argument] = expression(value)
        for keyword in node.keywords:
            keyword.value = expression(value) if keyword.arg == argument else keyword.value
        return node

    text = f"passes `{value}` as argument `{argument}` of `{name}`"
    return on_nodes(text, lambda node: called(node) == name and matches(node), change, **which)


def replaces(old: str, new: str, **which) -> Operator:
    """Returns an operator that replaces an expression, however it is formatted, also where it is assigned to."""

    def shape(node):
        return ast.dump(node).replace("Store()", "Load()")

    def change(node):
        found = expression(new)
        if isinstance(found, ast.Name | ast.Attribute | ast.Subscript):
            found.ctx = getattr(node, "ctx", ast.Load())
        return found

    pattern = shape(expression(old))

    def matches(node):
        return isinstance(node, ast.expr) and shape(node) == pattern

    return on_nodes(f"`{old}` becomes `{new}`", matches, change, **which)


def compares(old: str, new: str, **which) -> Operator:
    """Returns an operator that replaces a comparison by another."""

    def matches(node):
        return isinstance(node, ast.Compare) and isinstance(node.ops[0], COMPARISONS[old])

    def change(node):
        node.ops[0] = COMPARISONS[new]()
        return node

    return on_nodes(f"compares by `{new}` instead of `{old}`", matches, change, **which)


def drops_operand(operator: str, name: str, **which) -> Operator:
    """Returns an operator that leaves out the operand which mentions `name`, where the other one does not."""

    def sides(node):
        return (node.left, node.right) if isinstance(node, ast.BinOp) else (node.target, node.value)

    def holds(node):
        binary = isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, BINARY[operator])
        return binary and [name in mentioned(side) for side in sides(node)].count(True) == 1

    def matches(node):  # the innermost one
        return holds(node) and not any(map(holds, list(ast.walk(node))[1:]))

    def change(node):
        left, right = sides(node)
        if isinstance(node, ast.AugAssign):
            return ast.Pass()
        return left if name in mentioned(right) else right

    return on_nodes(f"leaves `{operator} {name}` out", matches, change, **which)


def decides(taken: bool, condition: str, **which) -> Operator:
    """Returns an operator that takes a branch always or never, where its condition mentions a name."""

    def matches(node):
        return isinstance(node, ast.If | ast.IfExp) and condition in mentioned(node.test)

    def change(node):
        node.test = ast.Constant(taken)
        return node

    return on_nodes(f"takes the branch on `{condition}` {'always' if taken else 'never'}", matches, change, **which)


def drops_decorator(name: str) -> Operator:
    """Returns an operator that leaves a definition without one of its decorators."""

    def matches(node):
        return any(name in mentioned(each) for each in getattr(node, "decorator_list", []))

    def change(node):
        node.decorator_list = [each for each in node.decorator_list if name not in mentioned(each)]
        return node

    return on_nodes(f"drops the decorator `{name}`", matches, change)


def becomes(value: str) -> Operator:
    """Returns an operator that gives a constant, which is the whole definition, another value."""

    def plant(definition: ast.stmt) -> None:
        if not isinstance(definition, ast.Assign | ast.AnnAssign):
            raise ValueError(f"is `{value}`: a {type(definition).__name__} has no value")
        definition.value = expression(value)

    return Operator(f"is `{value}`", plant)


def begins(statement: str) -> Operator:
    """Returns an operator that executes a statement first, such as one that changes an argument."""

    def plant(definition: ast.stmt) -> None:
        if not isinstance(definition, ast.FunctionDef):
            raise ValueError(f"begins with `{statement}`: a {type(definition).__name__} has no arguments")
        definition.body[:0] = ast.parse(statement).body

    return Operator(f"begins with `{statement}`", plant)


def returns(value: str) -> Operator:
    """Returns an operator that returns `value`, in which `result` is what the function returned."""

    def plant(definition: ast.stmt) -> None:
        found = [node for node in own_nodes(definition) if isinstance(node, ast.Return) and node.value]
        if not found:
            raise ValueError(f"returns `{value}`: the definition returns nothing")
        for node in found:
            node.value = ast.Call(expression(f"lambda result: {value}"), [node.value], [])

    return Operator(f"returns `{value}`", plant)


def own_nodes(definition: ast.AST) -> typing.Iterator[ast.AST]:
    """The nodes of a function, without those of functions inside it."""
    for node in ast.iter_child_nodes(definition):
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            yield node
            yield from own_nodes(node)
