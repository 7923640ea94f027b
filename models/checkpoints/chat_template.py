"""Conversations as token ids, laid out by the Jinja template of a checkpoint."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from models.checkpoints import chat_template_process
from models.checkpoints.pretrained import Checkpoint, Pretrained
from models.untrusted import shortened

_PATIENCE = 5  # seconds by the clock, on a machine that may be busy


def chat_tokens(checkpoint: Pretrained | Checkpoint, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation and of what begins the model's answer to it.

    The template comes with the weights: it is rendered in a process of its own, where it can neither reach Python nor
    change its arguments, and has a few seconds and half a gigabyte.

    Args:
        checkpoint: whose template it is.
        messages: each with a `role`, such as "user", and a `content`.

    Raises:
        ValueError: the checkpoint has no tokenizer or no template, or its template cannot be rendered or refuses the
            messages; in one line.
    """
    template, tokenizer = checkpoint.chat_template, checkpoint.tokenizer
    if template is None or tokenizer is None:
        missing = "tokenizer" if tokenizer is None else "chat template"
        raise ValueError(f"the checkpoint has no {missing}: it lays out no conversation, give a text to go on from")
    given = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
    answer = _rendered(template, given | {"add_generation_prompt": True} | dict(checkpoint.special_tokens))
    if "text" not in answer:
        raise ValueError(f"the checkpoint's chat template cannot be rendered: {shortened(answer['error'])}")
    return checkpoint.encode(answer["text"], add_special_tokens=False)


def _rendered(template: str, variables: Mapping[str, Any]) -> dict[str, str]:
    """The rendered `text` of a template, or the `error` that prevented it."""
    contents = json.dumps({"template": template, "variables": variables, "longest": 0})
    longest = (1 << 20) + 4 * len(contents)
    # None of its directory's modules, and nothing of the environment but what finds Jinja and the time of day.
    command = [sys.executable, "-P", str(chat_template_process.__file__)]
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "TZ", "HOME") if name in os.environ}
    try:
        done = subprocess.run(
            command,
            input=json.dumps({"template": template, "variables": variables, "longest": longest}),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env=environment | {"PYTHONUTF8": "1"},
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it took more than {_PATIENCE} s"}
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"error": f"it took more than {chat_template_process.SECONDS} s of a CPU"}
    if done.returncode != 0 or not done.stdout:
        return {"error": f"its process ended with {done.returncode}: too much memory, or nested too deeply"}
    return json.loads(done.stdout)
