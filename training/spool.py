"""Temporary copies of records that have no random access of their own."""

from __future__ import annotations

import os
import tempfile
import weakref


class Spool:
    """A temporary file without a name, in TMPDIR; made when something is added, gone when nobody refers to it."""

    def __init__(self):
        self._descriptor: int | None = None
        self._size = 0

    def add(self, content: bytes) -> int:
        """Appends bytes.

        Returns:
            Their offset.

        Raises:
            ValueError: there is no room for them.
        """
        offset, view = self._size, memoryview(content)
        try:
            if self._descriptor is None:
                self._descriptor, path = tempfile.mkstemp(prefix="s2jax-")
                os.unlink(path)
                weakref.finalize(self, os.close, self._descriptor)
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            raise ValueError(
                f"--data: expected room for a copy of the texts in {tempfile.gettempdir()} (TMPDIR), got {error}"
            ) from error
        self._size += len(content)
        return offset

    def read(self, offset: int, count: int) -> bytes:
        """Reads `count` bytes that were added; threads may read at once."""
        return b"" if self._descriptor is None else os.pread(self._descriptor, count, offset)
