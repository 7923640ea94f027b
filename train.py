"""Trains a language model with sparsely-sharded attention: `python train.py --help`.

Read top to bottom: config → mesh → data → state → loop → report. The parts are in `training/`, the model in `models/`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

import models
import s2jax
from models.pretrained import Checkpoint
from training.checkpoint import Checkpoints, StopRequest
from training.command_line import parse
from training.config import Config, require
from training.config_file import read_config
from training.corpus import BYTE_VOCAB, Corpus, load_corpus, standard_library
from training.data import process_share, to_devices, training_batches
from training.held_out import split
from training.left_out import shown
from training.mesh import batch_sharding, join_cluster, make_mesh, with_batch_size
from training.metrics import MetricsLog, Progress, mfu
from training.optimizer import schedule_change
from training.packing import PackedRows, arrays, empty_row
from training.pretrained import checkpoint_of, export, in_tokens, pretrained_state
from training.report import final_report, generate_command, resume_command
from training.step import Metrics, Trainer, TrainState


class Diverged(Exception):
    """The loss or the gradient is no number any more."""


def say(line: str) -> None:
    """Prints once, whatever the number of processes."""
    if jax.process_index() == 0:
        print(line, flush=True)


def main(argv: Sequence[str]) -> int:
    """Runs what the flags ask for.

    Returns:
        The exit code: 0 done or stopped on request, 1 diverged, 2 bad input, said in one line.
    """
    try:
        config = parse(argv)
        join_cluster(config.devices)
        run = prepare(config)
    except ValueError as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        return train(run)
    except Diverged as error:
        run.checkpoints.wait()
        last = run.checkpoints.steps[-1:]
        good = f"checkpoint {last[0]} in {run.checkpoints.directory} is good" if last else "there is no checkpoint yet"
        print(f"train.py: {error}; stopped. {good}", file=sys.stderr)
        if last:
            say(f"Go on from it with lower rates:  {resume_command(run.config)} --learning-rate …")
        return 1
    finally:
        run.checkpoints.close()


# ---------------------------------------------------------------------------------------------------------------------
# Before the loop


@dataclass(frozen=True)
class Run:
    """What the loop needs, made by `prepare`."""

    config: Config
    trainer: Trainer
    step: jax.stages.Compiled
    rows: PackedRows
    heldout: Corpus
    checkpoints: Checkpoints
    state: TrainState
    first_step: int
    first_row: int  # of the shuffled order
    data_name: str
    checkpoint: Checkpoint | None  # of --pretrained


def prepare(config: Config) -> Run:
    """Data, state and the compiled step; from the newest checkpoint of --run-dir, if it has one.

    Raises:
        ValueError: in one line, what was expected and what came.
    """
    mesh = make_mesh(config)
    config = with_batch_size(config, mesh)
    shape = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    say(f"{jax.device_count()} × {jax.devices()[0].device_kind} as {shape}; {jax.process_count()} process(es)")

    checkpoint = None if config.pretrained is None else checkpoint_of(config)
    train_set, heldout = load_data(config, checkpoint)
    config = with_run_dir(config)
    rows = PackedRows(train_set, config.input.seq_len)

    trainer = Trainer(config, mesh)
    say(f"Model {config.name}: {models.param_count(trainer.model_config):,} parameters, {layers_of(trainer)}")
    checkpoints = Checkpoints(run_dir(config) / "checkpoints", keep=config.output.keep, say=say)
    data_name = f"{train_set.fingerprint()} seq_len {config.input.seq_len} seed {config.seed}"
    state, first_step, first_row = start_state(trainer, checkpoints, data_name, checkpoint)
    saved = run_dir(config) / "config.json"
    if first_step and saved.exists() and (line := schedule_change(read_config(saved), config, first_step)):
        say(line)

    began = time.perf_counter()
    step = compile_step(trainer)
    say(f"Compiled the training step in {time.perf_counter() - began:.0f} s")
    if jax.process_index() == 0:  # last, so that flags that a checkpoint does not fit are not kept
        (run_dir(config) / "config.json").write_text(config.to_json())
    return Run(config, trainer, step, rows, heldout, checkpoints, state, first_step, first_row, data_name, checkpoint)


def layers_of(trainer: Trainer) -> str:
    """How many there are, and what the sparse ones read."""
    config = trainer.model_config
    sparse = sum(config.layer_pattern(layer) != s2jax.Dense() for layer in range(config.num_layers))
    return f"{config.num_layers} layers, {f'{sparse} of them sparse: {config.pattern}' if sparse else 'all dense'}"


def with_run_dir(config: Config) -> Config:
    """Names a new directory after the model and the time, if none is named, and makes it."""
    if config.run_dir is None:
        if jax.process_count() > 1:
            raise ValueError("--run-dir: expected a directory that all processes share, got none")
        name = f"runs/{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        config = dataclasses.replace(config, run_dir=name)
    try:
        run_dir(config).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--run-dir: expected a directory that can be made, got {error}") from error
    return config


def run_dir(config: Config) -> Path:
    return Path(config.run_dir or "")


def load_data(config: Config, checkpoint: Checkpoint | None) -> tuple[Corpus, Corpus]:
    """Training and held-out documents, in the tokens of a checkpoint if there is one."""
    options = config.input
    if config.data is None:
        corpus, name = standard_library(), "Python's standard library"
    else:
        corpus = load_corpus(
            Path(config.data),
            vocab_size=config.model.vocab_size,
            text_field=options.text_field,
            token_dtype=options.token_dtype,
            end_token=options.end_token,
        )
        name = config.data
    if checkpoint is not None:
        corpus = in_tokens(corpus, checkpoint)
    ends = options.end_token is None or not corpus.byte_level
    require(ends, "--end-token", "token files, as text is closed without it", f"text in {shown(name)}")
    fits = not corpus.byte_level or config.model.vocab_size >= BYTE_VOCAB
    require(fits, "--vocab-size", f"at least {BYTE_VOCAB} for byte-level text", config.model.vocab_size)
    train_set, heldout, how = split(corpus, options.heldout, by_name=options.named_splits)
    unit = "bytes" if corpus.byte_level else "tokens"
    say(f"Data {shown(name)}: {len(train_set.documents):,} documents, {train_set.num_tokens:,} {unit} to train on")
    say(f"Held out: {how}")
    if train_set.left_out:
        say(f"Left out of the data: {train_set.left_out}")
    if heldout.num_tokens > options.heldout_tokens:
        say(f"The report scores the first {options.heldout_tokens:,} {unit} of what is held out (--heldout-tokens)")
        heldout = heldout.first(options.heldout_tokens)
    return train_set, heldout


def start_state(
    trainer: Trainer, checkpoints: Checkpoints, data_name: str, pretrained: Checkpoint | None
) -> tuple[TrainState, int, int]:
    """State, step and data position to start from: the run's newest checkpoint's, or fresh ones."""
    restored = checkpoints.restore(trainer.abstract_state._asdict())
    if restored is None and pretrained is not None:
        return pretrained_state(trainer, pretrained), 0, 0
    if restored is None:
        return trainer.init(trainer.config.seed), 0, 0
    say(f"Going on from checkpoint {restored.step} in {checkpoints.directory}")
    if restored.position["data"] == data_name:
        return TrainState(**restored.state), restored.step, restored.position["row"]
    say("The data, --seq-len or --seed are others than the checkpoint's: reading the data from its beginning")
    return TrainState(**restored.state), restored.step, 0


def compile_step(trainer: Trainer) -> jax.stages.Compiled:
    """Compiles before the loop, so that the speed is the loop's, and unfit options end the run here."""
    sharding = batch_sharding(trainer.mesh)
    shape = (trainer.config.input.batch_size, trainer.config.input.seq_len)
    batch = {
        name: jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding)
        for name, array in arrays(empty_row(1)).items()
    }
    return trainer.step.lower(trainer.abstract_state, batch).compile()


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(run: Run) -> int:
    """The loop, and the report if it came to its end."""
    config, trainer, state = run.config, run.trainer, run.state
    batch_size, options = config.input.batch_size, config.output
    sharding = batch_sharding(trainer.mesh)
    batches = training_batches(
        run.rows,
        batch_size=batch_size,
        seed=config.seed,
        first_row=run.first_row,
        share=process_share(sharding, batch_size),
    )
    tokens_per_step = batch_size * config.input.seq_len
    recorder = Recorder(run, tokens_per_step)
    done = run.first_step
    with StopRequest() as stop:
        for done in range(run.first_step + 1, config.steps + 1):
            state, metrics = run.step(state, to_devices(next(batches), sharding, batch_size))
            recorder.add(done, metrics)
            stopping = stop.reached(done)
            saving = stopping or done == config.steps or done % options.checkpoint_every == 0
            if saving or done % options.log_every == 0:
                recorder.flush()
            if saving:
                row = run.first_row + (done - run.first_step) * batch_size
                run.checkpoints.save(done, state._asdict(), {"row": row, "data": run.data_name})
                recorder.progress.restart_clock()
            if stopping:
                break
    recorder.close()
    run.checkpoints.wait()
    if done < config.steps:
        say(f"Stopped after step {done} of {config.steps}; saved. Go on with\n  {resume_command(config)}")
        return 0
    say("Evaluating …")
    speed = recorder.progress.tokens_per_second() if recorder.progress.trained_steps else None
    say("\n" + final_report(trainer, state.params, run.heldout, step=done, tokens_per_second=speed))
    if run.checkpoint is not None:
        export(config, run.checkpoint, state.params)
        say(f"Try it with   {generate_command(config)}")
    return 0


