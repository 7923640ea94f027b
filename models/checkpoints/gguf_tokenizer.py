"""The tokenizer inside a GGUF file: byte-level byte-pair encoding, as GPT-2, Llama 3, Qwen and SmolLM have it.

A GGUF file names the rule by which text is cut into words before the merges (`tokenizer.ggml.pre`) and leaves out the
rule itself. Those here are the models' own, from the tokenizer.json that each publishes.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from models.checkpoints.huggingface_tokenizer import of_tokenizers
from models.sampling import Sampling
from models.untrusted import quoted

# Llama 3 keeps up to three digits together, Qwen 2 and 3 none.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = ("gpt-2", "smollm", "llama-bpe", "qwen2")
# Values of tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4
# Texts of tokens that llama.cpp takes for the end of a text or turn in whatever file they are, as few files name all.
# Source: github.com/ggml-org/llama.cpp, src/llama-vocab.cpp.
_ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>"),
)
# The same, of which the first that is there counts, unless the file names the token by its id.
_FILL_IN_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# Settings of the tokenizer that are read below, or that llama.cpp has no use for in a tokenizer of this kind.
_KNOWN = {
    *("model", "pre", "tokens", "token_type", "merges", "scores", "token_type_count", "add_bos_token", "add_eos_token"),
    *("add_sep_token", "add_space_prefix", "remove_extra_whitespaces", "precompiled_charsmap"),
    *("prefix_token_id", "suffix_token_id", "middle_token_id"),
    *(f"{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "cls")),
    *(f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
}
# Settings of llama.cpp's sampler under which it does nothing beyond temperature, top-k and top-p.
_PLAIN_SAMPLING = {"min_p": 0, "xtc_probability": 0, "penalty_repeat": 1, "penalty_last_n": 0, "mirostat": 0}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file.

    It encodes the text of a control token, such as `<|im_start|>`, as that token, and `decode` leaves such tokens out
    unless told otherwise. It puts the token for the beginning of a text in front where the file says so.

    Args:
        metadata: of the file, see `models.checkpoints.gguf.GgufFile`.

    Raises:
        ValueError: if the tokenizer is not of this kind (SentencePiece, say), its rule for cutting words is not known
            here, or its parts are missing or contradict each other.
    """
    kind, rule = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or rule not in _SPLITS:
        raise ValueError(
            f"the file's tokenizer is of the kind {quoted(kind)} with the words of {quoted(rule)}; supported are "
            f"'gpt2' with {', '.join(_SPLITS)}. Give the model's tokenizer.json beside the file: "
            "load(..., tokenizer=path)"
        )
    prefix = "tokenizer.ggml."
    unknown = [key for key in metadata if key.startswith(prefix) and key.removeprefix(prefix) not in _KNOWN]
    if _flag(metadata, "add_sep_token"):
        unknown = [f"{prefix}add_sep_token"]
    if unknown:
        raise ValueError(
            f"the file's tokenizer has the setting {quoted(unknown[0])}, which is not supported. Give the model's "
            "tokenizer.json beside the file: load(..., tokenizer=path)"
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
        raise ValueError(
            f"the merges of the file's tokenizer must join tokens to a token, got {quoted(' '.join(strays[0]))}"
        )
    for token in end_ids(metadata):
        if token < len(types):
            types[token] = _CONTROL
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=rule == "llama-bpe"))
    tokenizer.pre_tokenizer = _words(rule)
    tokenizer.decoder = decoders.ByteLevel()
    control, user_defined = _added(tokens, types, _CONTROL), _added(tokens, types, _USER_DEFINED)
    of_tokenizers(lambda: tokenizer.add_special_tokens(control), "the file's control tokens cannot be added")
    of_tokenizers(
        lambda: tokenizer.add_tokens(user_defined), "the tokens that the file's users defined cannot be added"
    )
    # llama.cpp adds it for Llama 3 unless the file says otherwise.
    first = _around(metadata, tokens, "bos", default=rule == "llama-bpe")
    last = _around(metadata, tokens, "eos", default=False)
    if first or last:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *first, "$B:1", *last],
            special_tokens=[(token, vocab[token]) for token in {*first, *last}],
        )
    return tokenizer


