"""Conversations with a chat model, whose cache is kept from turn to turn."""

from collections.abc import Callable, Generator, Iterator, Sequence

from models.checkpoints.chat_template import chat_tokens
from models.checkpoints.pretrained import Pretrained
from models.decoder import Decoder
from models.sampling import Sampling
from models.text_stream import TextStream
from s2jax.messages import counted

ROLLBACK = 64
"""Most tokens that are rolled back if a conversation, laid out again, differs from the cached tokens."""
SHORTEST = 1024
"""Length of the first caches in tokens. Full caches are replaced by ones of twice the length."""


class Conversation:
    """Messages in turn, and the model's caches of them.

    The cache holds a conversation as the tokens that were fed and drawn. A next turn feeds only what is new, as long as
    the checkpoint's template lays the old turns out as before.

    Args:
        pretrained: a model with a tokenizer and a chat template.
        system: the message before all turns; None for the checkpoint's own.
        max_new_tokens: of an answer, at most.
        sampling, seed, cache_dtype, say: see `models.decoder.Decoder`.
        stops: strings that end an answer.

    Attributes:
        messages: all that is remembered, the system's first.
        fed: tokens that were given to the model in the last turn, without those of its answer.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling = Sampling(),  # noqa: B008 - a frozen value
        seed: int = 0,
        stops: Sequence[str] = (),
        cache_dtype: str | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self._pretrained, self._max_new_tokens, self._stops, self._say = pretrained, max_new_tokens, stops, say
        self._settings = {"sampling": sampling, "seed": seed, "cache_dtype": cache_dtype, "say": say}
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._first = len(self.messages)
        self._decoder: Decoder | None = None
        self.fed = 0

    def answer(self, text: str) -> Generator[str, None, None]:
        """The model's answer, a piece for each token, which may be empty; it is remembered as far as it was taken.

        Where the model's context is full, the oldest turns are forgotten, which is said.

        Raises:
            ValueError: the text alone does not fit into the context, or the template refuses it. It is not remembered.
            FloatingPointError: the model's logits are NaN.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            tokens = self._laid_out()
        except ValueError:
            self.messages.pop()
            raise
        assert self._pretrained.tokenizer is not None
        stream = TextStream(self._pretrained.tokenizer, self._stops)
        try:
            yield from self._drawn(tokens, stream)
        except GeneratorExit:  # between tokens, so that the caches are whole
            raise
        except BaseException:  # an interrupted step leaves no caches behind
            self._decoder = None
            raise
        finally:
            self.messages.append({"role": "assistant", "content": stream.text})

    def _laid_out(self) -> list[int]:
        """The conversation in tokens, without its oldest turns if all of them do not fit."""
        room, messages, forgotten = self._pretrained.max_context, list(self.messages), 0
        least = min(self._max_new_tokens, room // 2)
        tokens = chat_tokens(self._pretrained, messages)
        while len(tokens) + least > room:
            following = [i for i, message in enumerate(messages) if message["role"] == "user" and i > self._first]
            if not following:
                raise ValueError(
                    f"the message is too long: {counted(len(tokens), 'token')} and {least} for the answer do not fit "
                    f"into the model's context of {room}"
                )
            del messages[self._first : following[0]]
            forgotten += 1
            tokens = chat_tokens(self._pretrained, messages)
        if forgotten:
            oldest = "the oldest turn is" if forgotten == 1 else f"the oldest {forgotten} turns are"
            self._say(f"the context of {room} tokens is full: {oldest} forgotten")
        self.messages = messages
        return tokens

    def _drawn(self, tokens: list[int], stream: TextStream) -> Iterator[str]:
        """Feeds the conversation and draws the answer."""
        limit = min(self._max_new_tokens, self._pretrained.max_context - len(tokens))
        decoder = self._with_room(len(tokens) + limit)
        self._feed(decoder, tokens)
        ended = set[int]()
        for drawn in decoder.decode(limit, end_ids=self._pretrained.eos_ids, ended=ended):
            yield stream.push(drawn[0])
            if stream.stopped:
                ended.add(0)
        if piece := stream.finish():
            yield piece

    def _with_room(self, length: int) -> Decoder:
        """The decoder, or a longer one whose caches are empty."""
        if self._decoder is None or self._decoder.max_length < length:
            whole = SHORTEST
            while whole < length:
                whole *= 2
            whole = max(length, min(whole, self._pretrained.max_context))
            self._decoder = Decoder(
                self._pretrained.model, batch=1, max_length=whole, max_rollback=ROLLBACK, **self._settings
            )
        return self._decoder

    def _feed(self, decoder: Decoder, tokens: list[int]) -> None:
        """Brings the caches from the tokens that they hold to `tokens`."""
        [held] = decoder.tokens
        common = 0
        # The last token is fed in any case: its logits are needed.
        while common < min(len(held), len(tokens) - 1) and held[common] == tokens[common]:
            common += 1
        if len(held) - common > ROLLBACK:
            decoder.empty()
            common = 0
        elif len(held) > common:
            decoder.rollback([len(held) - common])
        self.fed = len(tokens) - common
        decoder.feed([tokens[common:]])
