"""The tokenizer of a checkpoint directory: tokenizer.json, and what the files beside it change in it.

What they change, and in which order, is what the package transformers (5.23, `TokenizersBackend`) makes of them.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors

from models.untrusted import quoted, read_json, read_text, shortened

_log = logging.getLogger(__name__)
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names in tokenizer_config.json of the tokens that chat templates use by name."""
_MOST_GROWTH = 64  # of a text, in the steps before and after it is cut into tokens
_ADDED_TOKEN_FLAGS = {"single_word", "lstrip", "rstrip", "normalized", "special"}


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer, special tokens and chat template of a checkpoint directory.

    Attributes:
        tokenizer: None if there is none.
        special_tokens: the texts of some of `SPECIAL_TOKENS`.
        chat_template: the Jinja template that lays out a conversation, if there is one.
    """

    tokenizer: Tokenizer | None
    special_tokens: dict[str, str]
    chat_template: str | None


def read_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    Raises:
        ValueError: if the file is missing, torn, or no tokenizer.
    """
    values = read_json(path)
    if "model" not in values:
        raise ValueError(f"{path} must have a 'model', which it lacks: it is no tokenizer.json")
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (growth := _growth(values.get(part))) > _MOST_GROWTH:
            raise ValueError(
                f"{path}: its {part} may make a text {growth:.0g} times as long, at most {_MOST_GROWTH} is done"
            )
    content = pathlib.Path(path).read_bytes()  # `from_file` takes no path but one in UTF-8
    tokenizer = of_tokenizers(lambda: Tokenizer.from_buffer(content), f"{path} is no tokenizer")
    # Left over from someone's training: texts are neither cut nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _growth(part: Any) -> float:
    """The factor by which the replacements in a part of a tokenizer.json, one after the other, may lengthen a text."""
    growth, left = 1.0, [part]
    while left:
        step = left.pop()
        if isinstance(step, list):
            left += step
        if not isinstance(step, dict):
            continue
        left += [value for value in step.values() if isinstance(value, (dict, list))]
        pattern, content, before = (step.get(key) for key in ("pattern", "content", "prepend"))
        if isinstance(content, str):
            text = pattern.get("String") if isinstance(pattern, dict) else None
            growth *= max(1.0, len(content) / max(1, len(text) if isinstance(text, str) else 1))
        if isinstance(before, str):
            growth *= max(1, len(before))
        growth = min(growth, 1e300)
    return growth


def of_tokenizers[T](action: Callable[[], T], message: str) -> T:
    """Runs an action of the package tokenizers, whose errors become ValueErrors."""
    try:
        with _unreported_panics():
            return action()
    except BaseException as error:  # their panics are no Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{message}: {shortened(error)}") from error
        raise


@contextlib.contextmanager
def _unreported_panics() -> Iterator[None]:
    """Keeps Rust's own report of a panic, which goes to file descriptor 2 past Python, off the screen."""
    try:
        kept = os.dup(2)
    except OSError:  # closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def read_tokenizer_files(directory: pathlib.Path, tokenizer: Tokenizer | None = None) -> TokenizerFiles:
    """Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat templates.

    Args:
        directory: where they are, if they are.
        tokenizer: to take as it is in place of the directory's own.

    Raises:
        ValueError: in one line, if a file is torn, or a value in it has a form that it cannot have.
    """
    config, added = _settings(directory)
    own = directory / "tokenizer.json"
    special = {name: token for name in SPECIAL_TOKENS if (token := _token(config, name)) is not None}
    special |= _named_tokens(config)
    if tokenizer is None and own.exists():
        tokenizer = read_tokenizer(own)
        _follow_class(tokenizer, config)
        _add_tokens(tokenizer, added, special, config)
        _follow_flags(tokenizer, special, config)
    texts = {name: token.content for name, token in special.items()}
    return TokenizerFiles(tokenizer, texts, _chat_template(directory, config))


def _settings(directory: pathlib.Path) -> tuple[dict[str, Any], dict[int, AddedToken]]:
    """tokenizer_config.json, completed by the older files where it lists no added tokens itself; and added tokens."""
    config = optional_json(directory / "tokenizer_config.json")
    if config.get("auto_map") is not None:
        raise ValueError("tokenizer_config.json has an auto_map: a tokenizer that is a program of its own is not run")
    listed, added = config.get("added_tokens_decoder"), {}
    if listed is not None:
        if not isinstance(listed, dict):
            raise ValueError(f"tokenizer_config.json must have an object as added_tokens_decoder, got {quoted(listed)}")
        for number, token in listed.items():
            added[_number(number)] = _added_token(token, "added_tokens_decoder")
        return config, added
    config |= optional_json(directory / "special_tokens_map.json")
    special = {token.content for name in SPECIAL_TOKENS if (token := _token(config, name)) is not None}
    for text, number in optional_json(directory / "added_tokens.json").items():
        is_special = text in special
        added[_number(number)] = AddedToken(text, normalized=not is_special, special=is_special)
    return config, added


def _token(config: Mapping[str, Any], name: str) -> AddedToken | None:
    value = config.get(name)
    return None if value is None else _added_token(value, name)


