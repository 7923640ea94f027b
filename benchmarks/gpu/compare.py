"""What the times of a case's sides say of each other."""

from collections.abc import Iterable

from benchmarks.cases import Case
from benchmarks.gpu.flex import NAMES as FLEX
from benchmarks.gpu.machine import MOST_PER_SECOND
from benchmarks.gpu.sides import PASSES

OPERATIONS = {"forward": 4.0, "backward": 10.0, "forward + backward": 14.0}
"""Floating-point operations of a token pair and feature."""


def dense_pairs(case: Case) -> int:
    return case.batch * case.num_heads * case.tokens * (case.tokens + 1) // 2


def compare(rows: dict[str, dict], case: Case, name: str, dense: set[str]) -> None:
    """Adds of a pass useful TFLOP/s, and speedups over dense attention and over FlexAttention, to the sides' rows.

    Args:
      dense: the sides that compute dense attention.
    """
    for side, row in rows.items():
        milliseconds = row.get(f"{name} ms")
        if milliseconds is None:
            continue
        pairs = dense_pairs(case) if side in dense else row["pairs"]
        rate = OPERATIONS[name] * case.head_dim * pairs / milliseconds * 1e3
        row[f"{name} useful TFLOP/s"] = rate / 1e12
        if rate > MOST_PER_SECOND:
            row[f"{name} suspect"] = "more operations a second than this GPU has"
        row |= _speedups(rows, side, name, dense)


def _speedups(rows: dict[str, dict], side: str, name: str, dense: set[str]) -> dict:
    """Over those that were timed by the same clock."""
    row, found = rows[side], {}
    milliseconds, clock = row[f"{name} ms"], row[f"{name} clock"]
    others = {
        other: each.get(f"{name} ms") for other, each in rows.items()
        if other != side and each.get(f"{name} clock") == clock
    }  # fmt: skip
    cudnn, best = others.get("cudnn"), _least(others[other] for other in dense & set(others))
    flex = _least(others[other] for other in FLEX if other in others)
    if cudnn is not None:
        found[f"{name} over cudnn"] = cudnn / milliseconds
    if best is not None and side not in dense:
        found[f"{name} over best dense"] = best / milliseconds
    # The goals: forward over cuDNN, backward over the best there is.
    over = cudnn if name == "forward" else best
    if over is not None and side not in dense:
        found[f"{name} of ideal"] = over / milliseconds * row["density"]
    if flex is not None and side not in FLEX and side not in dense:
        found[f"{name} over flex"] = flex / milliseconds
    return found


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def shown(row: dict) -> str:
    """A row in one line, for whoever watches."""
    if "left out" in row:
        return f"  {row['side']}: {row['left out']}"
    worth = f"correct in {row['checked rows']} rows" if row.get("correct") else "NOT SHOWN CORRECT"
    parts = [f"  {row['side']}: {worth}"]
    for name in PASSES:
        if f"{name} check failed" in row:
            parts.append(f"{name} check failed: {row[f'{name} check failed']}")
        if row.get(f"{name} correct") is False:
            wrong = [each for each in row["errors"][name] if not each["error"] <= each["allowed"]]
            told = [f"{each['name']} by {each['error']:.3g} of {each['allowed']:.3g} allowed" for each in wrong]
            parts.append(f"{name} wrong: {', '.join(told)}")
        parts.append(_timed(row, name))
    return "; ".join(parts)


def _timed(row: dict, name: str) -> str:
    if f"{name} ms" not in row:
        return f"{name}: {row.get(f'{name} failed')}"
    told = f"{name} {row[f'{name} ms']:.3f} ms, {row[f'{name} useful TFLOP/s']:.0f} TFLOP/s"
    of_ideal = row.get(f"{name} of ideal")
    return told + (f", {of_ideal:.0%} of ideal" if of_ideal is not None else "")
