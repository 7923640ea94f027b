"""The programs of models as tests run them: a tiny checkpoint, and a call's exit code and output."""

import contextlib
import dataclasses
import io

import jax.numpy as jnp

from models.byte_tokenizer import BOUNDARY, BOUNDARY_TOKEN, byte_tokenizer
from models.checkpoints.pretrained import Pretrained, save
from s2jax import LocalStride
from tests.models.tiny_checkpoints import LLAMA, transformer

PATTERN = LocalStride(16, 1, 2)
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


def write(directory, *, nan=False):
    config = dataclasses.replace(LLAMA, vocab_size=272, pattern=PATTERN, dense_layers=(1,))
    model = transformer(config)
    if nan:
        model.layers[0].attention_norm.scale.set_value(jnp.full(64, 1e38))
        model.layers[0].mlp_norm.scale.set_value(jnp.full(64, 1e38))
    kept = {
        "tokenizer": byte_tokenizer(),
        "bos_id": BOUNDARY,
        "eos_ids": (BOUNDARY,),
        "special_tokens": {"eos_token": BOUNDARY_TOKEN},
    }
    save(directory, Pretrained(model=model, max_context=128, chat_template=TEMPLATE, **kept))
    return directory


def ran(program, *arguments, out=None, err=None) -> tuple[int, str, str]:
    """The exit code and what was written to stdout and stderr, or to others in their places."""
    out, err = out or io.StringIO(), err or io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = program.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()
