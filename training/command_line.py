"""argv to Config: the flags are the config's fields, and whatever is wrong with them is one line and exit code 2."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from pathlib import Path

import tyro

from training.config import Config, fine_tuning, recipe, require


def parse(argv: Sequence[str]) -> Config:
    """The config that the flags ask for; prints the help and exits 0 on --help.

    The defaults come from the run that --run-dir holds, if it holds one, else from the recipe of --preset or for
    --pretrained.

    Raises:
        ValueError: in one line, what was expected and what came.
    """
    run_dir = _peek(argv, "--run-dir")
    saved = Path(run_dir, "config.json") if run_dir else None
    preset, pretrained = _peek(argv, "--preset"), _peek(argv, "--pretrained")
    if saved is not None and saved.exists():
        defaults = Config.from_json(saved)
        require(preset in (None, defaults.preset), "--preset", f"{defaults.preset}, as in {run_dir}", preset)
    elif pretrained is not None:
        require(preset is None, "--pretrained", "no --preset beside it", preset)
        defaults = fine_tuning(pretrained)
    else:
        defaults = recipe(preset or "tiny")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                Config,
                prog="train.py",
                args=list(argv),
                default=defaults,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(complaint.getvalue())) from None


def _peek(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag that other flags' defaults depend on."""
    found = None
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            found = argv[i + 1]
        elif word.startswith(flag + "="):
            found = word.partition("=")[2]
    return found


def _one_line(box: str) -> str:
    """What tyro says in a box of several lines, in one."""
    inside = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    rule = next((i for i, line in enumerate(inside) if line.startswith("─")), len(inside))
    said = " ".join(inside[:rule]) or " ".join(box.split())
    for complaint, kind in _REWORDED.items():
        said = re.sub(rf"Error parsing (--\S+): {complaint}", rf"\1: expected {kind}, got \2", said)
    said = re.sub(r"^Error parsing \w+: ", "", said)
    return f"{said} (--help lists the flags)"


# tyro's complaints about one value, and what was expected of it.
_REWORDED = {
    r"invalid literal for int.*?: (.*)": "a whole number",
    r"could not convert string to float: (.*)": "a number",
    r"no type matching \{None\}\|INT could .*?from \[(.*?)\].*": "a whole number or None",
    r"no type matching \{None\}\|FLOAT could .*?from \[(.*?)\].*": "a number or None",
}
