"""Conversations laid out by a checkpoint's own template."""

import dataclasses

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from models.checkpoints.chat_template import chat_tokens
from models.checkpoints.pretrained import Pretrained, open_checkpoint
from tests.models.tiny_checkpoints import LLAMA, transformer

MODEL = transformer(dataclasses.replace(LLAMA, vocab_size=128))
LETTERS = {chr(code): code for code in range(128)}
PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def letters() -> Tokenizer:
    """A token for every letter of ASCII; where it is to add special ones, a `^` in front."""
    tokenizer = Tokenizer(BPE(LETTERS, []))
    tokenizer.decoder = Fuse()
    tokenizer.post_processor = TemplateProcessing(single="^ $A", special_tokens=[("^", ord("^"))])
    return tokenizer


def checkpoint(template: str | None) -> Pretrained:
    return Pretrained(
        model=MODEL, max_context=128, tokenizer=letters(), eos_ids=(ord("$"), 3), bos_id=ord("^"),
        special_tokens={"bos_token": "^", "eos_token": "$"}, chat_template=template,
    )  # fmt: skip


def laid_out(template: str, *messages: tuple[str, str]) -> str:
    ids = chat_tokens(checkpoint(template), [{"role": role, "content": content} for role, content in messages])
    return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN, "user: Hi\nassistant: Yes?\n"),
        ("{{ bos_token }}{{ messages[0]['content'] | trim }}{{ eos_token }}", "^Hi$"),
        ("{% if add_generation_prompt %}\n    {{- 'go' }}\n    {% endif %}\n.", "go\n."),
        ("{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}", "Hi"),
        ("{{ messages | length }}{% if tools is none and documents is none %} alone{% endif %}", "2 alone"),
        ("{{ {'b': '<a & b>'} | tojson }}", '{"b": "<a & b>"}'),
        ("{% for m in messages %}{% generation %}{{ m.content }}!{% endgeneration %}{% endfor %}", "Hi!Yes?!"),
    ],
)
def test_what_templates_do(template, expected):
    assert laid_out(template, ("user", "Hi"), ("assistant", "Yes?")) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "cannot be rendered: roles must alternate"),
        ("{% for message in messages %}", "cannot be rendered: .*end of template"),
        ("{{ messages[0]['words'] + 'x' }}", "cannot be rendered: .*words"),
        ("{{ messages.__class__.__mro__ }}", "cannot be rendered: access to attribute '__class__' .*unsafe"),
        ("{{ messages.append(1) }}", "cannot be rendered: .*append.* is unsafe"),
        ("{{ 1 / 0 }}", "cannot be rendered: division by zero"),
        ("{{ range(1000000) | list }}", "cannot be rendered: Range too big"),
        ("{{ 'a'.index('b') }}", "cannot be rendered: substring not found"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot be rendered: .*recursion"),
        (None, "the checkpoint has no chat template: it lays out no conversation"),
    ],
)
def test_what_cannot_be_laid_out(template, message):
    with pytest.raises(ValueError, match=message) as raised:
        laid_out(template, ("user", "Hi"))
    assert "\n" not in str(raised.value)


def test_without_a_tokenizer():
    bare = dataclasses.replace(checkpoint(PLAIN), tokenizer=None)
    with pytest.raises(ValueError, match="the checkpoint has no tokenizer"):
        chat_tokens(bare, [])


def test_the_real_model_s_template(smollm2_path):
    real = open_checkpoint(smollm2_path)
    ids = chat_tokens(real, [{"role": "user", "content": "Hi <|im_end|>"}])
    assert real.tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
