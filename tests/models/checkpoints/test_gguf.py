"""GGUF files: names, the order of rows, quantisation, hyperparameters; what is refused, in one line."""

import dataclasses

import gguf
import numpy as np
import pytest

from models.checkpoints.gguf import GgufFile
from models.checkpoints.huggingface_weights import to_huggingface
from models.checkpoints.pretrained import load
from s2jax.patterns import LocalStride
from s2jax.rotary import RopeScaling
from tests.models.tiny_checkpoints import LLAMA, QWEN3, UNTIED, gguf_tensors, logits, transformer, write_gguf

SETTINGS = {"dtype": "float32", "implementation": "reference"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    write_gguf(path, transformer(LLAMA))
    return path


def refused(path, match, **contents):
    """That loading what is written to `path` fails with one line, which matches."""
    if contents:
        write_gguf(path, transformer(LLAMA), **contents)
    with pytest.raises(ValueError, match=match) as caught:
        load(path, **SETTINGS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [LLAMA, UNTIED, QWEN3], ids=["llama", "untied", "qwen3"])
def test_the_model_is_the_one_that_was_written(tmp_path, config):
    model = transformer(config)
    write_gguf(tmp_path / "model.gguf", model)
    pretrained = load(tmp_path / "model.gguf", **SETTINGS)
    loaded = pretrained.model
    assert dataclasses.replace(loaded.config, norm_eps=config.norm_eps) == config
    assert loaded.config.norm_eps == pytest.approx(config.norm_eps)
    np.testing.assert_allclose(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
    assert (pretrained.max_context, pretrained.eos_ids, pretrained.bos_id) == (128, (90, 91), None)
    assert pretrained.chat_template == "{{ messages }}"


def test_the_order_of_rows_shows_in_the_logits(tmp_path):
    # Else the test above would pass with any order.
    model = transformer(LLAMA)
    plain = to_huggingface(model)["model.layers.0.self_attn.k_proj.weight"]
    write_gguf(tmp_path / "model.gguf", model, tensors={"blk.0.attn_k.weight": plain})
    assert np.abs(logits(load(tmp_path / "model.gguf", **SETTINGS).model) - logits(model)).max() > 1e-3


def test_the_pattern_is_the_callers(whole):
    pattern = LocalStride(block_size=16, local_blocks=1, vert_stride=2)
    config = load(whole, pattern, dense_layers=(1,), **SETTINGS).model.config
    assert (config.pattern, config.dense_layers) == (pattern, (1,))


@pytest.mark.parametrize(("quantisation", "bits"), [("F16", 11), ("BF16", 8), ("Q8_0", 7), ("Q5_1", 5), ("Q4_1", 4)])
def test_quantised_matrices_come_back(tmp_path, quantisation, bits):
    model = transformer(LLAMA)
    write_gguf(tmp_path / "model.gguf", model, quantisation=quantisation)
    file, original = GgufFile(tmp_path / "model.gguf"), to_huggingface(model)
    assert file.keys() == original.keys()
    for name, tensor in original.items():
        assert file[name].dtype == np.float32
        error = np.abs(file[name] - tensor).max() / np.abs(tensor).max()
        assert error < 1.2 * 0.5**bits
        assert (error > 0) == (name.startswith("model.layers") and tensor.ndim == 2), name


def test_hyperparameters_that_a_file_may_leave_out(tmp_path):
    config = dataclasses.replace(UNTIED, head_dim=16)
    names = ("head_count_kv", "key_length", "value_length")
    absent = {f"llama.attention.{name}": None for name in names} | {"llama.rope.freq_base": None}
    write_gguf(tmp_path / "model.gguf", transformer(config), metadata=absent)
    loaded = load(tmp_path / "model.gguf", **SETTINGS).model.config
    assert (loaded.num_kv_heads, loaded.head_dim, loaded.rope_theta) == (4, 16, 10_000.0)


def test_the_scaled_rotary_positions_of_llama_3(tmp_path):
    config = dataclasses.replace(LLAMA, rope_theta=500_000.0, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192))
    wavelengths = 2 * np.pi * 500_000.0 ** (np.arange(8) / 8)
    turns = 8192 / wavelengths  # within the length of the first training
    between = 1 / ((4 - turns) / 3 / 32 + (turns - 1) / 3)
    factors = np.select([turns > 4, turns < 1], [1, 32], between).astype(np.float32)
    assert len({*factors.tolist()}) > 2
    model = transformer(config)
    write_gguf(tmp_path / "model.gguf", model, tensors={"rope_freqs.weight": factors})
    loaded = load(tmp_path / "model.gguf", **SETTINGS).model
    assert loaded.config == dataclasses.replace(config, norm_eps=loaded.config.norm_eps)
    np.testing.assert_allclose(logits(loaded), logits(model), atol=1e-5)
    match = "rope_freqs.weight scales the rotary positions in another way than Llama 3.1 with a factor of 8, which"
    refused(tmp_path / "other.gguf", match, tensors={"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)})


def test_a_vocabulary_may_have_more_rows_than_tokens(whole):
    pretrained = load(whole, **SETTINGS)
    assert pretrained.tokenizer is not None
    assert (pretrained.model.config.vocab_size, pretrained.tokenizer.get_vocab_size()) == (96, 92)


def test_a_torn_file_is_refused_wherever_it_ends(whole, tmp_path):
    contents = whole.read_bytes()
    header = contents.index(b"token_embd.weight")
    ends = [*range(0, 64, 3), *range(64, header, 211), header + 20, header + 300, len(contents) // 2, len(contents) - 1]
    for end in ends:
        (tmp_path / "torn.gguf").write_bytes(contents[:end])
        refused(tmp_path / "torn.gguf", r"torn\.gguf is (torn|no GGUF file)")


def test_what_is_no_gguf_file_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 a zip file")
    refused(tmp_path / "x.gguf", r"x\.gguf is no GGUF file: it begins with b'PK.*' where b'GGUF' stands")
    refused(tmp_path / "nowhere.gguf", r"nowhere\.gguf is missing: expected a GGUF file")
    write_gguf(tmp_path / "big.gguf", transformer(LLAMA), endianess=gguf.GGUFEndian.BIG)
    refused(tmp_path / "big.gguf", r"big-endian")


def test_a_quantisation_of_the_future_is_refused(whole, tmp_path):
    contents = bytearray(whole.read_bytes())
    kind = contents.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 2 * 8  # after the sizes
    contents[kind : kind + 4] = (99).to_bytes(4, "little")
    (tmp_path / "new.gguf").write_bytes(contents)
    refused(tmp_path / "new.gguf", r"of a newer kind than is known here: 99 is not a valid GGML")


@pytest.mark.parametrize("offset", [0, 4, 1 << 20, (1 << 64) - 32])
def test_tensors_that_lie_over_others_or_leave_gaps_are_refused(whole, tmp_path, offset):
    contents = bytearray(whole.read_bytes())
    place = contents.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 2 * 8 + 4  # after the type
    contents[place : place + 8] = offset.to_bytes(8, "little")
    (tmp_path / "moved.gguf").write_bytes(contents)
    refused(tmp_path / "moved.gguf", rf"attn_q.weight has the offset {offset}, where the one before it ends at ")


def test_a_quantisation_that_cannot_be_undone_is_refused(tmp_path):
    match = r"output\.weight has the quantisation I8, which the package gguf .* cannot undo; take a file with another"
    refused(tmp_path / "integers.gguf", match, tensors={"output.weight": np.zeros((96, 64), np.int8)})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    tensor = gguf_tensors(transformer(LLAMA))["blk.1.ffn_up.weight"].copy()
    tensor[3, 4:6] = value
    match = r"model\.layers\.1\.mlp\.up_proj\.weight must hold finite numbers; 2 of its 6144 are NaN or infinite"
    refused(tmp_path / "nan.gguf", match, tensors={"blk.1.ffn_up.weight": tensor})


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn', which may change"),
        ({"llama.rope.scaling.factor": 8.0}, "llama.rope.scaling.factor=8.0"),
        ({"llama.expert_count": 8}, "llama.expert_count=8"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale=0.5"),
        ({"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window=4096"),
        ({"llama.attention.head_count_kv": [2, 4]}, r"head_count_kv must be one positive integer.*\[2, 4\]"),
        ({"llama.attention.value_length": 32}, "value_length must be the width of a head, 16, got 32"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count must be the width of a head, 16, got 8"),
        ({"llama.block_count": None}, "lacks llama.block_count"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "lacks llama.attention.layer_norm_rms_epsilon"),
        ({"llama.block_count": 3}, r"missing are \['model.layers.2"),
        ({"llama.feed_forward_length": 64}, r"must have shape \[64, 64\] for this config, got \[64, 96\]"),
    ],
)
def test_hyperparameters_that_the_model_cannot_follow_are_refused(tmp_path, metadata, match):
    refused(tmp_path / "model.gguf", match, metadata=metadata)


def test_hyperparameters_without_effect_are_taken(tmp_path):
    metadata = {"llama.rope.scaling.type": "none", "llama.expert_count": 0, "llama.vocab_size": 96}
    write_gguf(tmp_path / "model.gguf", transformer(LLAMA), metadata=metadata)
    assert load(tmp_path / "model.gguf", **SETTINGS).model.config.vocab_size == 96


def test_another_architecture_is_refused(tmp_path):
    match = r"has the architecture 'gemma2'; supported are llama, qwen3"
    refused(tmp_path / "model.gguf", match, architecture="gemma2")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("blk.0.attn_q.bias", r"blk\.0\.attn_q\.bias, for which the model here has no use"),
        ("blk.0.ffn_gate_exps.weight", r"ffn_gate_exps"),
    ],
)
def test_tensors_that_the_model_has_no_use_for_are_refused(tmp_path, name, match):
    refused(tmp_path / "model.gguf", match, tensors={name: np.ones(8, np.float32)})


def test_a_vocabulary_without_a_model_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "llama")
    for key in ("attention.head_count", "embedding_length"):
        writer.add_uint32(f"llama.{key}", 4)
    writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "vocab.gguf", "no tensor token_embd.weight")
