"""The tokenizer inside a GGUF file, on a vocabulary of two dozen tokens."""

import pytest

from models.checkpoints.gguf_tokenizer import tokenizer_from_gguf

# The space is spelt Ġ and the newline Ċ.
TOKENS = [*"abcdst'012Ġ.ABĊ", "ab", "Ġa", "12", "AB", "'s", "Ġab", "ĊĊ", "<|end|>", "<tool>"]
MERGES = ["a b", "Ġ a", "1 2", "A B", "' s", "Ġ ab", "Ċ Ċ"]
METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * (len(TOKENS) - 2) + [3, 4],
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": TOKENS.index("<|end|>"),
}


def tokenizer(**changes):
    return tokenizer_from_gguf(METADATA | {f"tokenizer.ggml.{name}": value for name, value in changes.items()})


def tokens(text, **changes):
    return tokenizer(**changes).encode(text).tokens


def words(text, rule):
    pieces = tokenizer(pre=rule, add_bos_token=False).pre_tokenizer.pre_tokenize_str(text)
    return [piece.replace("Ġ", " ").replace("Ċ", "\n").replace("č", "\r") for piece, _ in pieces]


def test_merges_apply_in_their_order():
    assert tokens("ab ab") == ["ab", "Ġab"]
    assert tokens("ab ab", merges=["a b", "Ġ a"]) == ["ab", "Ġ", "ab"]
    assert tokens("ab ab", merges=["Ġ a", "a b", "Ġ ab"]) == ["ab", "Ġa", "b"]


def test_ids_are_places_in_the_list():
    assert tokenizer().encode("a.<|end|>").ids == [TOKENS.index(token) for token in ("a", ".", "<|end|>")]


def test_control_tokens_are_found_in_text_and_left_out_of_it():
    ids = tokenizer().encode("a<|end|> a<tool>b").ids
    assert [TOKENS[i] for i in ids] == ["a", "<|end|>", "Ġa", "<tool>", "b"]
    assert tokenizer().decode(ids) == "a a<tool>b"
    assert tokenizer().decode(ids, skip_special_tokens=False) == "a<|end|> a<tool>b"


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("gpt-2", ["ab", " 1234", ".", "\r\n\n", " DON", "'", "T", " it", "'s", "  ", " a"]),
        ("smollm", ["ab", " ", "1", "2", "3", "4", ".", "\r\n\n", " DON", "'", "T", " it", "'s", "  ", " a"]),
        ("llama-bpe", ["ab", " ", "123", "4", ".\r\n\n", " DON", "'T", " it", "'s", "  ", " a"]),
        ("qwen2", ["ab", " ", "1", "2", "3", "4", ".\r\n\n", " DON", "'T", " it", "'s", "  ", " a"]),
    ],
)
def test_words_are_cut_by_the_models_rule(rule, expected):
    assert words("ab 1234.\r\n\n DON'T it's   a", rule) == expected


def test_digits_stand_alone_or_merge_by_the_rule():
    assert tokens("12") == ["1", "2"]
    assert tokens("12", pre="llama-bpe", add_bos_token=False) == ["12"]
    assert tokens("12", pre="gpt-2") == ["12"]


def test_llama_3_takes_whole_words_before_merges():
    few = {"merges": MERGES[:5], "add_bos_token": False}  # which do not lead to Ġab
    assert tokens(" ab", pre="llama-bpe", **few) == ["Ġab"]
    assert tokens(" ab", pre="qwen2", **few) == ["Ġ", "ab"]


def test_the_beginning_is_marked_where_the_file_says_so():
    assert tokens("a") == ["a"]
    assert tokens("a", add_bos_token=True) == ["<|end|>", "a"]
    assert tokens("a", pre="llama-bpe") == ["<|end|>", "a"]  # the default of Llama 3


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": "llama"}, r"of the kind 'llama'.*supported are 'gpt2' with .*tokenizer=path"),
        ({"pre": "tekken"}, r"with the words of 'tekken'"),
        ({"pre": None}, r"with the words of None"),
        ({"merges": None}, r"lacks tokenizer\.ggml\.merges"),
        ({"merges": ["a b", "a x"]}, r"must join tokens to a token, got 'a x'"),
        ({"merges": ["ab"]}, r"must join tokens to a token, got 'ab'"),
        ({"token_type": [1]}, r"got 24 tokens, 24 of them different, and 1 types"),
        ({"tokens": ["a"] * 24}, r"got 24 tokens, 1 of them different"),
        ({"bos_token_id": 99, "add_bos_token": True}, r"begins texts with token 99 of 24"),
    ],
)
def test_what_is_no_such_tokenizer_is_refused(changes, match):
    with pytest.raises(ValueError, match=match) as caught:
        tokenizer(**changes)
    assert "\n" not in str(caught.value)
