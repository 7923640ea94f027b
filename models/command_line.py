"""Common parts of the programs of this package: flags, loading of the model, exit codes."""

import argparse
import dataclasses
import difflib
import io
import os
import sys
import typing
import warnings
from collections.abc import Callable

import jax

from models.checkpoints import smollm2
from models.checkpoints.pretrained import Pretrained, load
from models.compilation_cache import keep_compilations
from models.interruption import none_lost
from models.sampling import Sampling
from s2jax import Dense, Pattern, PatternWarning
from s2jax.patterns import parse_pattern

MODEL_HELP = (
    "a GGUF file, a directory with config.json, a run of train.py, or org/name[@revision] on Hugging Face; by default "
    "SmolLM2-135M-Instruct, fetched"
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, which names the flag that was probably meant."""

    def __init__(self, **settings: typing.Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        """Parses as `parse_args` does, but a flag that comes twice is an error, unless it may be repeated."""
        words = sys.argv[1:] if argv is None else argv
        given = [word.partition("=")[0] for word in words]
        for action in self._actions:
            repeats = isinstance(action.default, list) or getattr(action, "repeats", False)
            if not repeats and sum(word in action.option_strings for word in given) > 1:
                self.error(f"argument {action.option_strings[0]}: expected once, got it twice")
        for flag, _, value in (word.partition("=") for word in words):
            if flag.startswith("--") and value == "--":  # argparse would take it away and leave an empty list
                self.error(f"argument {flag}: expected a value, got '--'")
        return self.parse_args(words)

    def error(self, message: str) -> typing.NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        for word in message.split() if message.startswith("unrecognized arguments") else ():
            near = difflib.get_close_matches(word.partition("=")[0], flags, 1)
            if word.startswith("-") and near:
                message += f"; did you mean {near[0]}?"
                break
        print(f"{self.prog}: {_one_line(message)} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def add_model_flags(parser: Parser) -> None:
    """The flags of a model that is loaded and run."""
    parser.add_argument("--model", help=MODEL_HELP)
    parser.add_argument(
        "--pattern",
        help="attention pattern, such as 'LocalStride(64, 16, 3)'; default the checkpoint's, or dense",
    )
    parser.add_argument(
        "--dense-layers", type=int, nargs="*", metavar="N",
        help="indices of the dense layers; default none with --pattern, else the checkpoint's",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of activations; default %(default)s"
    )
    parser.add_argument(
        "--implementation", choices=("xla", "reference", "mosaic_gpu", "mosaic_tpu"),
        help="attention backend; default that of the platform",
    )  # fmt: skip


def add_generation_flags(parser: Parser, *, system: str, max_new_tokens: int) -> None:
    """Adds the flags of a program that generates text: system message, model, choice of tokens, end of a text.

    Args:
        parser: to add them to.
        system: the help of --system.
        max_new_tokens: the default of --max-new-tokens.
    """
    parser.add_argument("--system", help=f"{system}; default the checkpoint's")
    add_model_flags(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, help="most tokens to generate; default %(default)s"
    )
    parser.add_argument(
        "--temperature", type=float, help="0 takes the most likely token; default the checkpoint's, or 0"
    )
    parser.add_argument(
        "--top-k", type=int, help="number of most likely tokens to sample from; default the checkpoint's"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        help="probability mass of the most likely tokens to sample from; default the checkpoint's",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="string that ends the text; may be repeated"
    )
    parser.add_argument("--seed", type=int, help="random seed, from 0 to 2**32 - 1; default 0")
    parser.add_argument(
        "--cache-dtype",
        choices=("float32", "bfloat16", "float16", "int8"),
        help="dtype of the KV cache; default that of --dtype",
    )


def check_generation_flags(given: argparse.Namespace) -> None:
    """Checks the flags of `add_generation_flags` before the model is loaded.

    Raises:
        ValueError: in one line, if a value is out of range.
    """
    Sampling(**_asked(given))
    if given.system is not None:
        check_text("--system", given.system)
    if given.seed is not None and not 0 <= given.seed < 1 << 32:
        raise ValueError(f"--seed must be from 0 to {(1 << 32) - 1}, got {given.seed}")
    if not 1 <= given.max_new_tokens < 1 << 31:
        raise ValueError(f"--max-new-tokens must be from 1 to {(1 << 31) - 1}, got {given.max_new_tokens}")
    for stop in given.stop:
        check_text("--stop", stop)
        if not stop:
            raise ValueError("--stop must be a text of at least one character, got none")


def decoder_settings(given: argparse.Namespace, pretrained: Pretrained) -> dict[str, typing.Any]:
    """The arguments of a `Decoder` that the flags and, where they are silent, the checkpoint ask for.

    Flags without effect are named on stderr.

    Raises:
        ValueError: no flag is given, and the checkpoint asks for what is not supported.
    """
    asked = _asked(given)
    sampling = dataclasses.replace(pretrained.sampling, **asked) if asked else pretrained.own_sampling()
    if sampling.temperature == 0:
        for flag, value in (("--top-k", given.top_k), ("--top-p", given.top_p), ("--seed", given.seed)):
            if value is not None:
                say(f"{flag} has no effect: at --temperature 0 the likeliest token is taken")
    return {"sampling": sampling, "seed": given.seed or 0, "cache_dtype": given.cache_dtype, "say": say}


def _asked(given: argparse.Namespace) -> dict[str, typing.Any]:
    flags = {"temperature": given.temperature, "top_k": given.top_k, "top_p": given.top_p}
    return {name: value for name, value in flags.items() if value is not None}


def load_model(given: argparse.Namespace) -> Pretrained:
    """The model of the flags of `add_model_flags`, as `load_named` gives it, that ends a text at --stop, too.

    Special tokens are no text, in which a stop string could be found: those that are stop strings end it themselves.

    Raises:
        ValueError: in one line, if it cannot be found or read, or the flags do not fit it.
    """
    pattern = None if given.pattern is None else parse_pattern(given.pattern)
    settings = {} if given.dense_layers is None else {"dense_layers": tuple(given.dense_layers)}
    pretrained = load_named(given.model, pattern, dtype=given.dtype, implementation=given.implementation, **settings)
    config = pretrained.model.config
    if all(config.layer_pattern(layer) == Dense() for layer in range(config.num_layers)):
        if given.dense_layers and config.pattern == Dense():
            say("--dense-layers has no effect: all layers are dense without it, see --pattern")
        if pattern is not None and pattern != Dense():
            say("--pattern has no effect: --dense-layers names every layer")
    assert pretrained.tokenizer is not None
    added = pretrained.tokenizer.get_added_tokens_decoder()
    special = [token for token, entry in added.items() if entry.special and entry.content in given.stop]
    return dataclasses.replace(pretrained, eos_ids=tuple(dict.fromkeys([*pretrained.eos_ids, *special])))


def load_named(name: str | None, *pattern: Pattern | None, **settings: typing.Any) -> Pretrained:
    """The model of --model, with a tokenizer; says on stderr what it is doing.

    Args:
        name: see `MODEL_HELP`; None for the default.
        *pattern: see `models.checkpoints.pretrained.load`.
        **settings: likewise.

    Raises:
        ValueError: in one line, if it cannot be found or read.
    """
    found = smollm2.fetch(say=say) if name is None else name
    say(f"loading {found} …")
    pretrained = load(found, *pattern, **settings)
    if pretrained.tokenizer is None:
        raise ValueError(f"{found} has no tokenizer: put a tokenizer.json beside its weights")
    return pretrained


def check_text(name: str, text: str) -> str:
    """The text, if it can be written as UTF-8.

    Raises:
        ValueError: in one line, if it has lone surrogates, which stand for bytes that are no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be UTF-8 text, got {text[error.start]!a} at character {error.start}") from error
    return text


def say(line: str) -> None:
    """Prints a line to stderr, where there is one."""
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


def run(program: str, body: Callable[[list[str] | None], None], argv: list[str] | None) -> int:
    """Runs a program's body; whatever goes wrong is one line on stderr.

    Returns:
        The exit code: 0 done, or nobody reads the output any more; 1 the model or the machine failed; 2 bad input;
        130 Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an encoding that lacks characters ends nothing
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", category=PatternWarning)
    keep_compilations()
    try:
        with none_lost():
            body(argv)
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        assert sys.stdout is not None
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still in the buffer has no reader
        return 0
    except KeyboardInterrupt:
        say(f"{program}: ended by Ctrl-C")
        return 130
    except (FloatingPointError, MemoryError, jax.errors.JaxRuntimeError) as error:
        say(f"{program}: {_one_line(str(error) or 'out of memory')}")
        return 1
    except (ValueError, NotImplementedError, OSError) as error:
        say(f"{program}: {_one_line(str(error))}")
        return 2
    return 0


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= 600 else f"{line[:597]}..."
