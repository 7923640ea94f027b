"""Trains a language model with sparsely-sharded attention: `python train.py --help`.

Read top to bottom: config → mesh → data → state → loop → report. The parts are in `training/`, the model in `models/`.
"""

from __future__ import annotations

from training.stopping import StopRequest, end_at_once_on_signals, ignore_signals

if __name__ == "__main__":
    end_at_once_on_signals()  # the imports below take seconds

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.extras import exit_for_missing

try:
    import jax

    import models
    import s2jax
    from models.checkpoints.pretrained import Checkpoint, Pretrained
    from models.compilation_cache import keep_compilations
    from s2jax.messages import counted
    from training.checkpoint import Checkpoints
    from training.cluster import agreeing, say, wait_for_all
    from training.command_line import flags_of, parse
    from training.config import Config, require
    from training.config_file import read_config
    from training.corpus import BYTE_VOCAB, Corpus, load_corpus, standard_library
    from training.data import process_share, to_devices, training_batches
    from training.ending import ended_by
    from training.evaluation_line import score_heldout, watched
    from training.files import write_whole
    from training.held_out import split
    from training.left_out import shown
    from training.memory import check_memory
    from training.mesh import batch_sharding, join_cluster, make_mesh, with_batch_size
    from training.optimizer import schedule_change
    from training.output import tolerate_any_text
    from training.packing import PackedRows, arrays, empty_row
    from training.pretrained import checkpoint_of, export, exported, from_scratch, in_tokens, pretrained_state
    from training.profile import Profile
    from training.recorder import Diverged, Recorder
    from training.report import final_report, resume_command
    from training.run_dir import CONFIG, run_dir, with_run_dir
    from training.run_lock import RunLock
    from training.step import Trainer, TrainState
    from training.trackers import check_packages
    from training.unused import unused
except ModuleNotFoundError as missing:
    exit_for_missing(missing, "train.py", "train")


def main(argv: Sequence[str]) -> int:
    """Runs what the flags ask for.

    Returns:
        The exit code: 0 done or stopped on request; 1 the run cannot go on: it diverged, or its directory cannot be
        written; 2 bad input; 130 ended at once by a second Ctrl-C. All but 0 are said in one line.
    """
    tolerate_any_text()
    keep_compilations()
    config = run = None
    with StopRequest() as stop, contextlib.ExitStack() as held:
        try:
            config = parse(argv)
            join_cluster(config)
            stop.in_cluster = jax.process_count() > 1
            run = prepare(config, held, flags_of(argv))
            train(run, stop, held)
            stop.over()
            return 0
        except BaseException as error:  # those that are no end of a run are raised again
            stop.over()
            return ended_by(error, *((run.config, run.checkpoints) if run else (config, None)))


# ---------------------------------------------------------------------------------------------------------------------
# Before the loop


@dataclass(frozen=True)
class Run:
    """State and settings of the loop, made by `prepare`."""

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
    model_of: Callable[[Any], Pretrained]  # of parameters


def prepare(config: Config, held: contextlib.ExitStack, flags: Collection[str]) -> Run:
    """Data, state and the compiled step; from the newest checkpoint of --run-dir, if it has one.

    Args:
        config: of the run.
        held: is given what is to be let go of when the run ends.
        flags: of the command line.

    Raises:
        ValueError: in one line, what was expected and what came.
        OSError: the run's directory cannot be written.
        Failed: one of the two, on another process.
    """
    mesh = make_mesh(config)
    config = with_batch_size(config, mesh)
    check_memory(config, mesh)
    processes = counted(jax.process_count(), "process", "processes")
    shape = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    say(f"{jax.device_count()} × {jax.devices()[0].device_kind} as {shape}; {processes}")

    with agreeing(ValueError, OSError):
        check_packages(config)
        checkpoint = None if config.pretrained is None else checkpoint_of(config)
        train_set, heldout = load_data(config, checkpoint, flags)
        config = with_run_dir(config)
        if jax.process_index() == 0:
            held.callback(RunLock(run_dir(config), say=say).release)
    rows = PackedRows(train_set, config.input.seq_len)

    trainer = Trainer(config, mesh)
    say(f"Model {config.name}: {models.param_count(trainer.model_config):,} parameters, {layers_of(trainer)}")
    checkpoints = Checkpoints(
        run_dir(config) / "checkpoints",
        keep=config.output.keep,
        say=say,
        ended_by=lambda error: ended_by(error, config, checkpoints),
    )
    held.callback(checkpoints.close)
    data_name = f"{train_set.fingerprint()} seq_len {config.input.seq_len} seed {config.seed}"
    state, first_step, first_row = start_state(trainer, checkpoints, data_name, checkpoint)
    saved = run_dir(config) / CONFIG
    if first_step and saved.exists() and (line := schedule_change(read_config(saved), config, first_step)):
        say(line)

    began = time.perf_counter()
    step = compile_step(trainer)
    say(f"Compiled the training step in {time.perf_counter() - began:.0f} s")
    with agreeing(OSError):
        content = config.to_json()
        if jax.process_index() == 0 and not (saved.exists() and saved.read_text("utf-8") == content):
            write_whole(saved, content)  # last, so that flags that a checkpoint does not fit are not kept
    scratch = functools.partial(from_scratch, config, byte_level=heldout.byte_level)
    model_of = scratch if checkpoint is None else checkpoint.with_parameters
    return Run(config, trainer, step, rows, heldout, checkpoints, state, first_step, first_row, data_name, model_of)


