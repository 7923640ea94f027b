"""argv to Config: the flags are the config's fields, and whatever is wrong with them is one line and exit code 2."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

import models
from training.config import Config, fine_tuning, recipe, require, require_path
from training.config_file import PARTS, nearest, overlaid, read_config, read_values
from training.left_out import shown

_SEE_HELP = "(--help lists the flags)"
# Names from other programs, too far from ours to be recognised by their letters.
_ELSEWHERE = {
    other: ours
    for ours, others in {
        "accumulate": "gradient-accumulation-steps",
        "batch-size": "bs per-device-train-batch-size per-device-batch-size",
        "checkpoint-every": "save-steps save-every save-interval",
        "clip-norm": "grad-clip max-grad-norm",
        "d-ff": "intermediate-size ffn-dim mlp-size",
        "d-model": "hidden-size n-embd embed-dim dim",
        "data": "dataset train-data train-file",
        "dtype": "bf16 precision",
        "eval-every": "eval-steps eval-interval",
        "learning-rate": "lr",
        "log-every": "logging-steps log-interval",
        "pattern": "window-size sliding-window attention",
        "preset": "model",
        "pretrained": "model-name-or-path tokenizer",
        "remat": "gradient-checkpointing",
        "run-dir": "output-dir out-dir out resume resume-from resume-from-checkpoint",
        "seq-len": "block-size context-length max-seq-length",
        "steps": "max-steps epochs num-train-epochs",
        "wandb": "wandb-project",
        "weight-decay": "wd",
    }.items()
    for other in others.split()
}


@dataclass(frozen=True)
class _CommandLine(Config):
    preset: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="{" + ",".join(models.PRESETS) + "}",
            help="Model and recipe that the defaults of all flags come from.",
        ),
    ] = "tiny"
    config: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="FILE", help="JSON or YAML file with options, as config.json of a run; flags override it."
        ),
    ] = None


_CommandLine.__doc__ = Config.__doc__


def flags() -> dict[str, Any]:
    """The flags of train.py, and the type of each value."""
    kinds = {}
    for kind in (_CommandLine, *PARTS.values()):
        hints = get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind) if not dataclasses.is_dataclass(hints[field.name])]
        kinds |= {f"--{name.replace('_', '-')}": hints[name] for name in names}
    return kinds


_FLAGS = flags()


def parse(argv: Sequence[str]) -> Config:
    """The config that the flags ask for; prints the help and exits 0 on --help.

    The defaults come from the run that --run-dir holds, if it holds one, else from the recipe of --preset or for
    --pretrained. The file of --config overrides them, and the flags override that.

    Raises:
        ValueError: in one line, what was expected and what came.
    """
    if {"--help", "-h"} & set(argv):
        _cli(["--help"], _defaults_for_help(argv))
    given = _values(argv)
    defaults = _defaults({flag: values[0] for flag, values in given.items() if values and values[0] != "None"})
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
            return _cli([word for flag, values in given.items() for word in _words(flag, values)], defaults)
    except SystemExit as stop:
        raise ValueError(_reason(stop, complaint.getvalue())) from None


def flags_of(argv: Sequence[str]) -> frozenset[str]:
    """Names of the flags on a command line that `parse` accepts."""
    return frozenset(_values(argv))


def _cli(args: list[str], defaults: Config) -> Config:
    line = _CommandLine(**{f.name: getattr(defaults, f.name) for f in dataclasses.fields(Config)})
    line = tyro.cli(_CommandLine, prog="train.py", args=args, default=line, config=(tyro.conf.OmitArgPrefixes,))
    return Config(**{f.name: getattr(line, f.name) for f in dataclasses.fields(Config)})


def _defaults(given: dict[str, str]) -> Config:
    """The config without its flags.

    Args:
        given: first value of each flag.
    """
    file = given.get("--config")
    if file is not None:
        require_path("--config", file)
    values = {} if file is None else read_values(Path(file))
    named = {name: _first(name, given, values, file) for name in _SOURCES}
    run_dir, preset, pretrained = (named[name] for name in _SOURCES)
    saved = Path(run_dir, "config.json") if run_dir else None
    if saved is not None and _exists(saved):
        base = read_config(saved)
        require(preset in (None, base.preset), "--preset", f"{base.preset}, as in {shown(run_dir)}", shown(preset))
    elif pretrained is not None:
        require("--preset" not in given, "--pretrained", "no --preset beside it", shown(preset))
        base = fine_tuning(pretrained)
    else:
        base = recipe(preset or "tiny")
    if file is None:
        return base
    other = values.get("preset")
    require(preset in (None, other) or other is None, "--preset", f"{shown(other)}, as in {shown(file)}", shown(preset))
    return overlaid(base, values, shown(file))


def _exists(saved: Path) -> bool:
    try:
        return saved.exists()
    except OSError as error:
        raise ValueError(f"--run-dir: expected a directory, got {shown(error, 200)}") from error


_SOURCES = ("run_dir", "preset", "pretrained")


def _first(name: str, given: dict[str, str], values: dict[str, Any], file: str | None) -> str | None:
    """The value of an option that other options' defaults depend on: the flag's, else the file's."""
    value = given.get(f"--{name.replace('_', '-')}", values.get(name))
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{shown(file)}: {name}: expected a string, got {shown(repr(value))}")
    return value


