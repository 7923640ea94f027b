"""Jane Austen's novels as long real text, from Debian's package r-cran-janeaustenr, fetched with apt-get.

    python -m experiments.novels          # prints their titles and lengths

In the package every novel is a serialized R vector of lines.
"""

import functools
import os
import pathlib
import struct
import subprocess
import tempfile
import zlib

PACKAGE = "r-cran-janeaustenr"
DATA = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
LINES, LINE = b"\0\0\0\x10", 0x09
"""R's marks of a vector of strings and, in the lowest byte, of a string."""


@functools.cache
def novels() -> dict[str, str]:
    """The six novels by title, with the line breaks of the print.

    Raises:
        ConnectionError: apt-get cannot fetch the package, with its last line.
    """
    data, found = _fetched().read_bytes(), {}
    while data:
        # An entry is its uncompressed length in four bytes, then its compressed data.
        unpacking = zlib.decompressobj()
        lines = _lines(unpacking.decompress(data[4:]))
        found[next(filter(None, lines)).title()] = "\n".join(lines)
        data = unpacking.unused_data
    return found


def _lines(serialized: bytes) -> list[str]:
    at = serialized.index(LINES) + len(LINES)
    (count,) = struct.unpack_from(">i", serialized, at)
    at, lines = at + 4, []
    for _ in range(count):
        kind, length = struct.unpack_from(">Ii", serialized, at)
        if kind & 0xFF != LINE:
            raise ValueError(f"{PACKAGE} must hold vectors of strings, found R's type {kind & 0xFF}")
        at += 8 + max(length, 0)
        lines.append(serialized[at - max(length, 0) : at].decode())
    return lines


def _fetched() -> pathlib.Path:
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "s2jax"
    path = cache / "janeaustenr.rdb"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        got = subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, capture_output=True, text=True, check=False)
        packages = list(pathlib.Path(folder).glob("*.deb"))
        if got.returncode or not packages:
            lines = got.stderr.strip().splitlines() or ["it said nothing"]
            raise ConnectionError(
                f"apt-get could not download {PACKAGE} ({lines[-1]}): Debian or Ubuntu is needed, once"
            )
        subprocess.run(["dpkg-deb", "-x", str(packages[0]), folder], check=True)
        (pathlib.Path(folder) / DATA).replace(path)
    return path


if __name__ == "__main__":
    for title, text in novels().items():
        print(f"{title}: {len(text)} characters")
