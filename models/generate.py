"""Continues texts with a pretrained model, dense or sparse, over a cache that holds what will be read again.

    python -m models.generate --prompt "The capital of Italy is"
    python -m models.generate --chat --prompt "What is the capital of Italy?"
    python -m models.generate --model my-model/ --pattern "LocalStride(64, 16, 3)" --dense-layers 0 1 --prompt "..."
    python -m models.generate --prompt "The capital of Italy is" --prompt "Water boils at" --stop .

The text of one prompt goes to stdout as it comes. Several prompts are continued together, in one batch; each comes as a
line of JSON with its `text` and what ended it (`end`: "token", "stop" or "length"), in the order of the prompts.
Progress and measurements go to stderr.
"""

from models.interruption import end_at_once

if __name__ == "__main__":
    end_at_once("models.generate")  # the imports below take seconds

import argparse
import json
import pathlib
import sys

from models.extras import exit_for_missing

try:
    from models.checkpoints.chat_template import chat_tokens
    from models.checkpoints.pretrained import Pretrained
    from models.command_line import (
        Parser,
        add_generation_flags,
        check_generation_flags,
        check_text,
        decoder_settings,
        load_model,
        run,
        say,
    )
    from models.generation import Spent, generate_batch
    from models.interruption import noted
    from models.text_stream import TextStream
except ModuleNotFoundError as error:
    exit_for_missing(error, "models.generate", "generate")


def main(argv: list[str] | None = None) -> int:
    """Runs the program; returns its exit code, see `models.command_line.run`."""
    return run("models.generate", _generate, argv)


def _generate(argv: list[str] | None) -> None:
    given = _parser().parse(argv)
    check_generation_flags(given)
    prompts = _prompts(given)
    if given.system is not None and not given.chat:
        raise ValueError("--system is part of a conversation: give --chat, too")
    if given.chunk is not None and given.chunk < 1:
        raise ValueError(f"--chunk must be at least 1, got {given.chunk}")
    pretrained = load_model(given)
    tokens = [_tokens(pretrained, prompt, given) for prompt in prompts]
    assert pretrained.tokenizer is not None
    alone, streams = len(prompts) == 1, [TextStream(pretrained.tokenizer, given.stop) for _ in prompts]
    spent, ended, ends = Spent(), set[int](), ["length"] * len(prompts)
    steps = generate_batch(
        pretrained, tokens, given.max_new_tokens, chunk=given.chunk, spent=spent, ended=ended,
        **decoder_settings(given, pretrained),
    )  # fmt: skip
    try:
        with noted() as check:
            for step in steps:
                for row, token in step.items():
                    piece = streams[row].push(token)
                    if streams[row].stopped:
                        ended.add(row)
                    elif token in pretrained.eos_ids:
                        ends[row] = "token"
                    if alone:
                        print(piece, end="", flush=True)
                check()
    except KeyboardInterrupt:
        if alone and streams[0].text:
            print(flush=True)
        raise
    for row, stream in enumerate(streams):
        rest = stream.finish()
        end = "stop" if stream.stopped else ends[row]  # `finish`, too, may complete a stop string
        if alone:
            print(rest, flush=True)
        else:
            line = {"prompt": prompts[row], "text": stream.text, "end": end}
            print(json.dumps(line, ensure_ascii=not _is_utf8()), flush=True)
    say(str(spent))


def _prompts(given: argparse.Namespace) -> list[str]:
    """The texts of all --prompt and --prompt-file, in their order.

    Raises:
        ValueError: a prompt is empty or no UTF-8.
        OSError: a file cannot be read.
    """
    found = []
    for flag, value in given.prompts or ():
        if flag == "--prompt":
            found.append(check_text(flag, value))
            continue
        try:
            found.append(pathlib.Path(value).read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--prompt-file {value} must be UTF-8 text: {error.reason} at byte {error.start}"
            ) from error
    if not found:
        raise ValueError("there is no prompt: give --prompt or --prompt-file")
    if not all(found):
        raise ValueError("the prompt is empty: give a text to go on from")
    return found


def _tokens(pretrained: Pretrained, prompt: str, given: argparse.Namespace) -> list[int]:
    if not given.chat:
        return pretrained.encode(prompt)
    system = [] if given.system is None else [{"role": "system", "content": given.system}]
    return chat_tokens(pretrained, [*system, {"role": "user", "content": prompt}])


def _is_utf8() -> bool:
    return (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"


class _InOrder(argparse.Action):
    """Keeps the values of several flags in the order in which they came."""

    repeats = True

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or ()), (self.option_strings[0], values)])


def _parser() -> Parser:
    parser = Parser(prog="python -m models.generate", description=__doc__)
    parser.add_argument(
        "--prompt", action=_InOrder, dest="prompts", metavar="TEXT", help="text to continue; may be repeated"
    )
    parser.add_argument(
        "--prompt-file",
        action=_InOrder,
        dest="prompts",
        metavar="FILE",
        help="UTF-8 file with a prompt; may be repeated",
    )
    parser.add_argument("--chat", action="store_true", help="answer each prompt as a user's message")
    add_generation_flags(parser, system="system message, with --chat", max_new_tokens=64)
    parser.add_argument("--chunk", type=int, help="tokens of the prompt in one step; default all")
    return parser


if __name__ == "__main__":
    sys.exit(main())
