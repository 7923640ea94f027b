"""The end of a run: results.json, loss.png and a page of text."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import models
from s2jax.messages import counted
from training.config import Config
from training.corpus import Corpus
from training.evaluate import ContextScore, Tick, far_context, gzip_bits, heldout_bits, sample_text, unigram_bits
from training.files import write_whole
from training.metrics import HELDOUT, describe_speed, mfu, plot_loss
from training.recorder import require_finite
from training.step import Trainer


def resume_command(config: Config) -> str:
    """The command that resumes a run from the current directory."""
    flags = ["train.py", "--run-dir", str(config.run_dir)]
    cluster = config.devices
    if cluster.distributed:
        flags.append("--distributed")
    if cluster.coordinator is not None:
        flags += ["--coordinator", cluster.coordinator, "--num-processes", str(cluster.num_processes)]
        flags += ["--process-id", str(cluster.process_id)]
    return shlex.join([_python(), *flags])


def generate_command(config: Config) -> str:
    """The command that generates text with the trained model."""
    return shlex.join(
        [_python(), "-m", "models.generate", "--model", str(config.run_dir), "--prompt", "Once upon a time"]
    )


def _python() -> str:
    """The interpreter, from the directory that the command was given in if it lies there."""
    inside = os.path.relpath(sys.executable)
    return sys.executable if inside.startswith("..") else inside


def final_report(
    trainer: Trainer, params: Any, heldout: Corpus, *, step: int, tokens_per_second: float | None, tick: Tick
) -> tuple[str, OSError | None]:
    """Evaluates, writes `results.json` and `loss.png` into the run's directory.

    Every process takes part in the evaluation; the first writes `results.json`, after each part of the evaluation.

    Args:
        trainer: holds the compiled functions.
        params: of the model at `step`.
        heldout: documents kept out of training.
        step: optimizer steps done.
        tokens_per_second: mean over this process's training; None if it did no step.
        tick: see `training.evaluate`.

    Returns:
        The page to print, and the error of a file that could not be written.

    Raises:
        Diverged: the model gives the held-out text no finite bits.
    """
    config, flops = trainer.config, models.flops_per_token(trainer.model_config, trainer.config.input.seq_len)
    results = Results(Path(config.run_dir or ""))
    unit = "byte" if heldout.byte_level else "token"
    overlap = config.input.seq_len // 2
    bits = heldout_bits(trainer, params, heldout, overlap=overlap, tick=tick)
    require_finite(bits, step, results.run_dir / "model")
    baselines = {}
    if heldout.byte_level:
        baselines = {"byte_unigram": unigram_bits(heldout), "gzip_9_per_file": gzip_bits(heldout)}
    results.add(
        step=step,
        tokens_trained=step * config.input.batch_size * config.input.seq_len,
        parameters=models.param_count(trainer.model_config),
        **{f"{HELDOUT}{unit}": bits},
        heldout_documents=len(heldout.documents),
        heldout_tokens=heldout.num_tokens,
        baselines_bits_per_byte=baselines,
        tokens_per_second=tokens_per_second,
        model_flops_per_token=flops,
        mfu=None if tokens_per_second is None else mfu(tokens_per_second, flops),
        devices=f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        jax=jax.__version__,
    )
    contexts = far_context(trainer, params, heldout, tick=tick)
    results.add(far_context=[dataclasses.asdict(score) for score in contexts])
    sample = None
    if heldout.byte_level and config.output.sample_bytes:
        sample = sample_text(
            trainer,
            params,
            prompt=config.output.prompt,
            length=config.output.sample_bytes,
            temperature=config.output.temperature,
            seed=config.seed,
        )
    results.add(sample=sample)
    results.plot(unit)
    page = _page(config, heldout, bits, baselines, contexts, sample, step)
    page += [
        "",
        f"Speed        {describe_speed(tokens_per_second, flops) if tokens_per_second else 'no step was done'}",
        *(f"{title:<13}{results.run_dir / name}" for title, name in results.written.items()),
        f"Checkpoint   {results.run_dir / 'checkpoints' / str(step)}",
        f"Model        {results.run_dir / 'model'}",
        f"Try it with  {generate_command(config)}",
        f"Go on with   {resume_command(config)} --steps {2 * config.steps}",
        "             (warmup and cosine are drawn over all steps: the rates rise again)",
    ]
    return "\n".join(page), results.problem


class Results:
    """The files of a finished run's directory: written by the first process, errors kept until all is evaluated.

    Attributes:
        run_dir: the directory.
        written: names of the files that are whole, by their titles.
        problem: of a file that could not be written.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.written: dict[str, str] = {}
        self._values: dict[str, Any] = {}
        self.problem: OSError | None = None

    def add(self, **values: Any) -> None:
        """Writes `results.json` with what is known so far."""
        self._values |= values
        content = json.dumps(self._values, indent=2, allow_nan=False, default=str) + "\n"
        self._attempt("Results", "results.json", lambda path: write_whole(path, content))

    def plot(self, unit: str) -> None:
        """Draws `loss.png` from `metrics.jsonl`."""
        metrics, scale = self.run_dir / "metrics.jsonl", 1 / math.log(2)
        draw = lambda path: plot_loss(metrics, path, unit=f"bits per {unit}", scale=scale)  # noqa: E731
        self._attempt("Loss plot", "loss.png", draw)

    def _attempt(self, title: str, name: str, write: Callable[[Path], None]) -> None:
        if jax.process_index() == 0:
            try:
                write(self.run_dir / name)
                self.written[title] = name
            except OSError as error:
                self.written.pop(title, None)
                self.problem = error


