"""Options that have no effect beside the others and the data: none goes unused without a line."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import s2jax
from training.config import Config, DataOptions, OutputOptions
from training.corpus import JSONL_SUFFIXES
from training.documents import Corpus
from training.file_listing import suffix_of
from training.record_files import RECORD_SUFFIXES


def unused(config: Config, corpus: Corpus, flags: Collection[str]) -> Iterator[str]:
    """A line for each option that was given, in any way, and has no effect.

    Args:
        config: of the run.
        corpus: all its data, in the tokens that it trains on.
        flags: given on the command line. Other options count as given if they are not the default.
    """

    def given(options: Any, default: Any, *names: str) -> list[str]:
        named = {f"--{name.replace('_', '-')}": name for name in names}
        changed = {flag for flag, name in named.items() if getattr(options, name) != getattr(default, name)}
        return [flag for flag in named if flag in flags or flag in changed]

    def lines(found: list[str], why: str) -> Iterator[str]:
        verb = "has" if len(found) == 1 else "have"
        if found:
            yield f"{' and '.join(found)} {verb} no effect: {why}"

    output, data = config.output, config.input
    if not corpus.byte_level:
        found = given(output, OutputOptions(), "prompt", "sample_bytes", "temperature")
        yield from lines(found, "the sample at the end is of models of bytes alone")
    elif output.sample_bytes == 0:
        found = given(output, OutputOptions(), "prompt", "temperature")
        yield from lines(found, "--sample-bytes 0 leaves the sample out")
    suffixes = {suffix_of(Path(name)) for name in corpus.files}
    if ".bin" not in suffixes:
        yield from lines(given(data, DataOptions(), "token_dtype"), "the data has no .bin file")
    if not suffixes & {*JSONL_SUFFIXES, *RECORD_SUFFIXES}:
        yield from lines(given(data, DataOptions(), "text_field"), "the data has no .jsonl file and no records")
    if output.eval_every >= config.steps:
        yield f"--eval-every has no effect: the last of the {config.steps:,} steps is scored in any case"
    model = config.model.transformer()
    if all(model.layer_pattern(layer) == s2jax.Dense() for layer in range(model.num_layers)):
        dense = model.pattern == s2jax.Dense()
        if "--dense-layers" in flags and model.dense_layers and dense:
            yield "--dense-layers has no effect: --pattern is dense in every layer"
        if "--pattern" in flags and not dense:
            yield "--pattern has no effect: --dense-layers names every layer"
