"""The header of a GGUF file: metadata, and where its tensors lie. Every count is checked against the file's own size.

Files come from strangers: no count in them is believed before the bytes that it speaks of are known to be there.
Source of the layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

import dataclasses
import os
import struct
from typing import Any

import gguf
import numpy as np
from jaxtyping import UInt8

from models.untrusted import regular_file, shortened

# By the number of a value's type.
_SCALARS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9
_LONGEST_NAME, _MOST_AXES = 65_535, 4


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor as it lies in its file.

    Attributes:
        name: llama.cpp's.
        shape: its axes in the order of NumPy; the file has the last one first.
        kind: how its numbers are stored.
        rows: its bytes, all axes but the last as they are.
    """

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    rows: UInt8[np.ndarray, "... row_bytes"]


def read_gguf(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Returns a file's metadata, as Python values, and its tensors by name, whose bytes are mapped and not read.

    Raises:
        ValueError: in one line, if the file is missing, is no GGUF, is big-endian, or says what cannot be at its size.
    """
    size = regular_file(path)
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path} is no GGUF file: it begins with {magic!r} where b'GGUF' stands in one")
    reader = _Reader(np.memmap(path, np.uint8, "r"))
    try:
        return _contents(reader)
    except BigEndianError as error:
        raise ValueError(f"{path} is big-endian GGUF; supported is little-endian") from error
    except ValueError as error:
        raise ValueError(
            f"{path} is torn at its {size} bytes, or of a newer kind than is known here: {shortened(error)}. "
            "Fetch it again"
        ) from error


class BigEndianError(ValueError):
    """Error of a big-endian file."""


class _Reader:
    """Reads values one after the other, and never beyond the end of the file."""

    def __init__(self, contents: UInt8[np.ndarray, " bytes"]):
        self.contents, self.at = memoryview(contents), 4

    def take(self, count: int, what: str) -> memoryview:
        left = len(self.contents) - self.at
        if count > left:
            raise ValueError(f"{what} needs {count} bytes at byte {self.at}, where {left} are left")
        self.at += count
        return self.contents[self.at - count : self.at]

    def number(self, code: str, what: str) -> int:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def count(self, what: str, least: int) -> int:
        """A number of things, each of which takes at least `least` bytes of the file."""
        count, left = self.number("Q", what), len(self.contents) - self.at
        if count * least > left:
            raise ValueError(f"{what} is {count} at byte {self.at - 8}, where {left} bytes are left")
        return count

    def string(self, what: str, longest: int | None = None) -> str:
        count = self.count(f"the length of {what}", 1)
        if longest is not None and count > longest:
            raise ValueError(
                f"the length of {what} is {count} at byte {self.at - 8}, and at most {longest} are allowed"
            )
        return str(self.take(count, what), "utf-8")

    def value(self, key: str) -> Any:
        kind = self.number("I", "a type")
        if kind == _ARRAY:
            return self.array(key)
        if kind == _STRING:
            return self.string(key)
        return self.scalars(kind, 1, key)[0]

    def array(self, key: str) -> list:
        kind = self.number("I", "a type")
        if kind == _STRING:
            return [self.string(key) for _ in range(self.count(f"the length of {key}", 8))]
        if kind == _ARRAY:
            raise ValueError(f"{key} is an array of arrays, which no model has")
        return self.scalars(kind, self.count(f"the length of {key}", 1), key)

    def scalars(self, kind: int, count: int, key: str) -> list:
        if kind not in _SCALARS:
            raise ValueError(f"{key} has a value of type {kind}, known are 0 to 12")
        dtype = _SCALARS[kind]
        taken = np.frombuffer(self.take(count * dtype.itemsize, key), np.uint8)
        if dtype.kind == "b" and (taken > 1).any():
            raise ValueError(f"{key} is neither true nor false")
        return taken.view(dtype).tolist()


def _contents(reader: _Reader) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    version = reader.number("I", "the version")
    if version & 0xFFFF == 0:
        raise BigEndianError
    if version not in (2, 3):
        raise ValueError(f"it has the version {version}, and 2 and 3 are known")
    # A tensor has a name, a number of axes, a type and an offset; a key has a type and a value.
    num_tensors = reader.count("the number of tensors", 24)
    metadata: dict[str, Any] = {}
    for _ in range(reader.count("the number of keys", 13)):
        key = reader.string("a key", _LONGEST_NAME)
        if key in metadata:
            raise ValueError(f"it has {key} twice")
        metadata[key] = reader.value(key)
    entries = [_entry(reader) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, which is no power of two")
    reader.at += -reader.at % alignment
    tensors: dict[str, GgufTensor] = {}
    end = 0  # of the tensors so far: they lie one after the other, none over another
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise ValueError(f"it has the tensor {name} twice")
        if offset != end:
            raise ValueError(f"the tensor {name} has the offset {offset}, where the one before it ends at {end}")
        tensors[name] = _tensor(reader, name, shape, kind, offset)
        end += -(-tensors[name].rows.size // alignment) * alignment
    return metadata, tensors


def _entry(reader: _Reader) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
    name = reader.string("a tensor's name", _LONGEST_NAME)
    axes = reader.number("I", f"the number of axes of {name}")
    if axes > _MOST_AXES:
        raise ValueError(f"{name} has {axes} axes, at most {_MOST_AXES} are possible")
    sizes = [reader.number("Q", f"the sizes of {name}") for _ in range(axes)]
    kind = gguf.GGMLQuantizationType(reader.number("I", f"the type of {name}"))
    return name, tuple(sizes[::-1]), kind, reader.number("Q", f"the offset of {name}")


def _tensor(
    reader: _Reader, name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, offset: int
) -> GgufTensor:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    *outer, width = shape or (1,)
    if width % block:
        raise ValueError(f"{name} has rows of {width} numbers, which are no whole blocks of {block} of {kind.name}")
    row_bytes, rows = width // block * block_bytes, 1
    for count in outer:
        rows *= count
    begin, left = reader.at + offset, len(reader.contents) - reader.at - offset
    if row_bytes * rows > left:
        raise ValueError(
            f"the tensor {name} needs {row_bytes * rows} bytes at byte {begin}, where {max(0, left)} are left"
        )
    held = np.frombuffer(reader.contents[begin : begin + row_bytes * rows], np.uint8)
    return GgufTensor(name, shape, kind, held.reshape(*outer, row_bytes))
