"""The tokenizer inside a GGUF file: byte-level byte-pair encoding, as GPT-2, Llama 3, Qwen and SmolLM have it.

A GGUF file names the rule by which text is cut into words before the merges (`tokenizer.ggml.pre`) and leaves out the
rule itself. Those here are the models' own, from the tokenizer.json that each publishes.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

# Llama 3 keeps up to three digits together, Qwen 2 and 3 none.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = ("gpt-2", "smollm", "llama-bpe", "qwen2")
# Values of tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file.

    It encodes the text of a control token, such as `<|im_start|>`, as that token, and `decode` leaves such tokens out
    unless told otherwise. It puts the token for the beginning of a text in front where the file says so.

    Args:
        metadata: of the file, see `models.gguf.GgufFile`.

    Raises:
        ValueError: if the tokenizer is not of this kind (SentencePiece, say), its rule for cutting words is not known
            here, or its parts are missing or contradict each other.
    """
    kind, rule = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or rule not in _SPLITS:
        raise ValueError(
            f"the file's tokenizer is of the kind {kind!r} with the words of {rule!r}; supported are 'gpt2' with "
            f"{', '.join(_SPLITS)}. Give the model's tokenizer.json beside the file: load(..., tokenizer=path)"
        )
    tokens, merges, types = (_list(metadata, f"tokenizer.ggml.{name}") for name in ("tokens", "merges", "token_type"))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"the file's tokenizer must have tokens that differ, and a type for each; "
            f"got {len(tokens)} tokens, {len(set(tokens))} of them different, and {len(types)} types"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    strays = [pair for pair in pairs if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys()]
    if strays:
        raise ValueError(f"the merges of the file's tokenizer must join tokens to a token, got {' '.join(strays[0])!r}")
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=rule == "llama-bpe"))
    tokenizer.pre_tokenizer = _words(rule)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_added(tokens, types, _CONTROL))
    tokenizer.add_tokens(_added(tokens, types, _USER_DEFINED))
    # llama.cpp adds it for Llama 3 unless the file says otherwise.
    if metadata.get("tokenizer.ggml.add_bos_token", rule == "llama-bpe"):
        bos_id = metadata.get("tokenizer.ggml.bos_token_id")
        if not isinstance(bos_id, int) or not 0 <= bos_id < len(tokens):
            raise ValueError(f"the file's tokenizer begins texts with token {bos_id} of {len(tokens)}")
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def _words(rule: str) -> pre_tokenizers.PreTokenizer:
    if rule in ("gpt-2", "smollm"):
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if rule == "gpt-2":
            return words
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    regex = Regex(_WORDS.format(digits="{1,3}" if rule == "llama-bpe" else ""))
    split = pre_tokenizers.Split(regex, behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _added(tokens: list[str], types: list[int], kind: int) -> list[AddedToken]:
    texts = [token for token, its_kind in zip(tokens, types, strict=True) if its_kind == kind]
    return [AddedToken(text, special=kind == _CONTROL, normalized=False) for text in texts]


def _list(metadata: Mapping[str, Any], key: str) -> list:
    value = metadata.get(key)
    if not isinstance(value, list):
        raise ValueError(f"the file lacks {key}, a part of its tokenizer")
    return value
