"""Writes the tables of docs/results.md from benchmarks/results/*.json, between its `results` marks.

python -m benchmarks.report
"""

import json
import pathlib
import re

RESULTS = pathlib.Path(__file__).parent / "results"
PAGE = RESULTS.parent.parent / "docs" / "results.md"


def main() -> None:
    text = PAGE.read_text()
    for name, make in TABLES.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        mark = re.compile(rf"(<!-- results: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not mark.search(text):
            raise SystemExit(f"docs/results.md has no place for {path.name}: expected `<!-- results: {name} -->`")
        text = mark.sub(
            lambda found, path=path, make=make: f"{found[1]}{make(json.loads(path.read_text()))}\n{found[2]}", text
        )
    PAGE.write_text(text)


def origin(record: dict, name: str, device: str | None = None) -> str:
    device = device or record["processor"]
    return f"[{name}.json](../benchmarks/results/{name}.json): {record['date']}, jax {record['jax']}, {device}."


def tpu_schedule(record: dict) -> str:
    """Our bundles over others', and with blocks of 16 over those of 64."""
    lines = ["| chip | pattern | pass | of splash's | of tokamax's | blocks of 16 over 64 |", "|" + "---|" * 6]
    for row in record["ratios"]:
        shown = [row.get(name) for name in ("of splash", "of tokamax", "ours, block 16 over block 64")]
        ratios = " | ".join("–" if each is None else f"{each:.2f}" for each in shown)
        lines.append(f"| {row['chip']} | {row['case']} | {row['pass']} | {ratios} |")
    return "\n".join([*lines, "", origin(record, "tpu_schedule")])


def decode(record: dict) -> str:
    lines = [
        "| tokens | batch | cache, dense | share | a token, dense | time over share of dense's |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['tokens']:,} | {row['batch']} | {row['cache MiB']:.0f} MiB, {row['dense MiB']:.0f} MiB "
        f"| {row['share']:.1%} | {row['ms']:.1f} ms, {row['dense ms']:.1f} ms "
        f"| {row['time over share of dense']:.2f} |"
        for row in record["rows"]
    ]
    return "\n".join([*lines, "", origin(record, "decode")])


def perplexity(record: dict) -> str:
    bands = [name for name in record["rows"][0] if name.startswith("to ")]
    columns = ["reads", *bands, "all", "cache", "prefill", "a token"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in record["rows"]:
        shown = [f"{row[name]:.1f}" for name in (*bands, "all")]
        spent = [f"{row['cache MiB']:.0f} MiB", f"{row['prefill s']:.0f} s", f"{row['decode ms']:.0f} ms"]
        lines.append("| " + " | ".join([row["reads"], *shown, *spent]) + " |")
    return "\n".join([*lines, "", f"{record['text']}. {origin(record, 'perplexity')}"])


def fine_tuning(record: dict) -> str:
    lines = ["| reads | cache | before | over dense | after | over dense, tuned alike |", "|---|---|---|---|---|---|"]
    dense = record["rows"][0]
    for row in record["rows"]:
        over = [f"{row[when] / dense[when] - 1:+.1%}" if row is not dense else "" for when in ("before", "after")]
        lines.append(
            f"| {row['reads']} | {row['cache MiB']:.0f} MiB | {row['before']:.1f} | {over[0]} | {row['after']:.1f} "
            f"| {over[1]} |"
        )
    said = f"{record['text']}; trained: {record['trained']}."
    return "\n".join([*lines, "", f"{said} {origin(record, 'fine_tuning')}"])


def schedules(record: dict) -> str:
    lines = [
        "| case | block | density | ideal speedup | executed/ideal, forward | backward | compiled, processor time |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        executed = [
            f"{row[key]:.2f}" if key in row else "–"
            for key in (f"{way} executed/ideal" for way in ("forward", "backward"))
        ]
        lines.append(
            f"| {row['case']} | {row['block']} | {row['density']:.4f} | {row['ideal speedup']:.1f}× "
            f"| {executed[0]} | {executed[1]} | {row['compile s']:.2f} s, {row['peak MB']:.0f} MB |"
        )
    return "\n".join([*lines, "", origin(record, "schedules")])


def attention(record: dict) -> str:
    lines = [
        "| case | dtype | density | ideal | forward | backward | temporaries, chunked dense's |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['case']} | {row['dtype']} | {row['density']:.3f} | {row['ideal speedup']:.1f}× "
        f"| {row['forward speedup']:.1f}× ({row['forward of ideal']:.0%} of ideal) "
        f"| {row['backward speedup']:.1f}× ({row['backward of ideal']:.0%}) "
        f"| {row['sparse temporaries MB']:.0f} MB, {row['chunked temporaries MB']:.0f} MB |"
        for row in record["rows"]
    ]
    return "\n".join([*lines, "", origin(record, "attention_cpu")])


def attention_gpu(record: dict) -> str:
    cases: dict[str, dict[str, dict]] = {}
    for row in record["rows"]:
        cases.setdefault(row["case"], {})[row["side"]] = row
    if "clock" not in record:
        return "\n".join(["It ended before anything was measured.", *_not_there(record["rows"])])
    lines = [
        "| case | density | forward | over cuDNN | backward | over the best dense | over FlexAttention "
        "| block 32, 16 | cuDNN forward, backward | rows checked |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    steps = {name: sides for name, sides in cases.items() if any("train step ms" in row for row in sides.values())}
    lines += [
        _case_on_gpu(name, sides, record["clock"])
        for name, sides in cases.items()
        if "density" in sides.get("s2jax", {})
    ]
    gpu = record["machine"]["gpu"]
    device = f"{gpu.get('name', record['device'])}, driver {gpu.get('driver_version', 'unknown')}, by {record['clock']}"
    told = (
        "Forward and backward in useful TFLOP/s: only token pairs that the pattern lets through count. Times are by "
        f"{record['clock']} where nothing else is said, and compared only with those of the same clock. Tiles of our "
        f"kernel: {record['tiles of s2jax']}. The others run on their defaults, nothing was searched for them: cuDNN's "
        "heuristics, tokamax's own tuning files where they know the shape, FlexAttention's default tiles (for blocks "
        "of 128 × 64, which have none backward, those of its search list that fit)."
    )
    made = [*lines, "", told, *_small_calls(record), *_steps(steps), *_not_there(record["rows"]), ""]
    return "\n".join([*made, origin(record, "attention_gpu", device)])


def _case_on_gpu(name: str, sides: dict[str, dict], clock: str) -> str:
    ours = sides["s2jax"]

    def rate(side: str, way: str) -> str:
        row = sides.get(side, {})
        value = row.get(f"{way} useful TFLOP/s")
        wrong = "" if row.get(f"{way} correct") else " (not shown correct)"
        other = "" if row.get(f"{way} clock") == clock else f" (by {row.get(f'{way} clock')})"
        return "–" if value is None else f"{value:.0f}{wrong}{other}"

    def over(way: str, whom: str) -> str:
        value = ours.get(f"{way} over {whom}")
        return "–" if value is None else f"{value:.2f}×"

    def of_ideal(way: str) -> str:
        value = ours.get(f"{way} of ideal")
        return "" if value is None else f" ({value:.0%} of ideal)"

    def against(block: int) -> str:
        theirs = sides.get(f"s2jax block {block}", {})
        same = "forward ms" in ours and theirs.get("forward clock") == ours["forward clock"]
        return f"{theirs['forward ms'] / ours['forward ms']:.2f}×" if same else "–"

    return (
        f"| {name} | {ours['density']:.3f} | {rate('s2jax', 'forward')} "
        f"| {over('forward', 'cudnn')}{of_ideal('forward')} "
        f"| {rate('s2jax', 'backward')} | {over('backward', 'best dense')}{of_ideal('backward')} "
        f"| {over('forward', 'flex')}, {over('backward', 'flex')} | {against(32)}, {against(16)} "
        f"| {rate('cudnn', 'forward')}, {rate('cudnn', 'backward')} | {_checked_rows(sides)} |"
    )


def _checked_rows(sides: dict[str, dict]) -> str:
    """Of our main side many rows are checked, of all others few."""
    ours = sides["s2jax"].get("checked rows")
    others = {row["checked rows"] for name, row in sides.items() if name != "s2jax" and "checked rows" in row}
    told = [f"{ours} rows of ours"] if ours is not None else []
    return ", ".join([*told, *(f"{rows} of others" for rows in sorted(others))]) or "–"


def _small_calls(record: dict) -> list[str]:
    wrong = [call for call in record.get("small calls", ()) if not call["passed"]]
    told = "; ".join(f"{call['case']}, block {call['block']}, {call['pass']}" for call in wrong)
    return ["", f"Small calls that were wrong or failed: {told}."] if wrong else []


def _steps(steps: dict[str, dict[str, dict]]) -> list[str]:
    """Training steps of an attention block, and the memory that each needs."""
    lines = [
        f"| {name} | {side} | {row['train step ms']:.1f} ms by {row['train step clock']} "
        f"| {_times(row, 's2jax dense')} | {_times(row, 'cudnn')} | {_gib(row)} |"
        for name, sides in steps.items()
        for side, row in sides.items()
        if "train step ms" in row
    ]
    head = ["", "A training step of one attention block, its projections, norm and SGD included:", ""]
    head += ["| case | attention | a step | over s2jax dense | over cuDNN | peak memory, arguments included |"]
    return [*head, "|---|---|---|---|---|---|", *lines] if lines else []


def _times(row: dict, whom: str) -> str:
    return f"{row[f'train step over {whom}']:.2f}×" if f"train step over {whom}" in row else "–"


def _gib(row: dict) -> str:
    return f"{row['peak bytes'] / 2**30:.2f} GiB" if "peak bytes" in row else "–"


def _not_there(rows: list[dict]) -> list[str]:
    """What is missing and why, a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        where = f"{row['side']} at {row['case']}"
        for key in ("left out", "not run"):
            if key in row:
                reasons.setdefault(row[key], []).append(where)
        for key, value in row.items():
            if key.endswith(" failed") and value:
                reasons.setdefault(value, []).append(f"{where} ({key.removesuffix(' failed')})")
    return (
        ["", "Not measured:", *(f"- {reason}: {', '.join(where)}" for reason, where in reasons.items())]
        if reasons
        else []
    )


def training(record: dict) -> str:
    row = record["rows"][0]
    bits = {
        "the model": row["heldout_bits_per_byte"],
        "gzip -9, file by file": row["baselines_bits_per_byte"]["gzip_9_per_file"],
    }
    bits["byte frequencies"] = row["baselines_bits_per_byte"]["byte_unigram"]
    lines = [
        "| held-out bits per byte | |",
        "|---|---|",
        *(f"| {name} | {value:.3f} |" for name, value in bits.items()),
    ]
    far = row["far_context"]
    cut = ", ".join(
        f"{each['context']} bytes {each['excess']:+.4f} ± {each['standard_error']:.4f}" for each in far[:-1]
    )
    lines += [
        "",
        f"{row['parameters']:,} parameters, {row['tokens_trained'] / 1e6:.1f} million bytes seen, "
        f"{row['tokens_per_second']:,.0f} a second; {row['heldout_documents']} held-out files, "
        f"{row['heldout_tokens']:,} bytes. Bits lost where the same bytes are scored with the context cut short: {cut} "
        f"(whole: {far[-1]['context']} bytes).",
        "",
        origin(record, "train_tiny"),
    ]
    return "\n".join(lines)


TABLES = {
    "schedules": schedules,
    "tpu_schedule": tpu_schedule,
    "attention_gpu": attention_gpu,
    "attention_cpu": attention,
    "decode": decode,
    "perplexity": perplexity,
    "fine_tuning": fine_tuning,
    "train_tiny": training,
}

if __name__ == "__main__":
    main()