class Recorder:
    """Collects the metrics of steps without waiting for them, and writes them out now and then."""

    def __init__(self, run: Run, tokens_per_step: int):
        config, first = run.config, jax.process_index() == 0
        self._flops = models.flops_per_token(run.trainer.model_config, config.input.seq_len)
        self._bits_key = f"bits_per_{'byte' if run.heldout.byte_level else 'token'}"
        self._pending: list[tuple[int, Metrics]] = []
        self._log = MetricsLog(run_dir(config) / "metrics.jsonl", from_step=run.first_step) if first else None
        self.progress = Progress(step=run.first_step, steps=config.steps, tokens_per_step=tokens_per_step, shown=first)

    def add(self, step: int, metrics: Metrics) -> None:
        """Keeps the arrays; the device may still be computing them."""
        self._pending.append((step, metrics))

    def flush(self) -> None:
        """Waits for the steps so far, writes them down and shows the last.

        Raises:
            Diverged: a loss or a gradient's norm is no finite number.
        """
        if not self._pending:
            return
        records = [(step, *map(float, metrics)) for step, metrics in jax.device_get(self._pending)]
        self._pending.clear()
        speed = self.progress.advance(records[-1][0], records[-1][1])
        for step, loss, grad_norm, rate in records:
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                self.close()
                raise Diverged(f"the loss is {loss} and the gradient's norm {grad_norm} at step {step}")
            if self._log is not None:
                self._log.write(
                    step=step,
                    loss=loss,
                    **{self._bits_key: loss / math.log(2)},
                    learning_rate=rate,
                    grad_norm=grad_norm,
                    tokens_per_second=speed,
                    mfu=mfu(speed, self._flops),
                )

    def close(self) -> None:
        """Ends the line of progress and the file."""
        self.progress.finish()
        if self._log is not None:
            self._log.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
