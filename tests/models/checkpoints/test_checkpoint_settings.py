"""Effects of the settings in a checkpoint's files, and the settings that are refused.

test_transformers_settings.py compares with the package transformers.
"""

import functools
import json
import logging
import os
import pathlib
import tempfile

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import models.checkpoints.gguf as gguf_settings
import models.checkpoints.gguf_tokenizer as gguf_tokens
import models.checkpoints.huggingface_config as config_settings
import models.checkpoints.huggingface_generation as generation_settings
from models.checkpoints.huggingface_tokenizer import SPECIAL_TOKENS
from models.checkpoints.huggingface_weights import to_huggingface
from models.checkpoints.pretrained import Pretrained, load, open_checkpoint, save
from models.generation import generate
from models.sampling import Sampling
from tests.models.tiny_checkpoints import LLAMA, TOKENS, UNTIED, transformer

SETTINGS = {"dtype": "float32", "implementation": "reference"}
MODEL = transformer(LLAMA)


def byte_level(extra: int = 0, *, template: bool = False) -> Tokenizer:
    """92 tokens, <s> and </s> with the ids 92 and 93, and some more."""
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", *(f"<extra_{i}>" for i in range(extra))])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 92)])
    return tokenizer


@functools.cache
def saved_files(extra, template, model):
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = byte_level(extra, template=template)
    with tempfile.TemporaryDirectory() as path:
        save(path, Pretrained(model=model, max_context=128, tokenizer=tokenizer, eos_ids=(93,), special_tokens=tokens))
        return {file.name: file.read_bytes() for file in pathlib.Path(path).iterdir()}


def saved(path, *, extra=0, template=False, model=MODEL, **files):
    """A checkpoint, changed in what its JSON files say."""
    for name, contents in saved_files(extra, template, model).items():
        (path / name).write_bytes(contents)
    for name, changes in files.items():
        file = path / f"{name}.json"
        values = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(values | changes))
    return path


def same_parameters(loaded, model):
    loaded, model = to_huggingface(loaded), to_huggingface(model)
    assert loaded.keys() == model.keys()
    for name, tensor in model.items():
        np.testing.assert_array_equal(loaded[name], tensor)


def ids(path, text="abc"):
    return open_checkpoint(path).encode(text)


def test_a_head_beside_the_flag_that_ties_it_is_kept(tmp_path, caplog):
    model = transformer(UNTIED)
    saved(tmp_path, model=model, config={"tie_word_embeddings": True})
    with caplog.at_level(logging.WARNING):
        loaded = load(tmp_path, **SETTINGS).model
    assert "differ: both are kept" in caplog.text
    assert not loaded.config.tie_embeddings
    same_parameters(loaded, model)


@pytest.mark.parametrize(
    ("template", "flags", "expected"),
    [
        (False, {}, [89, 60]),
        (True, {}, [92, 89, 60]),
        (False, {"add_bos_token": True}, [92, 89, 60]),
        (True, {"add_bos_token": False}, [89, 60]),
        (False, {"add_bos_token": True, "add_eos_token": True}, [92, 89, 60, 93]),
        (True, {"add_eos_token": True}, [89, 60, 93]),
        (False, {"add_bos_token": True, "bos_token": None}, [89, 60]),
    ],
)
def test_the_flags_say_what_is_around_a_text(tmp_path, template, flags, expected):
    assert ids(saved(tmp_path, template=template, tokenizer_config=flags)) == expected


def test_special_tokens_may_be_split(tmp_path):
    assert len(ids(saved(tmp_path), "<s>")) == 1
    assert len(ids(saved(tmp_path, tokenizer_config={"split_special_tokens": True}), "<s>")) == 3


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"tokenizer_config": {"added_tokens_decoder": {"94": {"content": "<x>", "special": True}}}}, "<x>"),
        ({"tokenizer_config": {"extra_special_tokens": ["<x>"]}}, "<x>"),
        ({"tokenizer_config": {"additional_special_tokens": [{"content": "<x>"}]}}, "<x>"),
        ({"tokenizer_config": {"image_token": "<x>"}}, "<x>"),
        ({"special_tokens_map": {"pad_token": "<x>"}}, "<x>"),
        ({"added_tokens": {"<x>": 94}}, "<x>"),
    ],
)
def test_tokens_that_other_files_add(tmp_path, files, text):
    assert ids(saved(tmp_path, **files), f"a{text}b") == [58, 94, 59]


