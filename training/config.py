"""The settings of a run: frozen dataclasses whose fields are flags of train.py, and a recipe for each preset.

Every flag is checked where the values meet (`__post_init__`), so a config that exists is a config that makes sense;
what depends on the devices is checked in `training.mesh`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import models
from models.checkpoints.pretrained import open_checkpoint
from models.config import TransformerFields
from s2jax.messages import counted
from s2jax.patterns import parse_pattern
from training.left_out import shown

# Attention backends, each with the platform that it needs.
IMPLEMENTATIONS: dict[str, str | None] = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu", "xla": None, "reference": None}


def require(condition: bool, flag: str, expected: str, got: object) -> None:
    """Raises the one-line ValueError that bad values on the command line end in."""
    if not condition:
        raise ValueError(f"{flag}: expected {expected}, got {got}")


def require_path(flag: str, path: str) -> None:
    """Raises ValueError where a flag's value is no path, or one on a bucket."""
    require(bool(path.strip()) and "\0" not in path, flag, "a path", repr(path))
    bucket = re.match("[A-Za-z][A-Za-z0-9+.-]*:/", path)
    require(not bucket, flag, "a path of a file system (copy the files, or mount the bucket)", shown(path))


LARGEST = 2**31 - 1  # steps and sizes are 32-bit numbers on the device


def _require_counts(options: object, *names: str, least: int = 1, most: int = LARGEST) -> None:
    for name in names:
        value = getattr(options, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        flag = f"--{name.replace('_', '-')}"
        require(whole and value >= least, flag, f"a whole number of at least {least}", shown(repr(value)))
        require(value <= most, flag, f"a whole number of at most {most}", shown(value))


def _require_paths(options: object, *names: str) -> None:
    """Checks options that name a file or directory, or are None."""
    for name in names:
        if getattr(options, name) is not None:
            require_path(f"--{name.replace('_', '-')}", getattr(options, name))


@dataclass(frozen=True)
class DataOptions:
    """Options for reading --data and cutting it into rows."""

    seq_len: int = 1024
    """Tokens in a row: documents are packed into rows of this length, and attention sees no further."""
    batch_size: int = 0
    """Rows in a step, over all devices; 0 is the fewest that fill them: data × fsdp × --accumulate."""
    heldout: float = 0.02
    """Share of the tokens that is held out of training, for the report at the end."""
    named_splits: bool = True
    """Hold out the files named as a validation split, such as val.bin beside train.bin, instead of a share."""
    heldout_tokens: int = 150_000
    """Most tokens of it that the report scores."""
    text_field: str = "text"
    """Field of a .jsonl line that holds its text."""
    token_dtype: Literal["uint16", "uint32"] = "uint16"
    """Type of the tokens in a .bin file."""
    end_token: int | None = None
    """Token id that closes a document in a token file; None takes each file as one document."""

    def __post_init__(self):
        _require_counts(self, "batch_size", least=0, most=2**24)
        _require_counts(self, "heldout_tokens", most=2**62)
        _require_counts(self, "seq_len", least=2, most=2**24)
        require(bool(self.text_field), "--text-field", "the name of a field", repr(self.text_field))
        require(0 < self.heldout < 1, "--heldout", "a share between 0 and 1", self.heldout)
        if self.end_token is not None:
            _require_counts(self, "end_token", least=0)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(TransformerFields):
    """Size and numerics of the model; the defaults are the preset's."""

    pattern: str
    implementation: str = "auto"

    def __post_init__(self):
        _require_counts(self, "num_layers", most=1000)
        _require_counts(self, "num_heads", "num_kv_heads", "head_dim", most=4096)
        _require_counts(self, "vocab_size", "d_model", "d_ff", most=2**24)
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"--{name.replace('_', '-')}", "a positive number", value)
        known = ("auto", *IMPLEMENTATIONS)
        require(
            self.implementation in known, "--implementation", f"one of {', '.join(known)}", shown(self.implementation)
        )
        self.transformer()  # raises where the values do not fit together

    @classmethod
    def of(cls, config: models.TransformerConfig) -> ModelOptions:
        """The options that `transformer()` turns back into `config`."""
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(cls)}
        values["rope_scaling"] = None if config.rope_scaling is None else tuple(config.rope_scaling)
        return cls(**values | {"pattern": str(config.pattern), "implementation": config.implementation or "auto"})

    def transformer(self) -> models.TransformerConfig:
        """The model's config.

        Raises:
            ValueError: a value is out of range, or two do not fit together.
        """
        try:
            pattern = parse_pattern(self.pattern)
        except ValueError as error:
            raise ValueError(f"--pattern: {shown(error, 400)}") from error
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["implementation"] = None if self.implementation == "auto" else self.implementation
        values["pattern"] = pattern
        return models.TransformerConfig(**values)


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer and schedule: linear warmup, then a cosine."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """Optimizer of the weight matrices; Adam always updates embeddings, output projection and gains."""
    learning_rate: float | None = None
    """Peak rate of the weight matrices; None is 0.02 for muon and 0.003 for adamw."""
    rest_learning_rate: float = 3e-3
    """Peak rate of embeddings, output projection and gains."""
    warmup_steps: int = 20
    """Steps over which the rates rise to their peaks; at most half of all steps."""
    final_fraction: float = 0.05
    """Share of the peak rates that the cosine ends at."""
    weight_decay: float = 0.01
    """Decay of the weight matrices per step, times the rate; nothing else decays."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after another: less memory, the same gradient."""

    def __post_init__(self):
        _require_counts(self, "accumulate")
        _require_counts(self, "warmup_steps", least=0)
        require(self.optimizer in ("muon", "adamw"), "--optimizer", "muon or adamw", self.optimizer)
        for name in ("learning_rate", "rest_learning_rate", "clip_norm"):
            value = getattr(self, name)
            if name == "learning_rate" and value is None:  # it follows the optimizer
                continue
            require(0 < value < math.inf, f"--{name.replace('_', '-')}", "a positive number", value)
        require(0 <= self.weight_decay < math.inf, "--weight-decay", "a number from 0 up", self.weight_decay)
        require(0 <= self.final_fraction <= 1, "--final-fraction", "a share from 0 to 1", self.final_fraction)

    @property
    def matrix_rate(self) -> float:
        """Peak rate of the weight matrices."""
        if self.learning_rate is not None:
            return self.learning_rate
        return {"muon": 0.02, "adamw": 3e-3}[self.optimizer]


