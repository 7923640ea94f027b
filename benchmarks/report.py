"""Writes the tables of docs/results.md and of the README from benchmarks/results/*.json, between `results` marks.

python -m benchmarks.report
"""

import json
import re
from collections.abc import Iterable

from benchmarks import headlines
from benchmarks.record import RESULTS

PAGE = RESULTS.parent.parent / "docs" / "results.md"


class Cells(dict):
    """Entries of a row for templates; a missing entry is formatted as a dash."""

    def __missing__(self, key: str) -> "_Dash":
        return _Dash()


class _Dash:
    def __format__(self, form: str) -> str:
        return "–"


def table(columns: dict[str, str], rows: Iterable[dict]) -> str:
    """A Markdown table; `columns` maps headings to templates of cells."""
    lines = [f"| {' | '.join(columns)} |".replace("  ", " "), "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(template.format_map(Cells(row)) for template in columns.values()) + " |")
    return "\n".join(lines)


def origin(record: dict, name: str, device: str | None = None) -> str:
    device = device or record["processor"]
    return f"[{name}.json](../benchmarks/results/{name}.json): {record['date']}, jax {record['jax']}, {device}."


SIMPLE = {
    "schedules": {
        "case": "{case}",
        "block": "{block}",
        "density": "{density:.4f}",
        "ideal speedup": "{ideal speedup:.1f}×",
        "executed/ideal, forward": "{forward executed/ideal:.2f}",
        "backward": "{backward executed/ideal:.2f}",
        "compiled, processor time": "{compile s:.2f} s, {peak MB:.0f} MB",
    },
    "attention_cpu": {
        "case": "{case}",
        "dtype": "{dtype}",
        "density": "{density:.3f}",
        "ideal": "{ideal speedup:.1f}×",
        "forward": "{forward speedup:.1f}× ({forward of ideal:.0%} of ideal)",
        "backward": "{backward speedup:.1f}× ({backward of ideal:.0%})",
        "temporaries, chunked dense's": "{sparse temporaries MB:.0f} MB, {chunked temporaries MB:.0f} MB",
    },
    "decode": {
        "tokens": "{tokens:,}",
        "batch": "{batch}",
        "cache, dense": "{cache MiB:.0f} MiB, {dense MiB:.0f} MiB",
        "share": "{share:.1%}",
        "a token, dense": "{ms:.1f} ms, {dense ms:.1f} ms",
        "time over share of dense's": "{time over share of dense:.2f}",
    },
}
"""Columns of results files whose rows need no computation."""


def tpu_schedule(record: dict) -> str:
    """Ratios of bundles: ours to the peers', and blocks of 16 to blocks of 64."""
    columns = {
        "chip": "{chip}",
        "pattern": "{case}",
        "pass": "{pass}",
        "of splash's": "{of splash:.2f}",
        "of tokamax's": "{of tokamax:.2f}",
        "blocks of 16 over 64": "{ours, block 16 over block 64:.2f}",
    }
    return f"{table(columns, record['ratios'])}\n\n{origin(record, 'tpu_schedule')}"


def perplexity(record: dict) -> str:
    bands = [name for name in record["rows"][0] if name.startswith("to ")]
    columns = {"reads": "{reads}"} | {name: f"{{{name}:.1f}}" for name in (*bands, "all")}
    columns |= {"cache": "{cache MiB:.0f} MiB", "prefill": "{prefill s:.0f} s", "a token": "{decode ms:.0f} ms"}
    return f"{table(columns, record['rows'])}\n\n{record['text']}. {origin(record, 'perplexity')}"


def fine_tuning(record: dict) -> str:
    columns = {
        "reads": "{reads}",
        "cache": "{cache MiB:.0f} MiB",
        "before": "{before:.1f}",
        "over dense": "{before over dense}",
        "after": "{after:.1f}",
        "over dense, tuned alike": "{after over dense}",
    }
    dense, *others = record["rows"]
    rows = [dense | {"before over dense": "", "after over dense": ""}]
    for row in others:
        rows.append(row | {f"{when} over dense": f"{row[when] / dense[when] - 1:+.1%}" for when in ("before", "after")})
    trained = f"{record['text']}; trained: {record['trained']}."
    return f"{table(columns, rows)}\n\n{trained} {origin(record, 'fine_tuning')}"


def train_tiny(record: dict) -> str:
    row = record["rows"][0]
    baselines, (*cut, whole) = row["baselines_bits_per_byte"], row["far_context"]
    bits = {
        "the model": row["heldout_bits_per_byte"],
        "gzip -9, file by file": baselines["gzip_9_per_file"],
        "byte frequencies": baselines["byte_unigram"],
    }
    lost = ", ".join(f"{each['context']} bytes {each['excess']:+.4f} ± {each['standard_error']:.4f}" for each in cut)
    facts = (
        f"{row['parameters']:,} parameters, {row['tokens_trained'] / 1e6:.1f} million bytes seen, "
        f"{row['tokens_per_second']:,.0f} a second; {row['heldout_documents']} held-out files, "
        f"{row['heldout_tokens']:,} bytes. Bits lost where the same bytes are scored with the context cut short: "
        f"{lost} (whole: {whole['context']} bytes)."
    )
    columns = {"held-out bits per byte": "{name}", "": "{value:.3f}"}
    made = table(columns, [{"name": name, "value": value} for name, value in bits.items()])
    return f"{made}\n\n{facts}\n\n{origin(record, 'train_tiny')}"


GPU_COLUMNS = {
    "case": "{case}",
    "density": "{s2jax forward density:.3f}",
    "forward": "{s2jax forward useful TFLOP/s:.0f}",
    "over cuDNN": "{s2jax forward over cudnn:.2f}× ({s2jax forward of ideal:.0%} of ideal)",
    "backward": "{s2jax backward useful TFLOP/s:.0f}",
    "over the best dense": "{s2jax backward over best dense:.2f}× ({s2jax backward of ideal:.0%} of ideal)",
    "over FlexAttention": "{s2jax forward over flex:.2f}×, {s2jax backward over flex:.2f}×",
    "blocks of 64": "{s2jax forward ms:.2f} ms",
    "of 32, 16": "{s2jax block 32 forward ms:.2f}, {s2jax block 16 forward ms:.2f} ms",
    "cuDNN forward, backward": "{cudnn forward useful TFLOP/s:.0f}, {cudnn backward useful TFLOP/s:.0f}",
}
STEP_COLUMNS = {
    "case": "{case}",
    "attention": "{implementation}",
    "a step": "{ms:.1f} ms",
    "over the best dense": "{over best dense:.2f}×",
    "peak memory, arguments included, bytes": "{peak bytes:.3g}",
}


def attention_gpu(record: dict) -> str:
    """Tables of the cases and of training steps, and a list of wrong and missing measurements with the reasons."""
    cases: dict[str, dict] = {}
    problems: dict[str, list[str]] = {}
    for row in record["rows"]:
        name = f"{row['implementation']} {row['pass']}"
        cell = cases.setdefault(row["case"], {"case": row["case"]})
        cell |= {f"{name} {key}": value for key, value in row.items()}
        reasons = [row[key] for key in ("failed", "not run", "check failed") if key in row]
        reasons += ["not correct"] if row.get("correct") is False else []
        for reason in reasons:
            problems.setdefault(reason, []).append(f"{name} at {row['case']}")
    steps = [row for row in record["rows"] if row["pass"] == "train step" and "ms" in row]
    gpu = record.get("machine", {}).get("gpu", {})
    device = f"{gpu.get('name', record.get('device'))}, driver {gpu.get('driver_version')}, by {record.get('clock')}"
    parts = [
        table(GPU_COLUMNS, [row for row in cases.values() if "s2jax forward ms" in row]),
        "Forward and backward in useful TFLOP/s: only token pairs that the pattern lets through count. The backward "
        "pass is both passes less the forward pass. Configurations of our kernel: "
        f"{record.get('configurations of s2jax')}. The others run on their defaults, nothing was searched for them.",
        "A training step of one attention block, its projections, norm and SGD included:" if steps else "",
        table(STEP_COLUMNS, steps) if steps else "",
        "Wrong or not measured:" if problems else "",
        "\n".join(f"- {reason}: {', '.join(where)}" for reason, where in problems.items()),
        origin(record, "attention_gpu", device),
    ]
    return "\n\n".join(filter(None, parts))


def simple(name: str, record: dict) -> str:
    return f"{table(SIMPLE[name], record['rows'])}\n\n{origin(record, name)}"


TABLES = {make.__name__: make for make in (tpu_schedule, attention_gpu, perplexity, fine_tuning, train_tiny)}


def main() -> None:
    text = PAGE.read_text()
    for name in (*SIMPLE, *TABLES):
        path = RESULTS / f"{name}.json"
        if path.exists():
            record = json.loads(path.read_text())
            made = TABLES[name](record) if name in TABLES else simple(name, record)
            mark = re.compile(rf"(<!-- results: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
            text, found = mark.subn(lambda match, made=made: match[1] + made + match[2], text)
            if not found:
                raise SystemExit(f"docs/results.md has no place for {path.name}: expected `<!-- results: {name} -->`")
    PAGE.write_text(text)
    headlines.main()


if __name__ == "__main__":
    main()
