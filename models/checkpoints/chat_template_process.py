"""Process that renders one chat template under the operating system's limits on time and memory.

A template is a program of unknown origin. `models.checkpoints.chat_template` starts this file by its path, so that it
imports only Jinja. It reads the template and its variables as JSON from stdin, and writes the text, or the reason why
there is none, as JSON to stdout.
"""

import datetime
import json
import resource
import sys
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY, SECONDS = 1 << 29, 2
"""Bytes of address space, and seconds of a CPU. Templates in use take a tenth of either, the start included."""
# A template is a program, of a language that has Python's own errors.
_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Generation(Extension):
    """The tag `{% generation %}`, which marks the model's own words for training and renders its contents."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class PlainNamespace(Namespace):
    """`namespace()`, whose attributes may not have names that mean something to Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"access to attribute {name!r} of a namespace is unsafe")
        super().__setitem__(name, value)


def render(template: str, variables: dict[str, Any]) -> str:
    """The text, laid out as transformers does it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": datetime.datetime.now().strftime,
        "namespace": PlainNamespace,
    }
    environment.filters["tojson"] = _as_json
    return environment.from_string(template).render(**variables)


def _as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as plain text; Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(reason: str) -> NoReturn:
    """Raises the error that templates ask for on conversations that the model was not trained on."""
    raise jinja2.TemplateError(reason)


def _limit() -> None:
    """Limits memory and CPU time, and forbids writing files and starting processes."""
    wanted = {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_CPU: SECONDS,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, most in wanted.items():
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def main() -> None:
    given = json.loads(sys.stdin.buffer.read())
    _limit()
    try:
        text = render(given["template"], given["variables"])
        if len(text) > given["longest"]:
            answer = {"error": f"it gives {len(text)} characters, at most {given['longest']} are taken"}
        else:
            answer = {"text": text}
    except MemoryError:
        answer = {"error": f"it needs more than {MEMORY >> 20} MB of memory"}
    except _ERRORS as error:
        answer = {"error": f"{str(error)[:1000] or type(error).__name__}"}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
