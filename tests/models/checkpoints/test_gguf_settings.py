"""What the metadata of a GGUF file does, and what is refused: as in llama.cpp, or in one line."""

import struct

import numpy as np
import pytest

from models.checkpoints.gguf_tokenizer import end_ids, tokenizer_from_gguf
from models.checkpoints.huggingface_weights import to_huggingface
from models.checkpoints.pretrained import load, open_checkpoint
from models.sampling import Sampling
from tests.models.tiny_checkpoints import LLAMA, UNTIED, gguf_tensors, transformer, write_gguf

SETTINGS = {"dtype": "float32", "implementation": "reference"}
MODEL = transformer(LLAMA)


def same_parameters(loaded, model):
    loaded, model = to_huggingface(loaded), to_huggingface(model)
    assert loaded.keys() == model.keys()
    for name, tensor in model.items():
        np.testing.assert_array_equal(loaded[name], tensor)


def metadata(*tokens: str, **changes):
    values = {"model": "gpt2", "pre": "smollm", "merges": [], "token_type": [1] * len(tokens), "tokens": list(tokens)}
    return {f"tokenizer.ggml.{name}": value for name, value in (values | changes).items()}


@pytest.mark.parametrize(
    ("tokens", "named", "expected"),
    [
        (("a", "<|end_of_text|>", "<|eot_id|>"), {"eos_token_id": 1}, (1, 2)),
        (("a", "<|im_end|>", "<|endoftext|>"), {}, (1, 2)),
        (("a", "b", "<end_of_turn>"), {"eos_token_id": 1, "eot_token_id": 2, "eom_token_id": 0}, (1, 2, 0)),
        (("<|return|>", "<|call|>", "<|end|>"), {}, (0, 1)),
        (("<|tool_response>", "</s>"), {}, (0,)),
        (("<|fim_pad|>", "<PAD>", "<|file_sep|>"), {}, (0, 2)),
        (("<|fim_pad|>", "a"), {"fim_pad_token_id": 1}, (1,)),
        (("<|endoftext|>", "<|im_end|>", "<|file_sep|>", "b"), {"eot_token_id": 3}, (3, 1, 0, 2)),
        (("a", "b"), {}, ()),
    ],
)
def test_the_ends_that_llama_cpp_finds(tokens, named, expected):
    assert end_ids(metadata(*tokens, **{f"{name}": value for name, value in named.items()})) == expected


def test_an_end_of_a_turn_is_a_control_token():
    tokenizer = tokenizer_from_gguf(metadata(*"abd<|>_iot", "<|eot_id|>", eos_token_id=0))
    assert tokenizer.encode("a<|eot_id|>").ids == [0, 10]
    assert tokenizer.decode([1, 10]) == "b"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"add_bos_token": True, "bos_token_id": 1}, [1, 0]),
        ({"add_eos_token": True, "eos_token_id": 1}, [0, 1]),
        ({"add_space_prefix": True, "scores": [0.0] * 2}, [0]),
    ],
)
def test_flags_of_a_gguf_tokenizer(flags, expected):
    assert tokenizer_from_gguf(metadata("a", "b", **flags)).encode("a").ids == expected


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"add_bos_token": 1}, "add_bos_token must be true or false, got 1"),
        ({"add_sep_token": True}, "the setting 'tokenizer.ggml.add_sep_token', which is not supported"),
        ({"normalizer": "x"}, "the setting 'tokenizer.ggml.normalizer', which is not supported"),
        ({"eos_token_id": "x"}, "must be ids from 0 on, the file has 'x'"),
        ({"tokens": [1, 2]}, r"tokens must be a list of texts, got \[1, 2\]"),
    ],
)
def test_settings_of_a_gguf_tokenizer_that_are_refused(setting, match):
    with pytest.raises(ValueError, match=match):
        tokenizer_from_gguf(metadata("a", "b", **setting))


def write_split(path, count=3, missing=()):
    """A file in parts, as llama-gguf-split makes them; returns the first."""
    from tests.models import tiny_checkpoints

    model = transformer(UNTIED)
    whole = gguf_tensors(model)
    for part in set(range(count)) - set(missing):
        own = dict(list(whole.items())[part::count])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny_checkpoints, "gguf_tensors", lambda _, own=own: own)
            numbers = {"split.no": part, "split.count": count, "split.tensors.count": len(whole)}
            write_gguf(path / f"a-{part + 1:05}-of-{count:05}.gguf", model, metadata=numbers)
    return model, path / f"a-00001-of-{count:05}.gguf"


