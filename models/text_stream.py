"""Text from token ids as they come: whole characters, up to a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from models.checkpoints.huggingface_tokenizer import of_tokenizers

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_MOST_PENDING = 8
"""Tokens of one character, at most: what is still no character then is none."""


class TextStream:
    """Decodes tokens one by one; special tokens are left out.

    Args:
        tokenizer: of the model.
        stops: strings that end the text, wherever tokens cut them. They are not part of it.

    Attributes:
        text: all that was given out.
        stopped: True if a stop string was found.

    Raises:
        ValueError: in `push` and `finish`, if the tokenizer, which may be a stranger's, cannot decode its own tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._before = self._read = 0  # tokens before `_before` play no part any more, those before `_read` are text
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with one more token, often empty."""
        self._ids.append(token)
        return self._released(self._decoded(whole=False), last=False)

    def finish(self) -> str:
        """The rest, when no token will follow."""
        return self._released(self._decoded(whole=True), last=True)

    def _decoded(self, *, whole: bool) -> str:
        """The characters that the tokens since `_read` add."""
        known, text = self._text(self._ids[self._before : self._read]), self._text(self._ids[self._before :])
        pending = len(self._ids) - self._read
        if not whole and pending < _MOST_PENDING and (len(text) <= len(known) or text.endswith(_UNFINISHED)):
            return ""
        self._before, self._read = self._read, len(self._ids)
        same = next(
            (i for i, (a, b) in enumerate(zip(known, text, strict=False)) if a != b), min(len(known), len(text))
        )
        return text[same:]

    def _text(self, ids: list[int]) -> str:
        return of_tokenizers(lambda: self._tokenizer.decode(ids), "the tokenizer cannot decode its tokens")

    def _released(self, piece: str, *, last: bool) -> str:
        """The text that can be given out: without a stop string, its beginning at the end, or anything after it."""
        text = "" if self.stopped else self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:  # the first that is complete, however many characters come at once
            self.stopped = True
            text = text[: min(found)[1]]
        kept = 0 if last or self.stopped else max((_overlap(text, stop) for stop in self._stops), default=0)
        text, self._held = text[: len(text) - kept], text[len(text) - kept :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
