"""Tensors of a checkpoint directory: one safetensors file, or shards and their index."""

import os
import pathlib
from collections.abc import Iterator, Mapping

import ml_dtypes  # noqa: F401  # teaches NumPy the name bfloat16
import numpy as np
import safetensors.numpy

from models.untrusted import quoted, read_json, regular_file, shortened

_ROWS = 4096  # compared at a time
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
        try:
            return self._slice(name)[...]
        except safetensors.SafetensorError as error:
            raise _unreadable(name, self._shard_of[name], error) from error

    def _slice(self, name: str):
        """A tensor of a dtype that is supported, before it is read."""
        shard = self._shard_of[name]
        part = self._shards[shard].get_slice(name)
        if part.get_dtype() not in _DTYPES:
            raise ValueError(
                f"{shortened(name)} in {shard} has dtype {part.get_dtype()}; supported are {', '.join(_DTYPES)}"
            )
        return part

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of  # without reading it

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, without reading it."""
        shapes = {}
        for name, shard in self._shard_of.items():
            try:
                shapes[name] = tuple(self._shards[shard].get_slice(name).get_shape())
            except safetensors.SafetensorError as error:
                raise _unreadable(name, shard, error) from error
        return shapes

    def equal(self, name: str, other: str) -> bool:
        """True if two tensors hold the same numbers; they are read a part at a time."""
        one, two = self._slice(name), self._slice(other)
        if one.get_shape() != two.get_shape():
            return False
        rows = one.get_shape()[0] if one.get_shape() else 0
        parts = (slice(at, min(at + _ROWS, rows)) for at in range(0, rows, _ROWS))
        return all(np.array_equal(one[part], two[part]) for part in parts)


def save_safetensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors to one safetensors file."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(contiguous, path, metadata={"format": "pt"})


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} must name the file of each tensor under 'weight_map', which it lacks")
    strays = [file for file in weight_map.values() if not isinstance(file, str) or not _is_name(file)]
    if strays:
        raise ValueError(f"{index} must name files beside itself, got {quoted(strays[0])}")
    return weight_map


def _is_name(file: str) -> bool:
    return pathlib.Path(file).name == file and file not in ("", "..") and file.isprintable() and len(file) < 256


def _unreadable(name: str, shard: str, error: Exception) -> ValueError:
    return ValueError(f"{shortened(name)} cannot be read from {shard} ({shortened(error)}): fetch that file again")


def _open(path: pathlib.Path):
    try:
        regular_file(path)
        return safetensors.safe_open(path, framework="numpy")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing, though the checkpoint's index names it: fetch it") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is torn or no safetensors file ({shortened(error)}): fetch it again") from error
