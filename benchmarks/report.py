"""Writes the README's tables from benchmarks/results/*.json, between its `results` marks.

python benchmarks/report.py
"""

import json
import pathlib
import re

RESULTS = pathlib.Path(__file__).parent / "results"
README = RESULTS.parent.parent / "README.md"


def main() -> None:
    text = README.read_text()
    for name, make in (("schedules", schedules), ("attention_cpu", attention), ("train_tiny", training)):
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        mark = re.compile(rf"(<!-- results: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not mark.search(text):
            raise SystemExit(f"README.md has no place for {path.name}: expected `<!-- results: {name} -->`")
        text = mark.sub(
            lambda found, path=path, make=make: f"{found[1]}{make(json.loads(path.read_text()))}\n{found[2]}", text
        )
    README.write_text(text)


def origin(record: dict, name: str) -> str:
    return (
        f"[{name}.json](benchmarks/results/{name}.json): {record['date']}, jax {record['jax']}, {record['processor']}."
    )


def schedules(record: dict) -> str:
    lines = [
        "| point | block | density | ideal speedup | executed/ideal, forward | backward | compiled in |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        executed = [
            f"{row[key]:.2f}" if key in row else "–"
            for key in (f"{way} executed/ideal" for way in ("forward", "backward"))
        ]
        lines.append(
            f"| {row['point']} | {row['block']} | {row['density']:.4f} | {row['ideal speedup']:.1f}× "
            f"| {executed[0]} | {executed[1]} | {row['compile s']:.2f} s, {row['peak MB']:.0f} MB |"
        )
    return "\n".join([*lines, "", origin(record, "schedules")])


def attention(record: dict) -> str:
    lines = [
        "| point | dtype | density | ideal | forward | backward | temporaries, chunked dense's |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['point']} | {row['dtype']} | {row['density']:.3f} | {row['ideal speedup']:.1f}× "
        f"| {row['forward speedup']:.1f}× ({row['forward of ideal']:.0%} of ideal) "
        f"| {row['backward speedup']:.1f}× ({row['backward of ideal']:.0%}) "
        f"| {row['sparse temporaries MB']:.0f} MB, {row['chunked temporaries MB']:.0f} MB |"
        for row in record["rows"]
    ]
    return "\n".join([*lines, "", origin(record, "attention_cpu")])


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


if __name__ == "__main__":
    main()
