"""Pictures: the text to the letter, the drawing by its colours, the command line."""

import builtins
import io
import pathlib
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from s2jax import patterns as p
from s2jax import plotting

FOUR = p.LocalStride(64, 1, 4)


def test_text():
    lines = plotting.plot_text(FOUR, 4, 4, 8 * 64).splitlines()
    assert lines[0] == repr(FOUR)
    assert lines[1] == ("4 heads, 512 tokens in 8 blocks of 64: density 41.7%, coverage 100%, KV blocks kept 34.4%")
    assert [line.rstrip() for line in lines[3:]] == [
        " head 0               head 1               head 2               head 3               all heads together",
        "│█▄                  │▀▄                  │▀▄                  │▀▄                  │█▄",
        "│█ ▀▄                │  ▀▄                │  █▄                │ █▀▄                │███▄",
        "│█   █▄              │   █▀▄              │  █ ▀▄              │ █  ▀▄              │█████▄",
        "│█   █ ▀▄            │   █  ▀▄            │  █   █▄            │ █   █▀▄            │███████▄",
    ]


def test_text_groups_equal_heads_and_shades_long_contexts():
    drawn = plotting.plot_text(p.LocalStride(64, 16, 8), 32, 8, 1 << 17)
    assert "heads 0–3" in drawn
    assert "heads 28–31" in drawn
    assert "░" in drawn
    assert max(map(len, drawn.splitlines()[2:])) <= plotting.TEXT_WIDTH
    assert "head 0" not in plotting.plot_text(p.Local(tokens=1000), 4, 4, 1 << 12)  # every head is the union


def test_panels_hold_the_block_mask():
    pattern = FOUR | p.FirstTokens(4)
    *heads, union = plotting.panels(pattern, p.HeadGroups(4, 4), 1000, cells=99)
    mask = pattern.block_mask(4, 4, 1000)
    for panel, blocks in zip([*heads, union], [*mask, mask.any(0)], strict=True):
        np.testing.assert_array_equal(np.nan_to_num(panel.share), blocks)
        assert panel.total == pytest.approx(blocks.sum() / (16 * 17 / 2))
    assert np.isnan(union.share[0, 1])  # later keys are no part of the picture


def test_cells_hold_shares_of_the_block_mask():
    pattern, cells = p.LocalStride(64, 8, 8, causal=False), 4
    head, *_ = plotting.panels(pattern, p.HeadGroups(8, 8), 64 * 32, cells)
    expected = pattern.block_mask(8, 8, 64 * 32)[0].reshape(cells, 8, cells, 8).mean((1, 3))
    np.testing.assert_allclose(head.share, expected)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_drawing(tmp_path, suffix):
    chart = plotting.plot(FOUR, 4, 4, 1000)
    assert [axis.get_title() for axis in chart.axes] == ["head 0", "head 1", "head 2", "head 3", "all heads together"]
    image = chart.axes[1].images[0].get_array()
    np.testing.assert_allclose(image[0, 0, :3], to_rgb(plotting.INK))  # every head reads its own block
    np.testing.assert_allclose(image[9, 3, :3], to_rgb(plotting.HEAD_COLOURS[1]))  # (3 + r) mod 4 = 0
    np.testing.assert_allclose(chart.axes[4].images[0].get_array()[9, 3, :3], to_rgb(plotting.HEAD_COLOURS[1]))
    np.testing.assert_allclose(image[9, 2, :3], to_rgb(plotting.FAINT))
    assert image[0, 1, 3] == 0  # later keys are not drawn
    path = tmp_path / f"pattern.{suffix}"
    chart.savefig(path)
    assert path.stat().st_size > 1000


def test_drawing_without_matplotlib_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        plotting.plot(FOUR, 4, 4, 1000)


def test_command_line(tmp_path, capsys):
    path = tmp_path / "new" / "pattern.png"
    plotting.main(["Local(2) | Strided(64, 8)", "--heads", "4", "--kv-heads", "2", "--out", str(path)])
    assert path.exists()
    told = capsys.readouterr()
    assert told.out == f"wrote {path}\n"
    assert "together read" in told.err  # two residues of eight
    plotting.main(["Ranges(((2, 1), (None, 3)))", "--heads", "3", "--text"])
    assert "all heads together" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_encodings_without_blocks(tmp_path, monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    plotting.main(["LocalStride(64, 1, 4)", "--heads", "4", "--length", "512", "--text"])
    plotting.main(["Local(2)", "--out", str(tmp_path / "日本.svg")])
    stream.flush()
    said = stream.buffer.getvalue().decode(encoding)
    assert "|# '.                |  '.                |  #.                | #'.                |###.\n" in said
    assert said.endswith("\\u65e5\\u672c.svg\n")
    assert (tmp_path / "日本.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["LocalStrid(64)"], "expected a pattern such as"),
        (["3"], "expected a pattern such as"),
        (["Local("], "expected a pattern such as"),
        (["LocalStride(48)"], "power of two"),
        (["--heads", "4", "--kv-heads", "3"], "multiple of num_kv_heads"),
        (["--length", "0"], "length must be"),
        (["--out", "/dev/null/no.png"], "File exists"),
        (["--out", "pattern.doc"], "not supported"),
    ],
)
def test_wrong_commands_exit_with_one_line(arguments, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        plotting.main(arguments)
    assert text in capsys.readouterr().err.splitlines()[-1]


def test_the_readme_picture_is_there():
    assert (pathlib.Path(__file__).parents[2] / plotting.README_IMAGE).stat().st_size < 200_000
