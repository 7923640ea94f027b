"""Bytes as tokens: every text comes back, behind the boundary that opens it."""

import hypothesis
import pytest
from hypothesis import strategies
from tokenizers import Tokenizer

from models.byte_tokenizer import BOUNDARY, BOUNDARY_TOKEN, byte_tokenizer

TOKENIZER = byte_tokenizer()


@hypothesis.given(strategies.text())
@hypothesis.example("a é € 🙂\r\n\0  <|endoftext| end")
def test_ids_are_the_bytes(text):
    text = text.encode("utf-8", "ignore").decode()
    ids = TOKENIZER.encode(text).ids
    assert ids == [BOUNDARY, *text.encode()]
    assert TOKENIZER.decode(ids) == text


def test_every_byte_has_its_own_id():
    assert TOKENIZER.get_vocab_size() == 257
    assert TOKENIZER.token_to_id(BOUNDARY_TOKEN) == BOUNDARY
    assert TOKENIZER.decode([0xE2, 0x82, 0xAC]) == "€"
    assert TOKENIZER.decode([0xE2, 0x82]).strip("�") == ""


@pytest.mark.parametrize("text", ["def f():\n    return 1", "é", "a<|endoftext|>b"])
def test_it_is_the_same_from_a_file(tmp_path, text):
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == TOKENIZER.encode(text).ids
