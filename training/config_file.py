"""Config files: what `config.json` of a run holds, in JSON or YAML, whole or in part."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_type_hints

import typeguard
import yaml

from training.config import Config
from training.left_out import shown, shown_path

_LARGEST = 1 << 16  # bytes; a config takes two thousand
PARTS: dict[str, Any] = {name: hint for name, hint in get_type_hints(Config).items() if dataclasses.is_dataclass(hint)}
"""Dataclass of each part of a config."""


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of several names that `name` is most like, if any is near."""
    names = list(names)
    longer = [each for each in names if each.startswith(name)]
    if len(longer) == 1:
        return longer[0]
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.6)), None)


def read_values(path: Path) -> dict[str, Any]:
    """Reads a config file.

    Args:
        path: of a `.json`, `.yaml` or `.yml` file.

    Raises:
        ValueError: it cannot be read, is neither JSON nor YAML by its suffix and content, or names something twice.
    """
    try:
        return _content(path)
    except ValueError as error:
        raise ValueError(f"expected a config in JSON or YAML in {shown_path(path)}, got {error}") from error


def _content(path: Path) -> dict[str, Any]:
    """The values of `read_values`; its errors say in a few words what the file holds instead."""
    try:
        if not path.is_file():
            raise ValueError("no such file" if not path.exists() else "no regular file")
        if path.suffix.lower() not in (".json", ".yaml", ".yml"):
            raise ValueError(f"the suffix {shown(path.suffix)!r}")
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{path.stat().st_size} bytes")
        text = path.read_text("utf-8")
        if path.suffix.lower() == ".json":
            values = json.loads(text, object_pairs_hook=_once)
        else:
            values = yaml.load(text, _Loader)
        if not isinstance(values, dict):
            raise ValueError("no object with the names of options")
    except RecursionError as error:
        raise ValueError("lists or objects nested too deeply") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(shown(" ".join(str(error).split()), 200) or "nothing") from error
    return values


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(name for name in names if names.count(name) > 1))!r} twice")
    return values


class _Loader(yaml.SafeLoader):
    """YAML as people write it.

    1e-4 is a number, while 017 and 1:30 are none (15 and 90 in YAML 1.1). Nothing is named twice, and no alias lets a
    file grow.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            raise ValueError("an alias (*); write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        pairs = [
            (self.construct_object(key, deep=True), self.construct_object(value, deep=True))
            for key, value in node.value
        ]
        if not all(isinstance(name, str) for name, _ in pairs):
            raise ValueError("a name that is no string")
        return _once(pairs)


# The default constructor fills a mapping after it gave it away, and so cannot refuse it.
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_mapping)
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag not in (_INT, _FLOAT)]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(0|[1-9]\d*(_\d+)*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(_NUMBER), list("-+0123456789."))


def overlaid(base: Config, values: dict[str, Any], where: str) -> Config:
    """The config with some of its values replaced by a file's.

    Args:
        base: gives what the file does not.
        values: of the file, nested as in `config.json`.
        where: names the file in messages.

    Raises:
        ValueError: an option that does not exist, or a value of another type or out of range.
    """
    changed: dict[str, Any] = {}
    for name, value in values.items():
        kind = PARTS.get(name)
        if kind is None:
            changed[name] = _checked(Config, name, value, where)
        elif isinstance(value, dict):
            part = {inner: _checked(kind, inner, given, where) for inner, given in value.items()}
            changed[name] = _made(where, dataclasses.replace, getattr(base, name), **part)
        else:
            raise ValueError(f"{where}: {name}: expected an object with the options of that part, got {_quoted(value)}")
    return _made(where, dataclasses.replace, base, **changed)


def read_config(path: Path) -> Config:
    """Reads a whole config, as `Config.to_json` wrote it.

    Raises:
        ValueError: the file is no such config, or one of another version of this program.
    """
    where = f"expected the config of a run of this version in {shown_path(path)}, got"
    try:
        values = _content(path)
        for kind, given in [(Config, values), *((kind, values.get(name)) for name, kind in PARTS.items())]:
            names = {field.name for field in dataclasses.fields(kind)}
            if missing := names - set(given if isinstance(given, dict) else ()):
                raise ValueError(f"none for {', '.join(sorted(missing))}")
        parts = {name: {n: _checked(kind, n, v, "") for n, v in values[name].items()} for name, kind in PARTS.items()}
        whole = {name: _checked(Config, name, value, "") for name, value in values.items() if name not in PARTS}
        return Config(**whole, **{name: kind(**parts[name]) for name, kind in PARTS.items()})
    except ValueError as error:
        raise ValueError(f"{where} {str(error).removeprefix(': ')}") from error


def _checked(kind: type, name: str, value: Any, where: str) -> Any:
    """A value of the file as that of a field."""
    hints = get_type_hints(kind)
    if name not in hints or name not in {field.name for field in dataclasses.fields(kind)}:
        raise ValueError(f"{where}: {_unknown(kind, name)}")
    value = tuple(value) if isinstance(value, list) else value
    scalars = value if isinstance(value, tuple) else (value,)
    wrong = hints[name] is not bool and any(isinstance(scalar, bool) for scalar in scalars)  # an int to Python
    try:
        typeguard.check_type(value, hints[name])
    except typeguard.TypeCheckError:
        wrong = True
    if wrong:
        expected = getattr(hints[name], "__name__", "") if isinstance(hints[name], type) else hints[name]
        expected = str(expected).replace("typing.", "").replace("NoneType", "None")
        raise ValueError(f"{where}: {name}: expected {expected}, got {_quoted(value)}")
    return value


def _unknown(kind: type, name: str) -> str:
    home = next((part for part, inner in PARTS.items() if name in get_type_hints(inner)), None)
    if kind is Config and home is not None:
        return f"{name} belongs into {home}: {{…}}"
    near = nearest(name, get_type_hints(kind))
    return f"there is no option {shown(name, 60)!r}" + (f"; the nearest is {near!r}" if near else "")


def _quoted(value: Any) -> str:
    return shown(repr(list(value) if isinstance(value, tuple) else value))


def _made(where: str, make: Any, *args: Any, **values: Any) -> Any:
    try:
        return make(*args, **values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
