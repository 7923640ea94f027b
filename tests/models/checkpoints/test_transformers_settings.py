"""Every setting of a checkpoint's files against the package transformers on the same files. Needs the extra `peers`."""

import json

import numpy as np
import pytest
from flax import nnx
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from models.checkpoints.chat_template import chat_tokens
from models.checkpoints.huggingface_weights import to_huggingface
from models.checkpoints.pretrained import Pretrained, load, open_checkpoint, save
from models.checkpoints.safetensors import save_safetensors
from tests.models.tiny_checkpoints import LLAMA, TOKENS, UNTIED, transformer

# Theirs are not ours to mend.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SETTINGS = {"dtype": "float32", "implementation": "reference"}
TEXTS = ("abc", "ab <s>cab", " cab</s> ab", "a<x>b", "<|end|>ab<tool>c", "ab <y> c", "")


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip("transformers")


def byte_level(*added: AddedToken, template: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(tokenizer_models.BPE({token: i for i, token in enumerate(TOKENS)}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(list(added))
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 92)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2's, converted by transformers 4."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abc", "ab", "▁ab", "▁c"]
    vocab, merges = {piece: i for i, piece in enumerate(pieces)}, [("a", "b"), ("▁", "ab"), ("▁", "c")]
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint without its tokenizer, to be copied."""
    path = tmp_path_factory.mktemp("weights")
    save(path, Pretrained(model=transformer(LLAMA), max_context=128))
    return {file.name: file.read_bytes() for file in path.iterdir()}


def write(path, weights, tokenizer, config, **files):
    for name, contents in weights.items():
        (path / name).write_bytes(contents)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, contents in files.items():
        (path / name.replace("__", ".")).write_text(contents if isinstance(contents, str) else json.dumps(contents))


FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
LLAMA_CLASS = FAST | {"tokenizer_class": "LlamaTokenizerFast", "unk_token": "<unk>"}
EXTRA = {"content": "<x>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False, "special": False}


@pytest.mark.parametrize(
    ("tokenizer", "config", "files"),
    [
        (byte_level(), FAST, {}),
        (byte_level(template=True), FAST, {}),
        (byte_level(), LLAMA_CLASS, {}),
        (byte_level(), FAST | {"split_special_tokens": True}, {}),
        (byte_level(), FAST | {"add_prefix_space": True}, {}),
        (byte_level(), FAST | {"clean_up_tokenization_spaces": True, "model_max_length": 3, "legacy": False}, {}),
        (byte_level(), FAST | {"extra_special_tokens": ["<x>"]}, {}),
        (byte_level(), FAST | {"additional_special_tokens": ["<x>", "<y>"]}, {}),
        (byte_level(), FAST | {"image_token": "<x>"}, {}),
        (byte_level(), FAST | {"pad_token": "<x>"}, {}),
        (byte_level(), FAST | {"added_tokens_decoder": {"94": EXTRA}}, {}),
        (byte_level(AddedToken("<x>")), FAST | {"added_tokens_decoder": {"94": EXTRA}}, {}),
        (
            byte_level(),
            {"tokenizer_class": "PreTrainedTokenizerFast"},
            {"special_tokens_map__json": {"bos_token": "<x>"}},
        ),
        (byte_level(), FAST, {"special_tokens_map__json": {"pad_token": EXTRA | {"special": True}}}),
        (byte_level(), FAST, {"special_tokens_map__json": {"bos_token": "</s>"}}),
        (byte_level(), FAST, {"added_tokens__json": {"<x>": 94}}),
        (sentencepiece(), FAST | {"unk_token": "<unk>"}, {}),
        (sentencepiece(), LLAMA_CLASS, {}),
        (sentencepiece(), LLAMA_CLASS | {"legacy": True}, {}),
        (sentencepiece(), LLAMA_CLASS | {"legacy": False}, {}),
        (sentencepiece(), LLAMA_CLASS | {"legacy": None}, {}),
        (sentencepiece(), LLAMA_CLASS | {"add_prefix_space": False}, {}),
    ],
)
def test_tokens(transformers, tmp_path, weights, tokenizer, config, files):
    write(tmp_path, weights, tokenizer, config, **files)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = open_checkpoint(tmp_path)
    assert ours.tokenizer is not None
    assert ours.special_tokens == theirs.special_tokens_map
    for text in TEXTS:
        assert ours.tokenizer.encode(text).ids == theirs(text).input_ids, text
        assert (
            ours.tokenizer.encode(text, add_special_tokens=False).ids
            == theirs(text, add_special_tokens=False).input_ids
        )


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize(
    "flags",
    [
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": True, "add_eos_token": False},
        {"add_bos_token": True, "bos_token": None},
    ],
)
def test_tokens_around_a_text(transformers, tmp_path, weights, flags, template):
    # Given to their class by hand: its `from_pretrained`, of 5.23, leaves them out where there is a tokenizer.json.
    # That of version 4 did not, nor does llama.cpp's converter.
    config = FAST | flags
    write(tmp_path, weights, byte_level(template=template), config)
    given = {key: value for key, value in config.items() if key != "tokenizer_class"}
    theirs = transformers.TokenizersBackend(tokenizer_file=str(tmp_path / "tokenizer.json"), **given)
    ours = open_checkpoint(tmp_path).tokenizer
    assert ours is not None
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text).input_ids, text
        if text:  # they take an empty second text for none
            assert ours.encode(text, text).ids == theirs(text, text).input_ids


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
LOOP = "{% for i in range(4) %}{% if i == 2 %}{% continue %}{% endif %}{{ 'abc'[i % 3] }}{% endfor %}"
AS_JSON = "{{ {'a': 'é<'} | tojson }}{{ {'a': 'é'} | tojson(ensure_ascii=true, separators=(',', ':')) }}"
SHOWN = (
    "{{ [bos_token, eos_token, unk_token, pad_token, sep_token, tools, documents, add_generation_prompt] | tojson }}"
)


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"chat_template": TEMPLATE}, {}),
        (
            {
                "chat_template": SHOWN,
                "pad_token": "<x>",
                "unk_token": "a",
                "sep_token": {"__type": "AddedToken", "content": "b"},
            },
            {},
        ),
        ({"chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "tools", "template": "b"}]}, {}),
        ({"chat_template": {"default": TEMPLATE, "tools": "b"}}, {}),
        ({"chat_template": "a"}, {"chat_template__jinja": TEMPLATE}),
        ({"chat_template": TEMPLATE, "eos_token": None}, {}),
        ({"chat_template": TEMPLATE, "add_bos_token": True}, {}),
        ({"chat_template": "{% if true %}\n  a\n  {% endif %}\n  {%- set b = 1 %}\nb{{ b }}\n"}, {}),
        (
            {"chat_template": LOOP},
            {},
        ),
        ({"chat_template": "{{ strftime_now('%Y') | length }}{{ messages | tojson(indent=1, sort_keys=true) }}"}, {}),
        ({"chat_template": "{% generation %}{% set a = 1 %}a{% endgeneration %}{{ a is defined }}"}, {}),
        (
            {"chat_template": AS_JSON},
            {},
        ),
        ({"chat_template": "{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ dict(a=1) }}"}, {}),
    ],
)
def test_conversations(transformers, tmp_path, weights, config, files):
    write(tmp_path, weights, byte_level(template=True), FAST | config, **files)
    messages = [{"role": "user", "content": " ab "}, {"role": "assistant", "content": "c"}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat_tokens(open_checkpoint(tmp_path), messages) == expected


def their_logits(torch, transformers, path, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits.numpy()


def rewrite(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (UNTIED, {"tie_word_embeddings": True}),  # with a head of its own: both are kept
        (LLAMA, {}),
        (LLAMA, {"hidden_act": "swish", "pretraining_tp": 2, "attention_dropout": 0.5, "initializer_range": 1.0}),
        (LLAMA, {"rms_norm_eps": ..., "rope_theta": ..., "rope_parameters": ..., "rope_scaling": ...}),
        (LLAMA, {"rope_theta": 77.0, "rope_parameters": ..., "rope_scaling": None}),
        (LLAMA, {"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}, "rope_theta": ...}),
        (LLAMA, {"head_dim": ..., "attention_bias": ..., "mlp_bias": ..., "hidden_act": ..., "architectures": ...}),
        (LLAMA, {"torch_dtype": "bfloat16", "dtype": ..., "use_cache": False, "something_else": 3}),
        (UNTIED, {"num_key_value_heads": ..., "tie_word_embeddings": ...}),
        (UNTIED, {"num_key_value_heads": None, "head_dim": None}),
    ],
)
def test_logits(torch, transformers, tmp_path, config, changes):
    model = transformer(config)
    save(tmp_path, Pretrained(model=model, max_context=128))
    rewrite(tmp_path / "config.json", **changes)
    ids = np.arange(96).reshape(2, 48)
    loaded = load(tmp_path, **SETTINGS).model
    ours = np.asarray(nnx.jit(lambda model, ids: model(ids))(loaded, ids))
    theirs = their_logits(torch, transformers, tmp_path, ids)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-5


def test_a_tied_head_that_is_stored_once_more(torch, transformers, tmp_path):
    model = transformer(LLAMA)
    save(tmp_path, Pretrained(model=model, max_context=128))
    tensors = to_huggingface(model)
    save_safetensors(tmp_path / "model.safetensors", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert load(tmp_path, **SETTINGS).model.config.tie_embeddings
    assert their_logits(torch, transformers, tmp_path, np.zeros((1, 1), int)).shape == (1, 1, 96)


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({}, {"do_sample": True}),
        ({}, {"do_sample": True, "top_k": 0}),
        ({}, {"do_sample": False, "temperature": 0.6, "top_k": 3}),
        ({}, {"temperature": 0.6}),
        ({}, {"eos_token_id": [5, 6], "bos_token_id": 3}),
        ({"eos_token_id": 7}, None),
        ({"eos_token_id": [7, 8], "bos_token_id": 2}, None),
        ({"do_sample": True, "temperature": 0.5}, None),
    ],
)
def test_how_tokens_are_chosen(transformers, tmp_path, weights, config, generation):
    for name, contents in weights.items():
        (tmp_path / name).write_bytes(contents)
    rewrite(tmp_path / "config.json", **config)
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    theirs.update(**theirs._get_default_generation_params(), defaults_only=True)
    ours, ends = open_checkpoint(tmp_path), theirs.eos_token_id
    assert ours.eos_ids == (() if ends is None else (ends,) if isinstance(ends, int) else tuple(ends))
    assert ours.bos_id == theirs.bos_token_id
    sampling = ours.own_sampling()
    if not theirs.do_sample:
        assert sampling.temperature == 0
    else:
        given = (sampling.temperature, sampling.top_k or 0, sampling.top_p)
        assert given == (theirs.temperature, theirs.top_k, theirs.top_p)
