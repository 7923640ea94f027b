"""A conversation as the tokens that a chat model was trained on, by the Jinja template of its checkpoint."""

import datetime
from collections.abc import Mapping, Sequence

import jinja2
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
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.datetime.now().strftime}
    special = {"bos_token": checkpoint.bos_id, "eos_token": next(iter(checkpoint.eos_ids), None)}
    words = {name: "" if token is None else tokenizer.id_to_token(token) for name, token in special.items()}
    try:
        text = environment.from_string(template).render(messages=messages, add_generation_prompt=True, **words)
    except (jinja2.TemplateError, TypeError) as error:  # TypeError: what a template does with a field that is not there
        raise ValueError(
            f"the checkpoint's chat template cannot be rendered: {' '.join(str(error).split())}"
        ) from error
    return tokenizer.encode(text, add_special_tokens=False).ids


def _refuse(reason: str) -> None:
    """What templates call for conversations that the model was not trained on."""
    raise jinja2.TemplateError(reason)