def _added_token(value: Any, name: str) -> AddedToken:
    """A token given by its text, or by an object that has also how it is found in a text."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    flags = {key: value[key] for key in _ADDED_TOKEN_FLAGS & value.keys()} if isinstance(value, dict) else {}
    known = isinstance(value, dict) and value.keys() <= _ADDED_TOKEN_FLAGS | {"content", "__type"}
    if not (known and isinstance(value.get("content"), str) and all(isinstance(flag, bool) for flag in flags.values())):
        raise ValueError(f"{name} must be a token's text, or an object with its content and flags, got {quoted(value)}")
    return AddedToken(value["content"], **flags)


def _number(value: Any) -> int:
    """The id of an added token, from a key or a value of a JSON file."""
    if isinstance(value, bool) or not str(value).isascii() or not str(value).isdecimal() or int(value) >= 1 << 31:
        raise ValueError(f"an added token must have an id from 0 on, got {quoted(value)}")
    return int(value)


def _follow_class(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Cuts words as transformers' class does where that differs from what the older tokenizer.json of Llama 2 says.

    The class marks the first word of a text; the file, the first word after each special token, too.
    """
    if str(config.get("tokenizer_class")).removesuffix("Fast") != "LlamaTokenizer":
        return
    if "ByteLevel" in f"{tokenizer.pre_tokenizer!r}":  # Llama 3 under the wrong name
        return
    scheme = "never" if flag(config, "add_prefix_space") is False else "always" if flag(config, "legacy") else "first"
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)


def _add_tokens(
    tokenizer: Tokenizer, added: Mapping[int, AddedToken], special: Mapping[str, AddedToken], config: Mapping[str, Any]
) -> None:
    """Adds the tokens that the other files have and tokenizer.json lacks, or has with other flags."""
    present = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    more = [token for _, token in sorted(added.items()) if repr(token) not in present]
    texts = {token.content for token in tokenizer.get_added_tokens_decoder().values()} | {t.content for t in more}
    for token in [*special.values(), *_extra_tokens(config)]:
        if token.content not in texts:
            more.append(token)
            texts.add(token.content)
    of_tokenizers(lambda: tokenizer.add_tokens(more), "tokenizer_config.json has tokens that cannot be added")


def _extra_tokens(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(extra, (list, dict)):
        raise ValueError(f"extra_special_tokens must be a list of tokens, got {quoted(extra)}")
    for token in extra if isinstance(extra, list) else ():
        yield _added_token(token, "extra_special_tokens")


def _named_tokens(config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """Tokens under names of the model's own, such as image_token."""
    extra = config.get("extra_special_tokens")
    named = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, (str, dict))}
    named |= extra if isinstance(extra, dict) else {}
    return {key: _added_token(value, key) for key, value in named.items() if key not in SPECIAL_TOKENS}


def _follow_flags(tokenizer: Tokenizer, special: Mapping[str, AddedToken], config: Mapping[str, Any]) -> None:
    """Puts tokens around a text where the flags say so, whatever tokenizer.json says; without flags, it decides.

    Here transformers 5.23 differs: where there is a tokenizer.json, it leaves the flags out. Version 4 and llama.cpp's
    converter go by them, and there are models that need them (DeepSeek-R1-Distill-Llama).
    """
    tokenizer.encode_special_tokens = bool(flag(config, "split_special_tokens"))
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    around = {
        name: special[f"{name}_token"].content
        for name in ("bos", "eos")
        if flag(config, f"add_{name}_token") and f"{name}_token" in special
    }
    first, last = ([around[name]] if name in around else [] for name in ("bos", "eos"))
    ids = [(token, tokenizer.token_to_id(token)) for token in {*first, *last}]
    before = of_tokenizers(lambda: tokenizer.encode("").ids, "tokenizer.json cannot encode a text")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last], pair=[*first, "$A", *last, *first, "$B:1", *last], special_tokens=ids
    )
    if (after := tokenizer.encode("").ids) != before:
        _log.warning("tokenizer_config.json puts %s around a text, tokenizer.json %s: the first is done", after, before)


def flag(values: Mapping[str, Any], key: str) -> bool | None:
    """A value that is true, false, or not there; raises ValueError on any other."""
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {quoted(value)}")
    return value


def _chat_template(directory: pathlib.Path, config: Mapping[str, Any]) -> str | None:
    """The template by itself, or the one named default of several; files go before tokenizer_config.json."""
    files = {path.name.removesuffix(".jinja"): path for path in directory.glob("additional_chat_templates/*.jinja")}
    if (directory / "chat_template.jinja").exists():
        files = {"default": directory / "chat_template.jinja"} | files
    templates = {name: read_text(path, _LARGEST_TEMPLATE) for name, path in files.items()} or config.get(
        "chat_template"
    )
    if isinstance(templates, list):
        if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in templates):
            raise ValueError(f"chat_template must be a text, or a list of names and templates, got {quoted(templates)}")
        templates = {entry["name"]: entry.get("template") for entry in templates}
    if isinstance(templates, dict) and "default" not in templates:
        _log.warning("%s has chat templates, none of which is named default: %s", directory, quoted(sorted(templates)))
    template = templates.get("default") if isinstance(templates, dict) else templates
    if template is not None and not isinstance(template, str):
        raise ValueError(f"chat_template must be a text, got {quoted(template)}")
    return template


_LARGEST_TEMPLATE = 1 << 22  # bytes; those in use have some tens of thousands


def optional_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file."""
    return read_json(path) if path.exists() else {}