def _around(metadata: Mapping[str, Any], tokens: list[str], name: str, *, default: bool) -> list[str]:
    """The token that the file wants before ("bos") or after ("eos") every text, if any."""
    wanted = _flag(metadata, f"add_{name}_token")
    if not (default if wanted is None else wanted):
        return []
    number = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(tokens):
        side = "begins" if name == "bos" else "ends"
        raise ValueError(f"the file's tokenizer {side} texts with token {quoted(number)} of {len(tokens)}")
    return [tokens[number]]


def end_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text or a turn: named by the file, or known to llama.cpp by their texts."""
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    places = {token: i for i, token in enumerate(tokens)} if isinstance(tokens, list) else {}
    ends = set(_ENDS)
    if {"<|return|>", "<|call|>"} <= places.keys() or (
        {"<|flush|>"} < places.keys() and {"<|call|>", "<|calls|>"} & places.keys()
    ):
        ends.discard("<|end|>")  # it ends a message of several
    if "<|tool_response>" in places:
        ends.discard("</s>")
    found = [places[text] for text in _ENDS if text in ends and text in places]
    for name, texts in _FILL_IN_ENDS.items():
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        found += [number] if number is not None else [places[text] for text in texts if text in places][:1]
    ids = [number for number in (*named, *found) if number is not None]
    strays = [number for number in ids if isinstance(number, bool) or not isinstance(number, int) or number < 0]
    if strays:
        raise ValueError(f"tokens that end a text must be ids from 0 on, the file has {quoted(strays[0])}")
    return tuple(dict.fromkeys(ids))


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the tokens that begin and end a text, which chat templates know by name."""
    tokens, texts = metadata.get("tokenizer.ggml.tokens"), {}
    for name in ("bos", "eos"):
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(tokens, list) and isinstance(number, int) and 0 <= number < len(tokens):
            texts[f"{name}_token"] = str(tokens[number])
    return texts


def gguf_chat_template(metadata: Mapping[str, Any]) -> str | None:
    """The Jinja template that lays out a conversation, if the file has one."""
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"tokenizer.chat_template must be a text, got {quoted(template)}")
    return template


def sampling_of_gguf(metadata: Mapping[str, Any]) -> tuple[Sampling, dict[str, Any]]:
    """The sampling that the file asks for, and its settings that `Sampling` does not support.

    Raises:
        ValueError: a value is of another type, or out of range.
    """
    prefix = "general.sampling."
    wanted = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    numbers = {key: wanted.pop(key) for key in ("temp", "top_k", "top_p") if key in wanted}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{prefix}{key} must be a number, got {quoted(value)}")
    helpers = {"xtc_threshold", "mirostat_tau", "mirostat_eta", "penalty_last_n"}
    refused = {
        f"{prefix}{key}": value
        for key, value in wanted.items()
        if key not in helpers and _PLAIN_SAMPLING.get(key, ...) != value
    }
    if "temp" not in numbers:
        return Sampling(), refused | {f"{prefix}{key}": value for key, value in numbers.items()}
    top_k = int(numbers.get("top_k", 0))
    return Sampling(max(0.0, numbers["temp"]), top_k if top_k > 0 else None, numbers.get("top_p", 1.0)), refused


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


def _flag(metadata: Mapping[str, Any], name: str) -> bool | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"tokenizer.ggml.{name} must be true or false, got {quoted(value)}")
    return value


def _list(metadata: Mapping[str, Any], key: str) -> list:
    value = metadata.get(key)
    if value is None:
        raise ValueError(f"the file lacks {key}, a part of its tokenizer")
    kind = int if key.endswith("token_type") else str
    if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
        raise ValueError(f"{key} must be a list of {'numbers' if kind is int else 'texts'}, got {quoted(value)}")
    return list(value)