def _page(
    config: Config,
    heldout: Corpus,
    bits: float,
    baselines: dict[str, float],
    contexts: list[ContextScore],
    sample: str | None,
    step: int,
) -> list[str]:
    unit = "byte" if heldout.byte_level else "token"
    return [
        f"Held out, never trained on: {counted(len(heldout.documents), 'document')}, "
        f"{counted(heldout.num_tokens, unit)}; "
        f"each scored with {config.input.seq_len // 2:,} or more before it, where there are",
        *_table([("this model", bits), *_baseline_rows(baselines)], f"bits per {unit}"),
        "",
        *_context_lines(contexts, unit),
        *([] if sample is None else ["", f"Sample at temperature {config.output.temperature:g}:", *_indented(sample)]),
    ]


def _baseline_rows(baselines: dict[str, float]) -> list[tuple[str, float]]:
    titles = {"gzip_9_per_file": "gzip -9, per file", "byte_unigram": "byte frequencies alone"}
    return sorted(((titles[name], bits) for name, bits in baselines.items()), key=lambda row: row[1])


def _table(rows: list[tuple[str, float]], unit: str) -> list[str]:
    return [f"  {title:<24}{value:7.3f} {unit}" for title, value in rows]


def _context_lines(scores: list[ContextScore], unit: str) -> list[str]:
    if not scores:
        return ["Far context: no held-out document is longer than a row, so there is nothing to compare"]
    first = scores[0]
    wide = lambda score: f"  {score.context:>7,} {unit if score.context == 1 else f'{unit}s'} or more"  # noqa: E731
    lines = [f"Far context: the same {counted(first.windows * first.targets, unit)}, their context cut short and whole"]
    for score in scores[:-1]:
        error = "" if score.standard_error is None else f" ± {score.standard_error:.3f}"
        bits = f"{score.bits:7.3f} bits per {unit}, {score.excess:+.3f}{error} against the whole"
        lines.append(f"{wide(score)} {bits}")
    return [*lines, f"{wide(scores[-1])} {scores[-1].bits:7.3f} bits per {unit}: the whole"]


def _indented(text: str) -> list[str]:
    return ["  │ " + "".join(c if c.isprintable() else "·" for c in line) for line in text.splitlines()]