def test_a_split_file_is_read_from_all_of_its_parts(tmp_path):
    model, path = write_split(tmp_path)
    loaded = load(path, **SETTINGS).model
    assert not loaded.config.tie_embeddings
    same_parameters(loaded, model)
    second = path.with_name("a-00002-of-00003.gguf")
    with pytest.raises(ValueError, match=r"part 2 of 3 of a split file: give the first, a-00001-of-00003\.gguf"):
        open_checkpoint(second)
    path.rename(tmp_path / "b.gguf")
    with pytest.raises(ValueError, match=r"must be named so: NAME-00001-of-00003\.gguf"):
        open_checkpoint(tmp_path / "b.gguf")
    (tmp_path / "b.gguf").rename(path)
    second.write_bytes(path.with_name("a-00003-of-00003.gguf").read_bytes())
    with pytest.raises(ValueError, match=r"says that it is another part than 2 of 3"):
        open_checkpoint(path)
    second.unlink()
    with pytest.raises(ValueError, match=r"a-00002-of-00003\.gguf is missing, part 2 of 3"):
        open_checkpoint(path)


def header(*, tensors=0, keys=b"", num_keys=1):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, num_keys) + keys


def key(kind: int, *rest: bytes) -> bytes:
    return struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + b"".join(rest)


@pytest.mark.parametrize(
    "contents",
    [
        header(tensors=2**40),
        header(num_keys=2**63),
        header(keys=key(9, struct.pack("<IQ", 4, 2**40), bytes(50))),
        header(keys=key(9, struct.pack("<IQ", 8, 2**40), bytes(50))),
        header(keys=key(9, *[struct.pack("<IQ", 9, 1)] * 5_000)),
        header(keys=key(8, struct.pack("<Q", 2**62))),
        header(keys=struct.pack("<Q", 2**40)),
        header(keys=key(77)),
        header(keys=key(4, bytes(4)) * 2, num_keys=2),
        header(num_keys=0, tensors=1, keys=struct.pack("<Q1sI", 1, b"t", 2**31) + bytes(60)),
        header(num_keys=0, tensors=1, keys=struct.pack("<Q1sIQQIQ", 1, b"t", 2, 2**62, 2**62, 0, 0) + bytes(60)),
        header(num_keys=0, tensors=1, keys=struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 2**63) + bytes(60)),
    ],
)
def test_counts_of_a_gguf_file_are_bounded_by_its_size(tmp_path, contents):
    path = tmp_path / "a.gguf"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=r"a\.gguf is torn at its \d+ bytes") as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_gguf_file_of_a_billion_layers_is_refused(tmp_path):
    write_gguf(tmp_path / "a.gguf", MODEL, metadata={"llama.block_count": 10**9})
    with pytest.raises(ValueError, match=r"missing are .* \(8999999982 in all\)"):
        open_checkpoint(tmp_path / "a.gguf")
    for changes in ({"general.type": "adapter"}, {"llama.rope.freq_base": float("nan")}):
        write_gguf(tmp_path / "a.gguf", MODEL, metadata=changes)
        with pytest.raises(ValueError, match=r"of the type 'adapter'|must be a positive number, got nan"):
            open_checkpoint(tmp_path / "a.gguf")


def test_the_sampling_of_a_gguf_file(tmp_path):
    sampling = {"general.sampling.temp": 0.5, "general.sampling.top_k": 7, "general.sampling.top_p": 0.75}
    write_gguf(tmp_path / "a.gguf", MODEL, metadata=sampling)
    assert open_checkpoint(tmp_path / "a.gguf").own_sampling() == Sampling(0.5, 7, 0.75)
    write_gguf(tmp_path / "a.gguf", MODEL, metadata={"general.sampling.penalty_repeat": 1.5})
    with pytest.raises(ValueError, match=r"general\.sampling\.penalty_repeat=1\.5, which is not supported"):
        open_checkpoint(tmp_path / "a.gguf").own_sampling()
