"""Pictures of patterns: text for a terminal, or drawings by matplotlib as PNG or SVG.

python -m s2jax.plotting                                    # draws the README's picture
python -m s2jax.plotting "LocalStride(64, 4, 8) | FirstTokens(4)" --heads 8 --length 4096 --out mine.svg
python -m s2jax.plotting "Ranges(((2, 1), (None, 3)))" --heads 3 --text
"""

import argparse
import io
import pathlib
import sys
import typing
import warnings

import numpy as np

from s2jax.messages import counted
from s2jax.patterns import HeadGroups, Pattern, PatternLike, PatternWarning, as_pattern, parse_pattern, statistics
from s2jax.patterns.agreement import checked_heads
from s2jax.patterns.evaluation import outside_traces

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PANELS = 8
"""Heads that have panels of their own; the union counts all heads."""

SAMPLES = 8
"""Query blocks evaluated for each cell, if a cell stands for more."""


class Panel(typing.NamedTuple):
    """The cells that equal heads read, or all heads together."""

    title: str
    share: np.ndarray  # float [cells, cells]: the share of a cell's visible part that is read; NaN: nothing is visible
    total: float  # the share of all that is visible


@outside_traces
def panels(pattern: Pattern, heads: HeadGroups, length: int, cells: int) -> list[Panel]:
    """A panel for each distinct head, and one for all heads together."""
    n = statistics.num_blocks(pattern, length)
    rows = np.arange(n)
    if n > cells * SAMPLES:
        rows = np.linspace(0, n - 1, cells * SAMPLES).astype(int)
    visible = np.broadcast_to((rows[:, None] >= np.arange(n)) | (not pattern.causal), (len(rows), n))

    def panel(title: str, read: np.ndarray) -> Panel:
        return Panel(title, _share(read, visible, rows, cells), read.sum() / visible.sum())

    found, union = [], np.zeros(visible.shape, bool)
    for key, head in statistics.distinct(pattern, heads, range(heads.num_heads)).items():
        read = statistics.rows_read(pattern, heads, head, rows, length)
        union |= read
        same = [other for other in range(heads.num_heads) if pattern.head_key(heads, other) == key]
        found.append(panel(_head_title(same), read))
    return [*found, panel("all heads together", union)]


def visible_panels(drawn: list[Panel]) -> list[int]:
    """Indices of the panels that are drawn: a single distinct head is the union already."""
    last = len(drawn) - 1
    return [*(range(min(last, MOST_PANELS)) if last > 1 else ()), last]


def _head_title(heads: list[int]) -> str:
    if len(heads) == 1:
        return f"head {heads[0]}"
    if heads == list(range(heads[0], heads[-1] + 1)):
        return f"heads {heads[0]}–{heads[-1]}"
    return "heads " + (", ".join(map(str, heads)) if len(heads) <= 3 else f"{heads[0]}, {heads[1]}, … {heads[-1]}")


