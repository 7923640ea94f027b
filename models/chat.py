r"""Chats with a pretrained model: each input line is a message, and the answer streams as it is generated.

    python -m models.chat
    python -m models.chat --model my-model/ --pattern "LocalStride(64, 4, 3) | FirstBlocks(1)" --temperature 0.7
    printf 'What is the capital of Italy?\nAnd of Spain?\n' | python -m models.chat

The cache is kept from turn to turn, so that a turn costs what is new in it. Where the model's context is full, the
oldest turns are forgotten, and it is said. Ctrl-C stops an answer; at the prompt, or where the lines are not typed, it
ends the program, as Ctrl-D does. Answers go to stdout, all else to stderr.
"""

from models.interruption import end_at_once

if __name__ == "__main__":
    end_at_once("models.chat")  # the imports below take seconds

import contextlib
import sys
from collections.abc import Iterator

from models.extras import exit_for_missing

try:
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
    from models.conversation import Conversation
    from models.interruption import noted
except ModuleNotFoundError as error:
    exit_for_missing(error, "models.chat", "generate")


def main(argv: list[str] | None = None) -> int:
    """Runs the program; returns its exit code, see `models.command_line.run`."""
    return run("models.chat", _chat, argv)


def _chat(argv: list[str] | None) -> None:
    given = _parser().parse(argv)
    check_generation_flags(given)
    pretrained = load_model(given)
    if pretrained.chat_template is None:
        raise ValueError("the checkpoint has no chat template: it lays out no conversation; see models.generate")
    conversation = Conversation(
        pretrained, system=given.system, max_new_tokens=given.max_new_tokens, stops=given.stop,
        **decoder_settings(given, pretrained),
    )  # fmt: skip
    typed = sys.stdin is not None and sys.stdin.isatty()
    try:
        for line in _lines(typed):
            try:
                _answer(conversation, check_text("a message", line), typed)
            except ValueError as error:  # of this message: the next one may do
                if not typed:
                    raise
                say(str(error))
    except KeyboardInterrupt:
        if not typed:
            raise
        _show("\n")


def _answer(conversation: Conversation, text: str, typed: bool) -> None:
    try:
        with noted() as check, contextlib.closing(conversation.answer(text)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
                check()
    except KeyboardInterrupt:
        if not typed:
            raise
    print(flush=True)


def _lines(typed: bool) -> Iterator[str]:
    """Yields the user's lines until Ctrl-D or the end of the file, without blank lines."""
    if typed:
        say("Ctrl-D ends the conversation.")
        with contextlib.suppress(ModuleNotFoundError):  # Windows has none
            import readline  # noqa: F401 - lets input() edit the line and recall earlier ones
    while True:
        try:
            line = _line(typed)
        except EOFError:
            if typed:
                _show("\n")
            return
        if line.strip():
            yield line


def _line(typed: bool) -> str:
    """Returns a line of stdin, after a prompt if it is typed.

    Raises:
        EOFError: there is none.
        ValueError: stdin is no text of its encoding.
    """
    try:
        if typed and _on_screen():
            return input("> ")
        if typed:  # input() would write its prompt to stdout, among the answers
            _show("> ")
        line = "" if sys.stdin is None else sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin must be {error.encoding} text: {error.reason} at byte {error.start}") from error
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _show(text: str) -> None:
    """Prints a prompt or a line end that is part of no answer: to stdout if that is a terminal, else to stderr."""
    stream = sys.stdout if _on_screen() else sys.stderr
    if stream is not None:
        print(text, end="", file=stream, flush=True)


def _on_screen() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def _parser() -> Parser:
    parser = Parser(prog="python -m models.chat", description=__doc__)
    add_generation_flags(parser, system="system message", max_new_tokens=512)
    return parser


if __name__ == "__main__":
    sys.exit(main())
