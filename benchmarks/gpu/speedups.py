"""Rates and speedups, from the times of a case's implementations."""

from benchmarks.gpu.clock import MAX_TFLOPS

OPERATIONS = {"forward": 4.0, "backward": 10.0, "forward + backward": 14.0}
"""Floating-point operations of a token pair and feature."""

PEERS = {
    "cudnn": lambda row: row["implementation"] == "cudnn",
    "best dense": lambda row: row["dense"],
    "flex": lambda row: row["implementation"].startswith("flex"),
}


def with_speedups(rows: list[dict]) -> list[dict]:
    """The rows of a case with useful TFLOP/s and speedups over peers, and rows of the backward pass.

    The backward pass takes the time of both passes less that of the forward pass.
    """
    rows = [dict(row) for row in rows if row["pass"] != "backward"]
    times = {(row["implementation"], row["pass"]): row["ms"] for row in rows if "ms" in row}
    for row in rows:
        parts = times.get((row["implementation"], "forward")), row.get("ms")
        if row["pass"] == "forward + backward" and None not in parts:
            rows.append(row | {"pass": "backward", "ms": parts[1] - parts[0]})
    timed = [row for row in rows if "ms" in row]
    for row in timed:
        if operations := OPERATIONS.get(row["pass"]):
            row["useful TFLOP/s"] = operations * row["head_dim"] * row["pairs"] / row["ms"] / 1e9
            if not 0 < row["useful TFLOP/s"] < MAX_TFLOPS:
                row["suspect"] = "more operations a second than this GPU has"
        for peer, matches in () if row["dense"] else PEERS.items():
            others = [other["ms"] for other in timed if other["pass"] == row["pass"] and matches(other)]
            if others:
                row[f"over {peer}"] = min(others) / row["ms"]
        # The goals: forward over cuDNN, backward over the best there is.
        goal = row.get("over cudnn" if row["pass"] == "forward" else "over best dense")
        if goal is not None and operations:
            row["of ideal"] = goal * row["density"]
    return rows