@dataclass(frozen=True)
class DeviceOptions:
    """Devices and processes."""

    mesh: tuple[int, int, int] = (1, -1, 1)
    """Devices along the axes data, fsdp and tensor; -1 (once) takes all that are left."""
    distributed: bool = False
    """Join a cluster of processes; TPU pods and SLURM are recognised, elsewhere give the three flags below."""
    coordinator: str | None = None
    """host:port of process 0."""
    num_processes: int | None = None
    """Processes in the cluster."""
    process_id: int | None = None
    """Index of this process, from 0."""
    join_timeout: int = 300
    """Seconds that a process waits for the others before it gives up."""

    def __post_init__(self):
        fits = len(self.mesh) == 3 and all(n >= 1 or n == -1 for n in self.mesh) and self.mesh.count(-1) <= 1
        require(fits, "--mesh", "three device counts, one of which may be -1", " ".join(map(str, self.mesh)))
        _require_counts(self, "join_timeout")
        named = {"--coordinator": self.coordinator, "--num-processes": self.num_processes}
        named["--process-id"] = self.process_id
        waits = self.distributed or self.join_timeout == DeviceOptions.join_timeout
        require(waits, "--join-timeout", "--distributed beside it", "it alone")
        given = [flag for flag, value in named.items() if value is not None]
        require(not given or self.distributed, given[0] if given else "", "--distributed beside it", "it alone")
        require(len(given) in (0, 3), "--distributed", f"all or none of {', '.join(named)}", " ".join(given))
        if given:
            _require_counts(self, "num_processes")
            _require_counts(self, "process_id", least=0)


@dataclass(frozen=True)
class OutputOptions:
    """Checkpoints, progress and the report."""

    checkpoint_every: int = 200
    """Steps between checkpoints; one is also written at the end and on SIGTERM or Ctrl-C."""
    keep: int = 3
    """Checkpoints kept, the newest ones."""
    log_every: int = 10
    """Steps between lines of progress, and between looks for a loss that is no number."""
    eval_every: int = 0
    """Steps between scores of the held-out text while training; 0 scores it at the end alone."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into tensorboard/ of the run's directory."""
    wandb: str | None = None
    """Weights & Biases project to send the metrics to, if its package is installed."""
    profile: tuple[int, int] | None = None
    """First and last step to trace with jax.profiler, into profile/ of the run's directory."""
    prompt: str = "def "
    """Beginning of the text sample at the end (byte-level text only)."""
    sample_bytes: int = 300
    """Length of that sample, at most what a row has left after the prompt; 0 leaves it out."""
    temperature: float = 0.7
    """Temperature of that sample; 0 takes the likeliest byte each time."""

    def __post_init__(self):
        _require_counts(self, "checkpoint_every", "keep", "log_every")
        text = self.prompt.encode(errors="replace").decode()
        require(text == self.prompt, "--prompt", "text in UTF-8", shown(self.prompt))
        _require_counts(self, "sample_bytes", "eval_every", least=0)
        if self.profile is not None:
            fits = len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]
            require(fits, "--profile", "a first and a last step, from 1 on", " ".join(map(str, self.profile)))
        require(0 <= self.temperature < math.inf, "--temperature", "a number from 0 up", self.temperature)


