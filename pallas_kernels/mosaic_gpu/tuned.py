"""Tiles that were measured best, from `tuned.json` beside this file; where there is none, nothing was measured.

`python -m benchmarks.tile_search` writes it.
"""

import functools
import json
import pathlib

PATH = pathlib.Path(__file__).parent / "tuned.json"

Key = tuple[int, int, int, int]
"""Head dim, value dim, block size, and the most heads that a tile can have."""


@functools.cache
def tuned_configs(path: pathlib.Path | None = None) -> dict[Key, tuple[int, int, int]]:
    """Heads, keys and stages of the tiles to take.

    Raises:
      ValueError: the file is there and cannot be read.
    """
    path = path or PATH
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())["rows"]
        return {
            (entry["head_dim"], entry["value_dim"], entry["block_size"], entry["most_heads"]): (
                entry["config"]["heads_per_tile"], entry["config"]["block_kv"], entry["config"]["num_stages"]
            )
            for entry in entries
        }  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected tiles as benchmarks/tile_search.py writes them in {path}: {error!r}") from error