def test_tokens_beyond_the_vocabulary_are_refused_where_they_are_met(tmp_path):
    pretrained = load(saved(tmp_path, extra=4), **SETTINGS)  # of 98 tokens the model has 96
    assert pretrained.encode("ab<extra_1>") == [89, 95]
    with pytest.raises(ValueError, match=r"has the token '<extra_2>' with the id 96, where the model knows .* 0 to 95"):
        pretrained.encode("ab<extra_2>")
    for token in (96, -1):
        with pytest.raises(ValueError, match=f"must have ids from 0 to 95, got {token}"):
            next(generate(pretrained, [1, token], 1))


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, Sampling()),
        ({"do_sample": True}, Sampling(1.0, 50, 1.0)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0}, Sampling(0.6, None, 0.9)),
        ({"do_sample": False, "temperature": 0.6, "min_p": 0.1}, Sampling()),
        ({"repetition_penalty": 1.0, "num_beams": 1, "max_length": 20, "bad_words_ids": None}, Sampling()),
    ],
)
def test_tokens_are_chosen_as_the_checkpoint_says(tmp_path, generation, expected):
    checkpoint = open_checkpoint(saved(tmp_path, generation_config=generation))
    assert checkpoint.own_sampling() == expected
    save(tmp_path / "again", load(tmp_path, **SETTINGS))
    assert open_checkpoint(tmp_path / "again").own_sampling() == expected


@pytest.mark.parametrize(
    "setting",
    [
        *({"repetition_penalty": 1.1}, {"suppress_tokens": [3]}, {"bad_words_ids": [[3]]}, {"num_beams": 4}),
        *({"do_sample": True, "min_p": 0.1}, {"stop_strings": ["a"]}, {"forced_eos_token_id": 3}),
    ],
)
def test_choices_that_cannot_be_made_are_refused_unless_one_says_how_else(tmp_path, setting):
    checkpoint = open_checkpoint(saved(tmp_path, generation_config=setting))
    with pytest.raises(ValueError, match=r"asks for tokens to be chosen by \w+=.*, which is not supported: say how"):
        checkpoint.own_sampling()
    if "num_beams" in setting:
        pretrained = load(tmp_path, **SETTINGS)
        with pytest.raises(ValueError, match="num_beams=4"):
            next(generate(pretrained, [1, 2], 1))
        assert next(generate(pretrained, [1, 2], 1, sampling=Sampling())) >= 0