def layers_of(trainer: Trainer) -> str:
    """The number of layers, and the pattern of the sparse ones."""
    config = trainer.model_config
    sparse = sum(config.layer_pattern(layer) != s2jax.Dense() for layer in range(config.num_layers))
    kinds = f"{sparse} of them sparse: {config.pattern}" if sparse else "all dense"
    return f"{counted(config.num_layers, 'layer')}, {kinds}"


def load_data(config: Config, checkpoint: Checkpoint | None, flags: Collection[str] = ()) -> tuple[Corpus, Corpus]:
    """Training and held-out documents, in the tokens of a checkpoint if there is one; says what options do not do."""
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
    for line in unused(config, corpus, flags):
        say(line)
    train_set, heldout, how = split(corpus, options.heldout, by_name=options.named_splits)
    documents, unit = counted(len(train_set.documents), "document"), "byte" if corpus.byte_level else "token"
    say(f"Data {shown(name)}: {documents}, {counted(train_set.num_tokens, unit)} to train on")
    say(f"Held out: {how}")
    if train_set.left_out:
        say(f"Left out of the data: {train_set.left_out}")
    if heldout.num_tokens > options.heldout_tokens:
        first = counted(options.heldout_tokens, unit)
        say(f"The report scores the first {first} of what is held out (--heldout-tokens)")
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
    try:
        return trainer.step.lower(trainer.abstract_state, batch).compile()
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(f"expected a training step that compiles, got {shown(error, 400)}") from error


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(run: Run, stop: StopRequest, held: contextlib.ExitStack) -> None:
    """The loop and, if it came to its end, the model and the report.

    Raises:
        Diverged: a loss, a gradient or a state holds numbers that are not finite.
        SaveFailed, OSError: the run's directory cannot be written; `Failed` on other processes.
        Stopped: on request, after the model was written.
    """
    config, byte_level = run.config, run.heldout.byte_level
    with stop.deferred():
        recorder = Recorder(config, run.trainer, byte_level=byte_level, from_step=run.first_step)
        held.callback(recorder.close)
        state, done = loop(run, recorder, stop)
        recorder.close()
        run.checkpoints.wait()
        if done < config.steps:
            say(f"Stopped after step {done} of {config.steps}; saved. Go on with\n  {resume_command(config)}")
            return
        export(config, run.model_of, state.params)  # before all that only reads it
        say(f"Model written to {exported(config)}. Evaluating …")
    stop.check()
    speed = recorder.progress.tokens_per_second() if recorder.progress.trained_steps else None
    line, tick = watched("Evaluating", stop)
    page, problem = final_report(run.trainer, state.params, run.heldout, step=done, tokens_per_second=speed, tick=tick)
    line.finish()
    say("\n" + page)
    with agreeing(OSError):
        if problem is not None:
            raise problem
    wait_for_all("the report is written")


def loop(run: Run, recorder: Recorder, stop: StopRequest) -> tuple[TrainState, int]:
    """Trains until the last step or a request to stop, and saves; the state, and the steps that were done."""
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
    profile = Profile(options.profile, run_dir(config) / "profile", say)
    if options.profile and not run.first_step < options.profile[1] <= config.steps:
        say(f"Of the steps {run.first_step + 1} to {config.steps} --profile traces none, or not to its end")
    done = run.first_step
    for done in range(run.first_step + 1, config.steps + 1):
        profile.before(done)
        state, metrics = run.step(state, to_devices(next(batches), sharding, batch_size))
        profile.after(done, state)
        recorder.add(done, metrics)
        stopping, last = stop.reached(), done == config.steps
        scoring = options.eval_every and done % options.eval_every == 0 and not last
        saving = stopping or last or done % options.checkpoint_every == 0
        if saving or scoring or done % options.log_every == 0:
            recorder.flush()
        if scoring and not stopping:
            stopping = score_heldout(trainer, state.params, run.heldout, recorder, stop, step=done)
            saving = saving or stopping
        if saving:
            if spoiled := trainer.not_finite(state):
                raise Diverged(f"the update of step {done} gave numbers in {spoiled[0]} that are not finite", done + 1)
            row = run.first_row + (done - run.first_step) * batch_size
            run.checkpoints.save(done, state._asdict(), {"row": row, "data": run.data_name})
            recorder.progress.restart_clock()
        if stopping:
            break
    profile.close()
    return state, done


if __name__ == "__main__":
    code = main(sys.argv[1:])
    ignore_signals()
    sys.exit(code)
