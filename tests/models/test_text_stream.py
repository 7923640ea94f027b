"""Text out of tokens: whole characters, and stop strings wherever tokens cut them."""

import hypothesis
import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from models.byte_tokenizer import byte_tokenizer
from models.text_stream import TextStream

TOKENIZER = byte_tokenizer()


def streamed(tokens, stops=(), tokenizer=TOKENIZER) -> tuple[list[str], TextStream]:
    stream, pieces = TextStream(tokenizer, stops), []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


@hypothesis.given(
    st.text(st.characters(codec="utf-8")), st.lists(st.text(st.sampled_from("ab€"), min_size=1, max_size=3))
)
@hypothesis.example("aab€b", ["ab€", "b€b"])
def test_the_text_ends_before_the_first_stop(text, stops):
    pieces, stream = streamed(text.encode(), stops)
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    # A stop that ends sooner is found first, though another one begins before it.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    begins = [text.find(stop) for stop in stops if stop in text[: min(ends, default=0)]]
    assert stream.text == "".join(pieces) == (text[: min(begins)] if found else text)
    assert stream.stopped == bool(found)


def test_characters_come_whole_and_nothing_is_kept_longer_than_needed():
    pieces, _ = streamed("é€x".encode())
    assert pieces == ["", "é", "", "", "€", "x", ""]
    pieces, _ = streamed(b"no stop", ["stopped"])
    assert pieces == ["n", "o", " ", "", "", "", "", "stop"]


@pytest.mark.parametrize("tokens", [b"\xe2\x82", b"a\xff\xfeb", b"\x80" * 40, b"\xf0\x9f\x99"])
def test_bytes_that_are_no_text_are_shown(tokens):
    pieces, stream = streamed(tokens)
    assert stream.text == tokens.decode(errors="replace")
    assert any(pieces[:9])  # not held back for ever


def test_special_tokens_are_left_out():
    assert streamed([256, 97, 256])[1].text == "a"


def test_bytes_that_fall_back_may_change_what_they_meant():
    # As in Llama's tokenizer: a run of byte tokens is text only if all of it is UTF-8.
    vocab = {"<unk>": 0, "x": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    byte = [2 + byte for byte in "A€".encode()]
    assert streamed([*byte, 1], tokenizer=tokenizer)[1].text == "A€x"
    assert "x" in streamed([byte[0], byte[1], 1], tokenizer=tokenizer)[1].text
