"""Continuous batching: requests of different lengths come and go in the slots of one batch.

    python -m examples.continuous_batching --slots 3

A slot that has ended its request is reset and takes the next one, while the others go on: their tokens and the new
prompt, in chunks, go through the model in the same steps.
"""

import collections
import dataclasses
import sys
from collections.abc import Iterator, Sequence

from models.checkpoints.pretrained import Pretrained
from models.command_line import Parser, add_model_flags, load_model, run
from models.decoder import Decoder

PROMPTS = (
    "The capital of Italy is",
    "Water boils at",
    "A short list of colours: red, green,",
    "Once upon a time, in a village by the sea, there lived a fisherman who had three daughters. The eldest",
    "def add(a, b):\n    return",
    "The planets of the solar system are Mercury, Venus,",
)


@dataclasses.dataclass
class Request:
    """A prompt, and what became of it.

    Attributes:
        prompt: token ids.
        max_new_tokens: that it may have.
        tokens: ids that were generated.
        slot, first_step, last_step: where and when it was served.
    """

    prompt: list[int]
    max_new_tokens: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    slot: int = -1
    first_step: int = -1
    last_step: int = -1


def serve(pretrained: Pretrained, requests: Sequence[Request], *, slots: int, chunk: int = 16) -> Iterator[Request]:
    """Serves requests in their order, greedily; gives each one back when it has ended.

    Args:
        slots: requests that are served at once.
        chunk: tokens of a prompt that one step takes, beside the tokens of the other slots.
    """
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    decoder = Decoder(pretrained.model, batch=slots, max_length=longest, chunk=chunk)
    waiting = collections.deque(requests)
    served: list[Request | None] = [None] * slots
    unfed: list[list[int]] = [[] for _ in range(slots)]
    step = 0
    while waiting or any(served):
        free = [slot for slot in range(slots) if served[slot] is None][: len(waiting)]
        if free and step:
            decoder.reset([slot in free for slot in range(slots)])
        for slot in free:
            request = served[slot] = waiting.popleft()
            request.slot, request.first_step, unfed[slot] = slot, step, list(request.prompt)
        decoder.feed([tokens[:chunk] for tokens in unfed])
        unfed = [tokens[chunk:] for tokens in unfed]
        drawing = [request is not None and not tokens for request, tokens in zip(served, unfed, strict=True)]
        drawn = decoder.draw(drawing) if any(drawing) else []
        for slot, request in enumerate(served):
            if request is None or not drawing[slot]:
                continue
            request.tokens.append(drawn[slot])
            unfed[slot] = [drawn[slot]]
            if drawn[slot] in pretrained.eos_ids or len(request.tokens) == request.max_new_tokens:
                request.last_step, served[slot], unfed[slot] = step, None, []
                yield request
        step += 1


def _main(argv: list[str] | None) -> None:
    parser = Parser(prog="python -m examples.continuous_batching", description=__doc__)
    add_model_flags(parser)
    parser.add_argument("--slots", type=int, default=3, help="requests at once; default %(default)s")
    given = parser.parse_args(argv)
    if given.slots < 1:
        raise ValueError(f"--slots must be at least 1, got {given.slots}")
    pretrained = load_model(given)
    tokenizer = pretrained.tokenizer
    assert tokenizer is not None
    requests = [Request(pretrained.encode(text), 6 + 5 * i) for i, text in enumerate(PROMPTS)]
    for request in serve(pretrained, requests, slots=given.slots):
        number = next(i for i, each in enumerate(requests) if each is request)
        where = f"slot {request.slot}, steps {request.first_step} to {request.last_step}"
        print(f"request {number} ({where}): {PROMPTS[number]!r} → {tokenizer.decode(request.tokens)!r}", flush=True)


if __name__ == "__main__":
    sys.exit(run("examples.continuous_batching", _main, None))