@pytest.mark.parametrize(
    ("file", "setting", "match"),
    [
        ("config", {"num_hidden_layers": 10**9}, r"missing are \['model.layers.10.*\(8999999982 in all\)"),
        (
            "config",
            {"num_attention_heads": 3, "head_dim": None},
            "hidden_size=64, which num_attention_heads=3 must divide",
        ),
        (
            "config",
            {"num_attention_heads": 2**30, "head_dim": 16},
            "must be a multiple of num_kv_heads|must have shape",
        ),
        ("config", {"hidden_size": 10**30}, "a positive integer as 'hidden_size', got 1000000"),
        ("config", {"rms_norm_eps": "x"}, "a positive number as 'rms_norm_eps', got 'x'"),
        ("config", {"rope_theta": float("inf"), "rope_parameters": None}, "changes the rotary positions by"),
        ("config", {"tie_word_embeddings": "yes"}, "true or false as 'tie_word_embeddings', got 'yes'"),
        ("config", {"architectures": [["a"]]}, "the architecture must be one of"),
        ("config", {"model_type": "granite"}, "both architectures=.*and model_type='granite'"),
        ("config", {"layer_types": ["sliding_attention"] * 2}, "layer_types=.*supported is 'full_attention'"),
        ("config", {"logit_scale": 0.5}, "logit_scale=0.5; supported is 1 alone"),
        ("config", {"attention_multiplier": 0.1}, "attention_multiplier=0.1; supported is None alone"),
        ("generation_config", {"eos_token_id": {"a": 1}}, "must be ids from 0 to 95"),
        ("generation_config", {"do_sample": "x"}, "true or false as do_sample, got 'x'"),
        ("generation_config", {"do_sample": True, "temperature": "hot"}, "a number as temperature, got 'hot'"),
        ("generation_config", {"do_sample": True, "top_k": -3}, "an integer from 0 on as top_k, got -3"),
        ("tokenizer_config", {"chat_template": 5}, "chat_template must be a text, got 5"),
        ("tokenizer_config", {"chat_template": [5]}, r"chat_template must be a text, or a list of names.*\[5\]"),
        ("tokenizer_config", {"bos_token": ["a"]}, r"bos_token must be a token's text, .* got \['a'\]"),
        ("tokenizer_config", {"add_bos_token": "x"}, "add_bos_token must be true or false, got 'x'"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": "a"}}, "must have an id from 0 on, got 'x'"),
        ("tokenizer_config", {"auto_map": {"AutoTokenizer": "x.Y"}}, "has an auto_map"),
        ("tokenizer", {"model": 5}, r"tokenizer\.json is no tokenizer"),
        ("tokenizer", {"normalizer": {"type": "Unknown"}}, r"tokenizer\.json is no tokenizer"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused_in_one_line(tmp_path, file, setting, match):
    saved(tmp_path, **{file: setting})
    with pytest.raises(ValueError, match=match) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "normalizers",
    [
        [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
        [{"type": "Replace", "pattern": {"Regex": "a"}, "content": "a" * 1_000}],
        [{"type": "Prepend", "prepend": "a" * 1_000_000}],
        [{"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "abc"}] * 9}],
    ],
)
def test_a_tokenizer_that_makes_texts_endless_is_refused(tmp_path, normalizers):
    saved(tmp_path, tokenizer={"normalizer": {"type": "Sequence", "normalizers": normalizers}})
    with pytest.raises(ValueError, match=r"normalizer may make a text .* times as long, at most 64 is done"):
        open_checkpoint(tmp_path)


def test_a_pattern_of_words_that_never_ends_is_one_line(tmp_path):
    endless = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    saved(tmp_path, tokenizer={"pre_tokenizer": endless})
    with pytest.raises(ValueError, match=r"the tokenizer cannot encode the text: .*retry-limit"):
        ids(tmp_path, "a" * 60 + "b")


def test_unknown_settings_are_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        open_checkpoint(saved(tmp_path, config={"warp": 1}, generation_config={"weft": 2}))
    assert "not known: ['warp', 'weft']" in caplog.text


def test_what_is_no_regular_file_is_refused(tmp_path):
    saved(tmp_path)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).rename(tmp_path / "kept")
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} cannot be read: it is no regular file"):
            open_checkpoint(tmp_path)
        (tmp_path / "kept").replace(tmp_path / name)
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        open_checkpoint(tmp_path)


def test_the_list_of_settings_names_all_that_are_read():
    text = (pathlib.Path(__file__).parents[3] / "docs" / "checkpoint_settings.md").read_text("utf-8")
    known = {
        *config_settings._KNOWN,
        *config_settings._SUPPORTED,
        *generation_settings.generation_settings(),
        *SPECIAL_TOKENS,
        *(f"tokenizer.ggml.{name}" for name in gguf_tokens._KNOWN),
        *gguf_tokens._ENDS,
        *gguf_settings._KNOWN,
        *gguf_settings._WITHOUT_EFFECT,
    }
    assert not sorted(name for name in known if f"`{name}`" not in text)
    places = [text.index(f"`{name}`") for name in gguf_tokens._ENDS]
    assert places == sorted(places)  # the text says that this is the order in which they are taken
