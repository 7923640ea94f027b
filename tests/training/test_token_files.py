"""Token files: hostile headers and odd arrays are one line, and pickles are never loaded."""

import io
import pickle

import numpy as np
import pytest

from training.corpus import load_corpus

OPTIONS = {"vocab_size": 1000, "text_field": "text", "token_dtype": "uint16", "end_token": None}


class Bomb:
    """Fails the test where it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def header(text: str, version: bytes = b"\1\0", data: bytes = b"\0" * 64) -> bytes:
    size = len(text).to_bytes(2 if version == b"\1\0" else 4, "little")
    return b"\x93NUMPY" + version + size + text.encode() + data


def npz() -> bytes:
    archive = io.BytesIO()
    np.savez(archive, tokens=np.arange(5))
    return archive.getvalue()


def objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Bomb()], object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (npz(), "a ZIP archive, as .npz is"),
        (pickle.dumps(Bomb()), "no such file"),
        (objects(), r"shape \(1,\) of object"),
        (header("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,)}"), "claims 8000000000000 bytes"),
        (
            header("{'descr': '<i8', 'fortran_order': False, 'shape': (1" + "0" * 40 + ",)}"),
            "a header that claims 80000",
        ),
        (header("{'descr': '<i8', 'fortran_order': False, 'shape': (-1,)}"), "claims -8 bytes"),
        (header("{'descr': '<i8', 'fortran_order': False, 'shape': ()}"), r"shape \(\) of int64"),
        (header("{'descr': '<i8', 'fortran_order': False, 'shape': (2.5,)}"), "shape"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (4,)}"), "of float32"),
        (header("{'descr': '|b1', 'fortran_order': False, 'shape': (4,)}"), "of bool"),
        (header("{'descr': '<M8[s]', 'fortran_order': False, 'shape': (4,)}"), "of datetime64"),
        (header("{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (4,)}"), "not one dimension of integers"),
        (header("{'descr': 'nonsense', 'fortran_order': False, 'shape': (4,)}"), "descr"),
        (header("("), "a header that NumPy cannot read|Cannot parse header"),
        (header("(" * 9000), "a header that NumPy cannot read|Cannot parse header"),
        (header("[" * 30_000), "Header info length|header"),
        (header("__import__('os').abort()"), "malformed node"),
        (header("{'shape': (4,)}"), "Header does not contain the correct keys"),
        (header("1", version=b"\7\7"), "version 7.7 of the format"),
        (b"\x93NUMPY", "another|magic|EOF|reading"),
        (b"\x93NUMPY\1\0\xff\xff{", "EOF|reading"),
    ],
)
def test_hostile_arrays_are_one_short_line(tmp_path, content, cause):
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.npy: expected a NumPy array of token ids, got .*({cause})") as raised:
        load_corpus(path, **OPTIONS)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", ["<i8", ">i4", "|u1", "<u2", ">u8"])
def test_every_version_and_integer_is_read(tmp_path, version, dtype):
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, np.asfortranarray(np.arange(7, dtype=dtype)), version)
    (document,) = load_corpus(tmp_path, **OPTIONS).documents
    assert document.read(0, 7).tolist() == list(range(7))


@pytest.mark.parametrize("ids", [[1, -1], [1, 1000], [1, 2**63 - 1], [1, -(2**63)]])
def test_the_place_of_an_id_that_is_none(tmp_path, ids):
    np.save(tmp_path / "a.npy", np.array(ids))
    with pytest.raises(ValueError, match=rf"a.npy: expected token ids from 0 to 999 .* got {ids[1]} at position 1"):
        load_corpus(tmp_path, **OPTIONS)


@pytest.mark.parametrize(("size", "what"), [(0, "1 empty"), (2, "1 of a single token, which predicts nothing")])
@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_files_too_short_to_predict_anything_are_counted(tmp_path, size, what, suffix):
    ids = np.zeros(size // 2, np.uint16)
    np.save(tmp_path / "a.npy", ids) if suffix == ".npy" else ids.tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=f"got none of them: {what} .a{suffix}"):
        load_corpus(tmp_path, **OPTIONS)


@pytest.mark.parametrize(("dtype", "size"), [("uint16", 1), ("uint16", 5), ("uint32", 2), ("uint32", 6)])
def test_whole_tokens(tmp_path, dtype, size):
    (tmp_path / "a.bin").write_bytes(b"\0" * size)
    with pytest.raises(ValueError, match=rf"expected whole {dtype} tokens .*--token-dtype.* got {size} byte"):
        load_corpus(tmp_path, **{**OPTIONS, "token_dtype": dtype})


def test_documents_of_a_single_token_are_counted(tmp_path):
    np.array([1, 1, 5, 1, 1, 7], np.uint16).tofile(tmp_path / "a.bin")
    corpus = load_corpus(tmp_path, **{**OPTIONS, "end_token": 1})
    assert [document.name for document in corpus.documents] == ["a.bin[2:4]"]
    assert str(corpus.left_out) == "4 of a single token, which predicts nothing (a.bin[0:1])"
