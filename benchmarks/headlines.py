"""The README's table of figures, made from benchmarks/results/*.json; `python -m benchmarks.report` writes it."""

import json
import re

from benchmarks.record import RESULTS

README = RESULTS.parent.parent / "README.md"
MARK = re.compile(r"(<!-- results: headlines -->\n).*?(\n<!-- end -->)", re.DOTALL)
TABLE = """\
| what | figure | file |
|---|---|---|
| blocks that Phi-3's pattern reads at 131,072 tokens, as a share of those of dense attention | {phi3[density]:.1%}, a speedup of at most {phi3[ideal speedup]:.1f}× | {schedules} |
| compiling the pattern of a 70B model for 1,048,576 tokens, in numpy | {million[compile s]:.2f} s | {schedules} |
| CPU, 8,192 tokens, {cpu[density]:.0%} of the blocks: forward over dense | {cpu[forward speedup]:.1f}× ({cpu[forward of ideal]:.0%} of ideal) | {attention_cpu} |
| the same, backward | {cpu[backward speedup]:.1f}× ({cpu[backward of ideal]:.0%} of ideal) | {attention_cpu} |
| CPU, time for one token after 32,768 tokens: sparse cache, dense cache | {token[ms]:.1f} ms, {token[dense ms]:.1f} ms | {decode} |
| memory of these two caches | {token[cache MiB]:.0f} MiB, {token[dense MiB]:.0f} MiB | {decode} |
| Hopper kernels compiled by ptxas, and those of them that spill registers in a step | {compiled}, {spilling} | {ptxas_report} |
| TPU v6e, forward, scheduled instruction bundles over those of JAX's splash attention: dense, sparse | {tpu_dense[of splash]:.2f}, {tpu_sparse[of splash]:.2f} | {tpu_schedule} |
| SmolLM2-135M with {memory:.0%} of its KV cache: perplexity over dense, and after 40 steps of fine-tuning | {before:+.1%}, {after:+.1%} | {fine_tuning} |
| `make train` on two CPU cores: held-out bits per byte, and gzip's | {trained[heldout_bits_per_byte]:.2f}, {trained[baselines_bits_per_byte][gzip_9_per_file]:.2f} | {train_tiny} |"""  # noqa: E501 - as Markdown has it


def table() -> str:
    records = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}

    def row(name: str, key: str = "rows", **wanted) -> dict:
        [found] = [row for row in records[name][key] if wanted.items() <= row.items()]
        return found

    tpu = {"chip": "v6e", "pass": "forward"}
    dense = row("fine_tuning", reads="dense")
    tuned = row("fine_tuning", pattern="LocalStride(64, 4, 8) | FirstBlocks(1)", **{"dense layers": []})
    kernels = records["ptxas_report"]["rows"]
    return TABLE.format(
        phi3=row("schedules", case="phi3-128k", block=64),
        million=row("schedules", case="s2-70b at 1M"),
        cpu=row("attention_cpu", case="cpu-8k"),
        token=row("decode", tokens=32768, batch=1),
        compiled=len(kernels),
        spilling=sum(any(kernel["spills a step"]) for kernel in kernels),
        tpu_dense=row("tpu_schedule", "ratios", case="dense", **tpu),
        tpu_sparse=row("tpu_schedule", "ratios", case="dkernel-32k", **tpu),
        memory=tuned["cache MiB"] / dense["cache MiB"],
        before=tuned["before"] / dense["before"] - 1,
        after=tuned["after"] / dense["after"] - 1,
        trained=row("train_tiny"),
        **{name: f"[{name}](benchmarks/results/{name}.json)" for name in records},
    )


def written(text: str) -> str:
    """The README's text with the table of today's files."""
    return MARK.sub(lambda found: f"{found[1]}{table()}{found[2]}", text)


def main() -> None:
    README.write_text(written(README.read_text()))