@dataclass(frozen=True)
class Config:
    """Trains a hybrid of dense and sparsely-sharded attention. Ctrl-C saves; the same --run-dir goes on from there.

    With no --data it trains on the Python standard library's own sources: byte by byte, or, with --pretrained, in that
    model's tokens.
    """

    model: ModelOptions
    preset: str | None = "tiny"
    """Model and recipe that the defaults of all flags come from."""
    pretrained: str | None = None
    """Hugging Face directory or GGUF file to start from instead of a preset: its shape, weights and tokenizer."""
    data: str | None = None
    """Text, .jsonl, .parquet, .array_record, tokens (.npy, .bin), or a directory of these; None is Python's library."""
    steps: int = 1000
    """Optimizer steps, of the whole run."""
    run_dir: str | None = None
    """Directory of results and checkpoints; a run found there is resumed. None makes a new one under runs/."""
    seed: int = 0
    """Random seed of the initial weights, the order of the rows and the sample."""
    input: DataOptions = field(default_factory=DataOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    devices: DeviceOptions = field(default_factory=DeviceOptions)
    output: OutputOptions = field(default_factory=OutputOptions)

    def __post_init__(self):
        _require_counts(self, "steps")
        _require_counts(self, "seed", least=0)
        _require_paths(self, "data", "run_dir", "pretrained")
        one = (self.preset is None) != (self.pretrained is None)
        require(one, "--pretrained", "it or --preset, one of the two", f"{self.pretrained} and {self.preset}")
        rows, parts = self.input.batch_size, self.optimizer.accumulate
        require(rows % parts == 0, "--accumulate", f"a divisor of the {counted(rows, 'row')} of a batch", parts)
        end, vocab_size = self.input.end_token, self.model.vocab_size
        require(end is None or end < vocab_size, "--end-token", f"a token id below --vocab-size {vocab_size}", end)

    @property
    def name(self) -> str:
        """The preset's, or the checkpoint's."""
        return self.preset or Path(self.pretrained or "").resolve().name.removesuffix(".gguf")

    def to_json(self) -> str:
        """The file that `config_file.read_config` reads.

        It lacks this process's place in a cluster, which the next run may not share.
        """
        single = DeviceOptions(mesh=self.devices.mesh)
        self = dataclasses.replace(self, devices=single)
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def recipe(preset: str) -> Config:
    """The defaults of a run with the model `models.PRESETS[preset]`.

    `tiny` takes about five minutes on two CPU cores. The others are the paper's shapes (S2-Attention, arXiv 2407.17678)
    at four million tokens a step, with rates usual at these sizes; they want a cluster and --data.

    Raises:
        ValueError: there is no such preset.
    """
    require(preset in models.PRESETS, "--preset", f"one of {', '.join(models.PRESETS)}", shown(preset))
    model = ModelOptions.of(models.PRESETS[preset])
    if preset == "tiny":  # one row a step: within five minutes, many small steps beat fewer large ones by far
        return Config(model, steps=1100, optimizer=OptimizerOptions(rest_learning_rate=0.05))
    return Config(
        model,
        preset=preset,
        steps=75_000,
        input=DataOptions(seq_len=8192, batch_size=512, heldout=0.0005),
        optimizer=OptimizerOptions(optimizer="adamw", learning_rate=3e-4, rest_learning_rate=3e-4, warmup_steps=2000),
        output=OutputOptions(checkpoint_every=1000),
    )


def fine_tuning(path: str) -> Config:
    """The defaults of a run that starts from pretrained weights: a hundred steps at a low rate, dense.

    Raises:
        ValueError: the checkpoint cannot be read; in one line.
    """
    require_path("--pretrained", path)
    checkpoint = open_checkpoint(path)
    return Config(
        ModelOptions.of(checkpoint.config),
        preset=None,
        pretrained=path,
        steps=100,
        input=DataOptions(seq_len=min(4096, checkpoint.max_context)),
        optimizer=OptimizerOptions(
            optimizer="adamw", learning_rate=1e-4, rest_learning_rate=1e-4, warmup_steps=10, weight_decay=0.0
        ),
        output=OutputOptions(checkpoint_every=50, keep=1),
    )
