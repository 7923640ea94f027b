"""Checkpoint directories: out and in again, tokenizer and all."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from tokenizers import AddedToken, Tokenizer

from models.checkpoints.gguf_tokenizer import tokenizer_from_gguf
from models.checkpoints.huggingface_weights import to_huggingface
from models.checkpoints.pretrained import Pretrained, load, open_checkpoint, read_tokenizer, save
from models.checkpoints.safetensors import save_safetensors
from s2jax.patterns import BlockMask, FirstBlocks, FirstTokens, Local, LocalStride, Strided
from tests.models.tiny_checkpoints import LLAMA, QWEN3, TOKENIZER, UNTIED, logits, transformer, write_gguf

SETTINGS = {"dtype": "float32", "implementation": "reference"}
TOKENS = tokenizer_from_gguf({f"tokenizer.ggml.{name}": value for name, value in TOKENIZER.items()})


def pretrained(config=LLAMA, **changes):
    filled = {"tokenizer": TOKENS, "eos_ids": (90, 91), "bos_id": 3, "chat_template": "{{ messages }}"}
    return Pretrained(model=transformer(config), max_context=128, **(filled | changes))


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("config", [LLAMA, UNTIED, QWEN3], ids=["llama", "untied", "qwen3"])
def test_round_trip(tmp_path, config):
    original = pretrained(config)
    directory = tmp_path / "new" / "é\udcff"  # as a path in a locale of ASCII, or one that is no UTF-8
    save(directory, original)
    loaded = load(directory, **SETTINGS)
    assert loaded.model.config == config
    np.testing.assert_array_equal(logits(loaded.model), logits(original.model))
    for name in ("max_context", "eos_ids", "bos_id", "chat_template"):
        assert getattr(loaded, name) == getattr(original, name)
    expected = Tokenizer.from_str(TOKENS.to_str())
    expected.add_special_tokens([AddedToken("*", normalized=False)])  # as transformers takes a bos_token
    assert loaded.tokenizer.to_str() == expected.to_str()


def test_a_loaded_model_is_like_a_new_one(tmp_path):
    # Its state has what a new one's has, in place and as arrays: so it can be trained, sharded and saved alike.
    save(tmp_path, pretrained())
    loaded, new = (nnx.state(model) for model in (load(tmp_path, **SETTINGS).model, transformer(LLAMA)))
    assert jax.tree.structure(loaded) == jax.tree.structure(new)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded))


def test_a_model_may_have_neither_tokenizer_nor_special_tokens(tmp_path):
    save(tmp_path, pretrained(tokenizer=None, eos_ids=(), bos_id=None, chat_template=None))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    loaded = load(tmp_path, **SETTINGS)
    assert (loaded.tokenizer, loaded.eos_ids, loaded.bos_id, loaded.chat_template) == (None, (), None, None)


def test_the_pattern_is_the_callers(tmp_path):
    save(tmp_path, pretrained())
    pattern = LocalStride(block_size=16, local_blocks=1, vert_stride=2)
    config = load(tmp_path, pattern, dense_layers=(1,), **SETTINGS).model.config
    assert (config.pattern, config.dense_layers) == (pattern, (1,))


@pytest.mark.parametrize(
    "pattern",
    [LocalStride(16, 1, 2, num_dense_heads=1) | FirstTokens(4), (Local(2, 16) | FirstBlocks(1, 16)) & Strided(16, 3)],
    ids=str,
)
def test_a_saved_model_keeps_its_pattern_and_dense_layers(tmp_path, pattern):
    save(tmp_path, pretrained(dataclasses.replace(LLAMA, pattern=pattern, dense_layers=(1,))))
    assert json.loads((tmp_path / "config.json").read_text())["s2jax"] == {
        "pattern": str(pattern),
        "dense_layers": [1],
    }
    config = load(tmp_path, **SETTINGS).model.config
    assert (config.pattern, config.dense_layers) == (pattern, (1,))
    config = load(tmp_path, Local(4), **SETTINGS).model.config  # the caller's pattern, with the caller's dense layers
    assert (config.pattern, config.dense_layers) == (Local(4), ())
    config = load(tmp_path, dense_layers=(0,), **SETTINGS).model.config
    assert (config.pattern, config.dense_layers) == (pattern, (0,))


def test_a_pattern_without_a_text_is_asked_for(tmp_path):
    pattern = BlockMask(np.tril(np.ones((1, 8, 8), bool)), block_size=16)
    save(tmp_path, pretrained(dataclasses.replace(LLAMA, pattern=pattern)))
    with pytest.raises(ValueError, match=r"cannot be built from its text, .*BlockMask.* --pattern on the command line"):
        load(tmp_path, **SETTINGS)
    assert load(tmp_path, pattern, **SETTINGS).model.config.pattern == pattern


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "an object of pattern and dense_layers as 's2jax', got None"),
        ({"pattern": "Dense()"}, "an object of pattern and dense_layers"),
        ({"pattern": "Dense()", "dense_layers": [], "window": 3}, "an object of pattern and dense_layers"),
        ({"pattern": 3, "dense_layers": []}, "the text of a pattern as 's2jax', got 3"),
        ({"pattern": "Dense()", "dense_layers": [True]}, "a list of layer indices as dense_layers, got"),
        ({"pattern": "Dense()", "dense_layers": 3}, "a list of layer indices as dense_layers, got 3"),
        ({"pattern": "Dense()", "dense_layers": [2]}, "dense_layers must be layer indices from 0 to 1"),
        ({"pattern": "__import__('os')", "dense_layers": []}, "cannot be built from its text"),
        ({"pattern": "x" * 10_000, "dense_layers": []}, "cannot be built from its text"),
    ],
)
def test_a_recorded_pattern_that_is_malformed(tmp_path, entry, message):
    save(tmp_path, pretrained())
    rewrite(tmp_path / "config.json", s2jax=entry)
    with pytest.raises(ValueError, match=message) as raised:
        open_checkpoint(tmp_path, **SETTINGS)
    assert len(str(raised.value)) < 400


def test_from_gguf_to_a_directory(tmp_path):
    write_gguf(tmp_path / "model.gguf", transformer(LLAMA), quantisation="Q8_0")
    original = load(tmp_path / "model.gguf", **SETTINGS)
    save(tmp_path / "directory", original)
    loaded = load(tmp_path / "directory", **SETTINGS)
    np.testing.assert_array_equal(logits(loaded.model), logits(original.model))
    assert loaded.tokenizer.encode("ab <|end|>").ids == original.tokenizer.encode("ab <|end|>").ids
    assert loaded.eos_ids == (90, 91)


def test_shards(tmp_path):
    original = pretrained()
    save(tmp_path, original)
    (tmp_path / "model.safetensors").unlink()
    tensors, weight_map = to_huggingface(original.model), {}
    for i in range(3):
        shard = dict(list(tensors.items())[i::3])
        save_safetensors(tmp_path / f"model-{i}.safetensors", shard)
        weight_map |= dict.fromkeys(shard, f"model-{i}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(logits(load(tmp_path, **SETTINGS).model), logits(original.model))


def test_generation_goes_by_its_own_config(tmp_path):
    save(tmp_path, pretrained(eos_ids=(90,)))
    assert load(tmp_path, **SETTINGS).eos_ids == (90,)
    rewrite(tmp_path / "generation_config.json", eos_token_id=[5, 6])
    assert load(tmp_path, **SETTINGS).eos_ids == (5, 6)
    (tmp_path / "generation_config.json").unlink()
    assert load(tmp_path, **SETTINGS).eos_ids == (90,)


def test_chat_templates(tmp_path):
    save(tmp_path, pretrained())
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    rewrite(tmp_path / "tokenizer_config.json", chat_template=several)
    assert load(tmp_path, **SETTINGS).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("j")
    assert load(tmp_path, **SETTINGS).chat_template == "j"


def test_a_tokenizer_in_place_of_one_that_cannot_be_read(tmp_path):
    metadata = {"tokenizer.ggml.model": "llama"}  # SentencePiece
    write_gguf(tmp_path / "model.gguf", transformer(LLAMA), metadata=metadata)
    with pytest.raises(ValueError, match=r"tokenizer is of the kind 'llama'"):
        load(tmp_path / "model.gguf", **SETTINGS)
    TOKENS.save(str(tmp_path / "tokenizer.json"))
    loaded = load(tmp_path / "model.gguf", tokenizer=tmp_path / "tokenizer.json", **SETTINGS)
    assert loaded.tokenizer.encode("ab").tokens == ["ab"]


def test_a_torn_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(TOKENS.to_str()[:-9])
    with pytest.raises(ValueError, match=r"tokenizer\.json is torn or no JSON"):
        read_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json must have a 'model', which it lacks"):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_an_interrupted_save_is_not_taken_for_whole(tmp_path, monkeypatch):
    save(tmp_path, pretrained())

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("models.checkpoints.pretrained.save_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, pretrained())
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load(tmp_path, **SETTINGS)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    save(tmp_path, pretrained())
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][5] = np.nan
    save_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"model\.norm\.weight must hold finite numbers; 1 of its 64 are NaN"):
        load(tmp_path, **SETTINGS)


@pytest.mark.parametrize("name", ["vocab_size", "rope_theta"])
def test_settings_may_not_contradict_the_checkpoint(tmp_path, name):
    save(tmp_path, pretrained())
    with pytest.raises(TypeError, match=name):
        load(tmp_path, **{name: 7}, **SETTINGS)


def test_no_directory_and_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is missing: expected a GGUF file"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load(tmp_path)


def test_texts_are_neither_cut_nor_filled_up(tmp_path):
    save(tmp_path, pretrained())
    path = tmp_path / "tokenizer.json"
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    filled = {
        "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "'",
    }  # fmt: skip
    rewrite(path, truncation=cut, padding=filled)
    assert read_tokenizer(path).encode("cab " * 5).ids == TOKENS.encode("cab " * 5).ids


def test_the_end_that_the_tokenizer_names(tmp_path):
    save(tmp_path, pretrained())
    assert load(tmp_path, **SETTINGS).end_of_text() == TOKENS.id_to_token(90)  # the first that there is
    save(tmp_path, pretrained(special_tokens={"eos_token": "<tool>"}))
    assert load(tmp_path, **SETTINGS).end_of_text() == "<tool>"
    rewrite(tmp_path / "tokenizer_config.json", eos_token={"content": "<|end|>"})
    assert load(tmp_path, **SETTINGS).end_of_text() == "<|end|>"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"max_position_embeddings": None}, "positive integer as 'max_position_embeddings', got None"),
        ("config.json", {"max_position_embeddings": -3}, "positive integer as 'max_position_embeddings', got -3"),
        ("generation_config.json", {"eos_token_id": [500]}, "must be ids from 0 to 95, the checkpoint has 500"),
        ("generation_config.json", {"eos_token_id": "90"}, "must be ids from 0 to 95, the checkpoint has '90'"),
        ("generation_config.json", {"bos_token_id": -1}, "must be ids from 0 to 95, the checkpoint has -1"),
    ],
)
def test_what_a_checkpoint_cannot_say(tmp_path, file, changes, message):
    save(tmp_path, pretrained())
    rewrite(tmp_path / file, **changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **SETTINGS)


def test_what_generation_leaves_open_config_json_says(tmp_path):
    save(tmp_path, pretrained())
    rewrite(tmp_path / "generation_config.json", eos_token_id=None)
    rewrite(tmp_path / "config.json", eos_token_id=91)
    assert load(tmp_path, **SETTINGS).eos_ids == (91,)
