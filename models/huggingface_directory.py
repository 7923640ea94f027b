"""A checkpoint directory in the Hugging Face format: JSON files, and tensors in one safetensors file or in shards."""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  # teaches NumPy the name bfloat16
import numpy as np
import safetensors

# Narrower ones come with scales of their own.
_DTYPES = ("F64", "F32", "F16", "BF16")


class ShardedTensors(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint directory by name, each read from its file when it is asked for.

    Args:
        directory: holds model.safetensors, or model.safetensors.index.json and the shards that it names.

    Raises:
        ValueError: on a file that is missing, torn or no safetensors, and, on reading a tensor, on one that its shard
            lacks or that is not of dtype float64, float32, float16 or bfloat16.
    """

    def __init__(self, directory: str | os.PathLike):
        directory = pathlib.Path(directory)
        whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
        if whole.exists():
            names = {whole.name: None}
        elif index.exists():
            names = dict.fromkeys(_weight_map(index).values())
        else:
            raise ValueError(
                f"{directory} has neither {whole.name} nor {index.name}; weights in other formats are not read"
            )
        self._shards = {name: _open(directory / name) for name in names}
        if whole.exists():
            self._shard_of = dict.fromkeys(self._shards[whole.name].keys(), whole.name)
        else:
            self._shard_of = _weight_map(index)

    def __getitem__(self, name: str) -> np.ndarray:
        shard = self._shard_of[name]
        try:
            dtype = self._shards[shard].get_slice(name).get_dtype()
            if dtype not in _DTYPES:
                raise ValueError(f"{name} in {shard} has dtype {dtype}; supported are {', '.join(_DTYPES)}")
            return self._shards[shard].get_tensor(name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{name} cannot be read from {shard} ({error}): fetch that file again") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of  # without reading it


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: if the file is missing, torn, or holds something other than an object.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: a checkpoint directory in the Hugging Face format has one") from error
    except ValueError as error:
        raise ValueError(f"{path} is torn or no JSON ({error}): fetch it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} must name the file of each tensor under 'weight_map', which it lacks")
    strays = [file for file in weight_map.values() if not isinstance(file, str) or pathlib.Path(file).name != file]
    if strays:
        raise ValueError(f"{index} must name files beside itself, got {strays[0]!r}")
    return weight_map


def _open(path: pathlib.Path):
    try:
        return safetensors.safe_open(path, framework="numpy")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing, though the checkpoint's index names it: fetch it") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is torn or no safetensors file ({error}): fetch it again") from error
