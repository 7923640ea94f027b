"""A conversation keeps its cache, and says what a fresh one would."""

import dataclasses

import pytest

from models.byte_tokenizer import BOUNDARY, byte_tokenizer
from models.checkpoints.chat_template import chat_tokens
from models.checkpoints.pretrained import Pretrained
from models.conversation import Conversation
from tests.models.tiny_checkpoints import LLAMA, greedy, transformer

pytestmark = pytest.mark.usefixtures("kept_compilations")

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
# Like templates that leave out what the model thought in earlier turns.
FORGETFUL = "{% for m in messages %}{{ m.role[0] }}:{{ m.content if loop.last else m.content[:2] }}\n{% endfor %}a:"
MODEL = transformer(dataclasses.replace(LLAMA, vocab_size=272))


def pretrained(template=TEMPLATE, max_context=200) -> Pretrained:
    # The model may only say ASCII, so that its answers are the same tokens when they are laid out again.
    return Pretrained(
        model=MODEL, max_context=max_context, tokenizer=byte_tokenizer(), eos_ids=(BOUNDARY,), chat_template=template
    )


def fresh(model, messages, count) -> str:
    """The answer of a model that was given the conversation anew."""
    ids = greedy(model.model, chat_tokens(model, messages), count)
    return model.tokenizer.decode([*ids, BOUNDARY][: [*ids, BOUNDARY].index(BOUNDARY)])


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL], ids=["kept", "laid out anew"])
def test_every_answer_is_that_of_the_whole_conversation(template):
    model, said = pretrained(template), ["hi there", "and then?", "no"]
    conversation = Conversation(model, system="s", max_new_tokens=6)
    for text in said:
        answer = "".join(conversation.answer(text))
        assert answer == fresh(model, conversation.messages[:-1], 6)
        assert conversation.messages[-1] == {"role": "assistant", "content": answer}
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 3]


def test_a_turn_feeds_what_is_new_in_it():
    conversation, model = Conversation(pretrained(), max_new_tokens=6), pretrained()
    list(conversation.answer("a rather long beginning of it"))
    first = len(chat_tokens(model, conversation.messages[:1]))
    assert conversation.fed == first
    list(conversation.answer("x"))
    whole = len(chat_tokens(model, conversation.messages[:3]))
    if conversation.messages[1]["content"].isascii():
        assert conversation.fed <= whole - first
    assert conversation.fed < whole


def test_a_stop_string_is_taken_back_from_the_cache():
    model = pretrained()
    text = fresh(model, [{"role": "user", "content": "hi"}], 8)
    stop = text[3:5]
    conversation = Conversation(model, max_new_tokens=8, stops=[stop])
    assert "".join(conversation.answer("hi")) == text[: text.index(stop)]
    answer = "".join(conversation.answer("go on"))
    whole = fresh(model, conversation.messages[:-1], 8)
    assert answer == (whole[: whole.index(stop)] if stop in whole else whole)


def test_a_full_context_forgets_the_oldest_turns_and_says_so():
    said: list[str] = []
    model = pretrained(max_context=100)
    conversation = Conversation(model, system="s", max_new_tokens=10, say=said.append)
    for number in range(4):
        answer = "".join(conversation.answer(f"{number}" * 25))
        assert answer == fresh(model, conversation.messages[:-1], 10)
    assert conversation.messages[0]["content"] == "s"
    assert conversation.messages[1]["content"] != "0" * 25
    assert any("the context of 100 tokens is full: the oldest" in line for line in said)


def test_a_message_that_does_not_fit_is_not_remembered():
    conversation = Conversation(pretrained(max_context=100), max_new_tokens=10)
    list(conversation.answer("hi"))
    with pytest.raises(ValueError, match=r"the message is too long: .* do not fit into the model's context of 100"):
        list(conversation.answer("x" * 100))
    assert len(conversation.messages) == 2
    assert "".join(conversation.answer("go on")) == fresh(pretrained(), conversation.messages[:-1], 10)


def test_an_answer_that_was_stopped_is_gone_on_from():
    model = pretrained()
    conversation = Conversation(model, max_new_tokens=8)
    pieces = conversation.answer("hi")
    begun = next(pieces)
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt())
    assert conversation.messages[-1]["content"].startswith(begun)
    assert "".join(conversation.answer("go on")) == fresh(model, conversation.messages[:-1], 8)


def test_an_answer_that_ended_between_tokens_leaves_the_cache():
    model = pretrained()
    conversation = Conversation(model, max_new_tokens=8)
    pieces = conversation.answer("hi there, how are you")
    next(pieces), next(pieces)
    pieces.close()
    assert "".join(conversation.answer("go on")) == fresh(model, conversation.messages[:-1], 8)
    assert conversation.fed < len(chat_tokens(model, conversation.messages[:-1])) - 20
