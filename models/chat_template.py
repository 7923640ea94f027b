"""A conversation as the tokens that a chat model was trained on, by the Jinja template of its checkpoint."""

import datetime
import json
from collections.abc import Mapping, Sequence

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.pretrained import Checkpoint, Pretrained


def chat_tokens(checkpoint: Pretrained | Checkpoint, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation and of what begins the model's answer to it.

    The template comes with the weights, so it is rendered where it can neither reach Python nor change its arguments.

    Args:
        messages: each with a `role`, such as "user", and a `content`.

    Raises:
        ValueError: the checkpoint has no tokenizer or no template, or its template cannot be rendered or refuses the
            messages; in one line.
    """
    template, tokenizer = checkpoint.chat_template, checkpoint.tokenizer
    if template is None or tokenizer is None:
        missing = "tokenizer" if tokenizer is None else "chat template"
        raise ValueError(f"the checkpoint has no {missing}: it lays out no conversation, give a text to go on from")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.datetime.now().strftime}
    environment.filters["tojson"] = _as_json
    bos = None if checkpoint.bos_id is None else tokenizer.id_to_token(checkpoint.bos_id)
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
    try:
        text = environment.from_string(template).render(
            **given, bos_token=bos or "", eos_token=checkpoint.end_of_text() or ""
        )
    except _ERRORS as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the checkpoint's chat template cannot be rendered: {reason}") from error
    return tokenizer.encode(text, add_special_tokens=False).ids


# A template is a program, of a language that has Python's own errors.
_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Generation(Extension):
    """`{% generation %}`, which marks for training what the model said, and stands for what is in it."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _as_json(value, indent: int | None = None) -> str:
    """As it stands in a text; Jinja's own filter is for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(reason: str) -> None:
    """What templates call for conversations that the model was not trained on."""
    raise jinja2.TemplateError(reason)
