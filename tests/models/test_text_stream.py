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
    # Of stops that overlap, the one that is complete first counts, and of those the longest.
    found = sorted((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
    assert stream.text == "".join(pieces) == (text[: found[0][1]] if found else text)
    assert stream.stopped == bool(found)


@pytest.mark.parametrize(("stops", "text"), [(["bcd", "c"], "ab"), (["bcd", "d"], "a"), (["ab", "abc"], "")])
def test_how_tokens_cut_a_text_decides_nothing(stops, text):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "d": 3, "bcd": 4, "abcd": 5}, "a"))
    words.decoder = decoders.Fuse()
    for tokens in ([0, 1, 2, 3], [0, 4], [5]):
        assert streamed(tokens, stops, words)[1].text == text


def test_a_decoder_that_panics_is_one_line(capfd):
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.decoder = decoders.Strip("a", 3, 3)
    with pytest.raises(ValueError, match="the tokenizer cannot decode its tokens: index out of bounds"):
        streamed(b"aa", tokenizer=tokenizer)
    assert capfd.readouterr() == ("", "")


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