def _share(read: np.ndarray, visible: np.ndarray, rows: np.ndarray, cells: int) -> np.ndarray:
    """Shares of cells: bool [rows, n] → float [cells, cells]."""
    n = read.shape[1]
    cells = min(cells, n)
    row_edge = np.searchsorted(rows * cells // n, np.arange(cells))
    column_edge = np.searchsorted(np.arange(n) * cells // n, np.arange(cells))

    def total(each):
        return np.add.reduceat(np.add.reduceat(each, row_edge, 0, dtype=float), column_edge, 1)

    seen = total(visible)
    return np.where(seen > 0, total(read) / np.maximum(seen, 1), np.nan)


def headline(pattern: Pattern, heads: HeadGroups, length: int) -> list[str]:
    """Two lines: the pattern, and its statistics."""
    counts = heads.num_heads, heads.num_kv_heads, length
    size, n = pattern.schedule_block_size(), statistics.num_blocks(pattern, length)
    kept = pattern.kv_blocks_kept(*counts)
    facts = [f"density {pattern.density(*counts):.1%}"]
    if pattern.is_strided():
        facts.append(f"coverage {pattern.coverage(*counts):.0%}")
    facts.append(f"KV blocks kept {kept.mean() / n:.1%}")
    of_kv = "" if heads.group == 1 else f" on {counted(heads.num_kv_heads, 'KV head')}"
    blocks = f"{counted(length, 'token')} in {counted(n, 'block')} of {size}"
    shape = f"{counted(heads.num_heads, 'head')}{of_kv}, {blocks}"
    return [repr(pattern), f"{shape}: {', '.join(facts)}"]


# Text: two rows of cells to a line, so that cells are square in a terminal.

HALVES = np.array([[" ", "▄"], ["▀", "█"]])
SHADES = np.array(list(" ░▒▓█"))
MOST_EXACT, SHADED = 32, 24
"""Blocks a side up to which a half-character is one block, and characters a side beyond."""
TEXT_WIDTH = 110


def plot_text(pattern: PatternLike, num_heads: int, num_kv_heads: int, length: int) -> str:
    """A picture for the terminal: queries downwards, keys to the right, a panel for each distinct head and the union.

    Up to 32 blocks every half-character is a block; beyond, a character's shade is the share that is read.

    Args:
      pattern: a pattern, or what `as_pattern` makes a pattern of.
      num_heads: count of query heads.
      num_kv_heads: count of KV heads.
      length: tokens.
    """
    pattern = as_pattern(pattern)
    heads = checked_heads(pattern, num_heads, num_kv_heads, length)
    n = statistics.num_blocks(pattern, length)
    found = panels(pattern, heads, length, n if n <= MOST_EXACT else SHADED)
    drawn = [(found[place].title, _lines(found[place].share)) for place in visible_panels(found)]
    width = max(len(drawn[0][1][0]), *(len(title) + 1 for title, _ in drawn))
    each_line = max(1, TEXT_WIDTH // (width + 2))
    blocks = []
    for first in range(0, len(drawn), each_line):
        some = drawn[first : first + each_line]
        titles = "  ".join(f" {title}".ljust(width) for title, _ in some)
        body = ("  ".join(line.ljust(width) for line in row) for row in zip(*(lines for _, lines in some), strict=True))
        blocks.append("\n".join(line.rstrip() for line in (titles, *body)))
    return "\n".join([*headline(pattern, heads, length), "", "\n\n".join(blocks)])


def _lines(share: np.ndarray) -> list[str]:
    share = np.nan_to_num(share)
    if len(share) % 2:
        share = np.vstack([share, np.zeros_like(share[:1])])
    upper, lower = share[::2], share[1::2]
    if np.isin(share, (0, 1)).all():
        characters = HALVES[upper.astype(int), lower.astype(int)]
    else:
        characters = SHADES[np.ceil((upper + lower) / 2 * (len(SHADES) - 1)).astype(int)]
    return ["│" + "".join(line) for line in characters]


# The drawing.

INK, MUTED, FAINT, PAPER = "#2b303b", "#5f6773", "#e6e8ec", "#ffffff"
HEAD_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#b8a300")
"""After Okabe and Ito's palette, which colour-blind readers can tell apart."""

PLOT_CELLS = 96
PANEL, GAP, TOP, BOTTOM, SIDE = 1.75, 0.25, 0.75, 0.2, 0.3
"""Inches: a panel's side, what is between two of them, and the margins."""
MOST_COLUMNS = 5
CAPTION = 0.65
"""Inches for the title above a panel and the bar below it, together."""


def plot(pattern: PatternLike, num_heads: int, num_kv_heads: int, length: int) -> "Figure":
    """A `matplotlib.figure.Figure`, to be saved with `.savefig("pattern.svg")`.

    It has a panel for each distinct head, one for the union, and under each the share that is read. Blocks that all
    heads read (the window) are dark; others have the colours of their heads, in the union too.

    Args:
      pattern: a pattern, or what `as_pattern` makes a pattern of.
      num_heads: count of query heads.
      num_kv_heads: count of KV heads.
      length: tokens.

    Raises:
      ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing a pattern needs matplotlib: pip install matplotlib") from error

    pattern = as_pattern(pattern)
    heads = checked_heads(pattern, num_heads, num_kv_heads, length)
    found = panels(pattern, heads, length, PLOT_CELLS)
    images, places = _coloured([panel.share for panel in found]), visible_panels(found)
    lines = -(-len(places) // MOST_COLUMNS)
    columns = -(-len(places) // lines)
    width = max(columns * (PANEL + GAP) - GAP + 2 * SIDE, 6.5)
    height = lines * (PANEL + CAPTION) + TOP + BOTTOM
    chart = Figure(figsize=(width, height), facecolor=PAPER)
    left = (width - columns * (PANEL + GAP) + GAP) / 2
    for order, place in enumerate(places):
        line, column = divmod(order, columns)
        bottom = height - TOP - line * (PANEL + CAPTION) - PANEL - 0.22
        axis = chart.add_axes((
            (left + column * (PANEL + GAP)) / width, bottom / height, PANEL / width, PANEL / height,
        ))  # fmt: skip
        union = place == len(found) - 1
        _draw_panel(axis, found[place], images[place], INK if union else HEAD_COLOURS[place % len(HEAD_COLOURS)])
    title, facts = headline(pattern, heads, length)
    chart.text(0.5, 1 - 0.28 / height, title, color=INK, fontsize=_fitting(title, width), ha="center", va="center",
               family="monospace", weight="bold")  # fmt: skip
    chart.text(0.5, 1 - 0.53 / height, facts, color=INK, fontsize=9, ha="center", va="center")
    legend = (
        "rows: query blocks · columns: key blocks · dark: read by every head · bar: share of the context that is read"
    )
    chart.text(0.5, 0.16 / height, legend, color=MUTED, fontsize=8, ha="center", va="center")
    return chart


def _fitting(title: str, width: float) -> float:
    """The font size in points at which a monospaced title is no wider than the figure."""
    return min(10.5, (width - 0.3) * 72 / (0.62 * len(title)))


def _coloured(shares: list[np.ndarray]) -> list[np.ndarray]:
    """Shares of the heads and of their union → RGBA images, float [cells, cells, 4]."""
    from matplotlib.colors import to_rgb

    ink, faint = np.array(to_rgb(INK)), np.array(to_rgb(FAINT))
    *heads, union = (np.nan_to_num(share)[..., None] for share in shares)
    common = np.minimum.reduce(heads)
    colours = [np.array(to_rgb(HEAD_COLOURS[place % len(HEAD_COLOURS)])) for place in range(len(heads))]
    own = sum(head - common for head in heads)
    mixed = sum((head - common) * colour for head, colour in zip(heads, colours, strict=True)) / np.maximum(own, 1e-9)
    images = [
        common * ink + (head - common) * colour + (1 - head) * faint
        for head, colour in zip([*heads, union], [*colours, mixed], strict=True)
    ]
    alpha = (~np.isnan(shares[0]))[..., None].astype(float)
    return [np.concatenate([image, alpha], -1) for image in images]


def _draw_panel(axis, panel: Panel, image: np.ndarray, colour: str) -> None:
    from matplotlib.patches import Rectangle

    cells = len(image)
    axis.imshow(image, interpolation="nearest", extent=(0, cells, cells, 0))
    if cells <= 32:
        for edge in range(1, cells):
            axis.axhline(edge, color=PAPER, linewidth=0.6)
            axis.axvline(edge, color=PAPER, linewidth=0.6)
    axis.set_axis_off()
    axis.set_title(panel.title, color=INK, fontsize=10, weight="bold", pad=5)
    for share, fill in ((1, FAINT), (panel.total, colour)):
        bar = Rectangle(
            (0, -0.095), share * 0.76, 0.035, transform=axis.transAxes, color=fill, linewidth=0, clip_on=False
        )
        axis.add_patch(bar)
    axis.text(1, -0.078, f"{panel.total:.0%}", transform=axis.transAxes, ha="right", va="center", fontsize=9, color=INK)


# The command line.

README_PATTERN = "LocalStride(block_size=64, local_blocks=2, vert_stride=4)"
README_IMAGE = pathlib.Path("docs/images/pattern.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m s2jax.plotting", description="Draws the blocks that heads read.")
    explained = "a pattern in Python's notation; nothing is executed (default: %(default)s)"
    parser.add_argument("pattern", nargs="?", default=README_PATTERN, help=explained)
    parser.add_argument("--heads", type=int, default=4, help="query heads (default: 4)")
    parser.add_argument("--kv-heads", type=int, help="KV heads (default: as many as query heads)")
    parser.add_argument("--length", type=int, default=1536, help="tokens (default: 1536)")
    parser.add_argument("--out", type=pathlib.Path, default=README_IMAGE, help="PNG, SVG or PDF (default: %(default)s)")
    parser.add_argument("--text", action="store_true", help="print text instead of drawing")
    options = parser.parse_args(arguments)
    counts = options.heads, options.heads if options.kv_heads is None else options.kv_heads, options.length
    try:
        pattern = parse_pattern(options.pattern)
        with warnings.catch_warnings(record=True, action="always", category=PatternWarning) as caught:
            pattern.warn_if_incomplete(*counts)
        for each in caught:
            print(f"note: {each.message}", file=sys.stderr)
        if options.text:
            _show(plot_text(pattern, *counts))
            return
        chart = plot(pattern, *counts)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        # Without the version of matplotlib the same picture is the same file.
        chart.savefig(options.out, dpi=200, metadata={"Software": None} if options.out.suffix == ".png" else None)
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))
    _show(f"wrote {options.out}")


ASCII = str.maketrans("▄▀░▒▓█│", ".'-+*#|")


def _show(text: str) -> None:
    """Prints a text; encodings without block characters get ASCII ones."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
        try:
            text.encode(sys.stdout.encoding)
        except UnicodeEncodeError:
            text = text.translate(ASCII)
    print(text)


if __name__ == "__main__":
    main()
