"""Token files: `.npy` arrays and `.bin` files of raw ids, mapped into memory."""

from __future__ import annotations

import tokenize
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from s2jax.messages import counted
from training.documents import TokenDocument
from training.file_listing import suffix_of
from training.left_out import LeftOut, shown, shown_error, shown_path

TOKEN_SUFFIXES = (".npy", ".bin")
_SCAN = 1 << 24  # tokens looked at together while a token file is checked


def token_documents(
    tokens: Integer[np.ndarray, " n"], path: Path, name: str, vocab_size: int, end_token: int | None, left_out: LeftOut
) -> list[TokenDocument]:
    """Cuts an array of token ids after each `end_token`.

    Raises:
        ValueError: an id is no token of the vocabulary; names its position.
    """
    ends: list[np.ndarray] = []
    for start in range(0, tokens.size, _SCAN):
        chunk = tokens[start : start + _SCAN]
        check_ids(chunk, vocab_size, shown_path(path), start)
        if end_token is not None:
            ends.append(np.flatnonzero(chunk == end_token) + start + 1)
    stops = np.unique(np.concatenate([*ends, [tokens.size]])).astype(int).tolist()
    starts = [0, *stops[:-1]]
    documents = []
    for start, stop in zip(starts, stops, strict=True):
        if stop - start > 1:
            documents.append(TokenDocument(f"{name}[{start}:{stop}]", tokens, start, stop))
        else:
            short = "empty" if start == stop else "of a single token, which predicts nothing"
            left_out.add(short, f"{name}[{start}:{stop}]")
    return documents


def check_ids(ids: Integer[np.ndarray, " n"], vocab_size: int, where: str, first: int = 0) -> None:
    """Raises ValueError where an id is no token of the vocabulary.

    Args:
        ids: some of the ids.
        vocab_size: of the model.
        where: file, and record of it.
        first: position of `ids[0]`.
    """
    if ids.size and (ids.max() >= vocab_size or ids.min() < 0):
        place = int(np.flatnonzero((ids >= vocab_size) | (ids < 0))[0])
        raise ValueError(
            f"{where}: expected token ids from 0 to {vocab_size - 1} (the vocabulary is {vocab_size}), "
            f"got {ids[place]} at position {first + place}"
        )


def map_tokens(path: Path, dtype: str) -> Integer[np.ndarray, " n"]:
    """Maps a token file.

    Raises:
        ValueError: it holds no whole ids, no array, or one of another shape or type. Pickles are never loaded.
    """
    size = path.stat().st_size
    if suffix_of(path) == ".bin":
        if size % np.dtype(dtype).itemsize:
            raise ValueError(
                f"{shown_path(path)}: expected whole {dtype} tokens of {np.dtype(dtype).itemsize} bytes "
                f"(--token-dtype), got {counted(size, 'byte')}"
            )
        return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)
    return _map_array(path)


def _map_array(path: Path) -> Integer[np.ndarray, " n"]:
    with path.open("rb") as file:
        magic = file.read(6)
    if not magic:
        return np.empty(0, np.int64)
    if magic != b"\x93NUMPY":
        kind = (
            "a ZIP archive, as .npz is; save the array alone with numpy.save" if magic[:2] == b"PK" else "no such file"
        )
        raise ValueError(f"{shown_path(path)}: expected a NumPy array of token ids, got {kind}")
    try:
        shape, dtype = _header(path)
        if len(shape) != 1 or dtype.kind not in "iu":
            raise ValueError(f"shape {shown(shape, 40)} of {shown(dtype, 40)}, not one dimension of integers")
        return np.lib.format.open_memmap(path, "r") if shape[0] else np.empty(0, dtype)
    except (ValueError, TypeError, OverflowError, EOFError) as error:
        got = shown_error(error)
        raise ValueError(f"{shown_path(path)}: expected a NumPy array of token ids, got {got}") from error
    except (SyntaxError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError(
            f"{shown_path(path)}: expected a NumPy array of token ids, got a header that NumPy cannot read"
        ) from error


def _header(path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type that the header claims; the file's own size bounds the former."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"version {version[0]}.{version[1]} of the format")
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:  # 3.0 differs from 2.0 in the encoding of field names alone, and integers have none
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        claimed, held = dtype.itemsize, path.stat().st_size - file.tell()
    for length in shape:
        claimed *= length
    if dtype.kind in "iu" and not 0 <= claimed <= held:
        raise ValueError(f"a header that claims {shown(claimed, 30)} bytes of ids where there are {held}")
    return shape, dtype