def _defaults_for_help(argv: Sequence[str]) -> Config:
    """Defaults for the help: those that the other flags lead to, or the usual ones if those are wrong."""
    try:
        given = _values([word for word in argv if word not in ("--help", "-h")])
        return _defaults({flag: values[0] for flag, values in given.items() if values and values[0] != "None"})
    except ValueError:
        return recipe("tiny")


# ---------------------------------------------------------------------------------------------------------------------
# Flags and their values


def _values(argv: Sequence[str]) -> dict[str, list[str]]:
    """The values of each flag, as many as it takes; `--no-x` stays apart from `--x`.

    Raises:
        ValueError: there is no such flag, it comes twice, or its values are too few, too many or of another type.
    """
    given: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in argv:
        if word.startswith("--") and word != "--":
            name, equals, value = word.partition("=")
            flag = name.replace("_", "-")
            _require_known(flag)
            if any(other in given for other in (flag, _negated(flag))):
                raise ValueError(f"{flag}: expected once, got it twice {_SEE_HELP}")
            values = given[flag] = [value] if equals else []
        elif values is None:
            raise ValueError(f"expected a flag first, such as --data, got {shown(word)!r} {_SEE_HELP}")
        else:
            values.append(word)
    for flag, words in given.items():
        expected = _mismatch(_kind(flag), words)
        if expected:
            said = f"'{shown(' '.join(words))}'" if words else "none"
            raise ValueError(f"{flag}: expected {expected}, got {said} {_SEE_HELP}")
    return given


def _words(flag: str, values: list[str]) -> list[str]:
    """A flag and its values for tyro; a lone value is joined to it, as it may begin with a hyphen."""
    return [f"{flag}={values[0]}"] if len(values) == 1 and not _is_tuple(_kind(flag)) else [flag, *values]


def _negated(flag: str) -> str:
    return f"--{flag[5:]}" if flag.startswith("--no-") else f"--no-{flag[2:]}"


def _kind(flag: str) -> Any:
    """Type of a flag's value; None of a flag without one."""
    kind = _FLAGS.get(flag, bool)
    return None if kind is bool else kind


def _require_known(flag: str) -> None:
    switches = [name for name, kind in _FLAGS.items() if kind is bool]
    known = [*_FLAGS, *map(_negated, switches)]
    if flag in known:
        return
    bare = flag[2:].rpartition(".")[2]
    near = _ELSEWHERE.get(bare) or nearest(bare, [name[2:] for name in known])
    hint = f"; did you mean --{near}?" if near else ""
    raise ValueError(f"{shown(flag, 60)}: there is no such flag{hint} {_SEE_HELP}")


def _is_tuple(kind: Any) -> bool:
    return any(get_origin(choice) is tuple for choice in _choices(kind))


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _mismatch(kind: Any, words: list[str]) -> str | None:
    """A description of what a flag takes, if `words` are something else."""
    if kind is None:
        return "no value" if words else None
    choices = _choices(kind)
    if any(_fits(choice, words) for choice in choices):
        return None
    return " or ".join(_described(choice) for choice in choices)


def _fits(kind: Any, words: list[str]) -> bool:
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if kinds[-1] is Ellipsis:
            return all(_fits(kinds[0], [word]) for word in words)
        return len(words) == len(kinds) and all(_fits(k, [word]) for k, word in zip(kinds, words, strict=True))
    if len(words) != 1:
        return False
    if get_origin(kind) is Literal:
        return words[0] in get_args(kind)
    if kind is type(None):
        return words[0] == "None"
    try:
        kind(words[0])
    except ValueError:
        return False
    return True


def _described(kind: Any) -> str:
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if kinds[-1] is Ellipsis:
            return "whole numbers" if kinds[0] is int else "values"
        return f"{len(kinds)} {'whole ' * (set(kinds) == {int})}numbers"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return {int: "a whole number", float: "a number", str: "a value", type(None): "None"}[kind]


def _reason(stop: SystemExit, box: str) -> str:
    """The reason that tyro gives: the ValueError of the config itself, or else its own words."""
    error: BaseException | None = stop
    while error is not None:
        if isinstance(error, ValueError):
            return f"{_as_flag(str(error))} {_SEE_HELP}"
        error = error.__context__
    return f"{' '.join(re.sub('[╭─╮│╰╯]', ' ', box).split())} {_SEE_HELP}"


def _as_flag(message: str) -> str:
    """A complaint of the model's config, which begins with the name of a field, as one of the flag."""
    name, _, rest = message.partition(" ")
    flag = f"--{name.replace('_', '-')}"
    return f"{flag} {rest}" if flag in _FLAGS else message
