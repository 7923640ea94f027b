"""Tensors in one safetensors file or in shards; files that are missing or torn."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoints.safetensors import ShardedTensors, save_safetensors
from models.untrusted import read_json

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(jnp.bfloat16),
    "c": np.ones((2, 2), np.float16),
}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    save_safetensors(tmp_path / FIRST, {"a": TENSORS["a"], "c": TENSORS["c"]})
    save_safetensors(tmp_path / SECOND, {"b": TENSORS["b"]})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": FIRST, "b": SECOND, "c": FIRST}}))
    return tmp_path


@pytest.fixture
def single(tmp_path):
    save_safetensors(tmp_path / "model.safetensors", TENSORS)
    return tmp_path


def refused(directory, match, name="a"):
    with pytest.raises(ValueError, match=match) as caught:
        ShardedTensors(directory)[name]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["sharded", "single"])
def test_tensors_by_name(layout, request):
    tensors = ShardedTensors(request.getfixturevalue(layout))
    assert (set(tensors), len(tensors), "b" in tensors, "d" in tensors) == ({"a", "b", "c"}, 3, True, False)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(tensors[name], tensor)


def test_the_whole_file_goes_before_the_index(sharded):
    save_safetensors(sharded / "model.safetensors", {"a": TENSORS["a"]})
    assert set(ShardedTensors(sharded)) == {"a"}


def test_missing_files_are_named(sharded):
    (sharded / SECOND).unlink()
    refused(sharded, rf"{SECOND} is missing, though the checkpoint's index names it")
    (sharded / INDEX).unlink()
    refused(sharded, r"has neither model\.safetensors nor model\.safetensors\.index\.json")


@pytest.mark.parametrize("end", [0, 4, 40, -3])
def test_a_torn_file_is_named(single, end):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:end])
    refused(single, r"model\.safetensors is torn or no safetensors file .*: fetch it again")


def test_a_tensor_that_its_shard_lacks_is_named(sharded):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": FIRST, "b": FIRST}}))
    refused(sharded, rf"b cannot be read from {FIRST}", name="b")


def test_an_unsupported_dtype_is_refused(tmp_path):
    save_safetensors(tmp_path / "model.safetensors", {"a": np.ones(3, jnp.float8_e4m3fn)})
    refused(tmp_path, r"a in model\.safetensors has dtype F8_E4M3; supported are F64, F32, F16, BF16", name="a")


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ('{"weight_map": {"a": "x', r"index\.json is torn or no JSON"),
        ("[1]", r"index\.json must hold a JSON object, got list"),
        ("{}", r"must name the file of each tensor under 'weight_map'"),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"must name files beside itself, got '\.\./x\.safetensors'"),
        ('{"weight_map": {"a": 3}}', r"must name files beside itself, got 3"),
    ],
)
def test_a_bad_index_is_refused(tmp_path, index, match):
    (tmp_path / INDEX).write_text(index)
    refused(tmp_path, match)


def test_read_json_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"config\.json is torn or no UTF-8"):
        read_json(tmp_path / "config.json")
