"""Several samples of one prompt over a forked cache: the prompt is read and stored once for all of them.

python -m examples.fork --prompt "Once upon a time" --samples 4
"""

import sys
from collections.abc import Sequence

from models.checkpoints.pretrained import Pretrained
from models.command_line import Parser, add_model_flags, load_model, run
from models.decoder import Decoder
from models.sampling import Sampling


def samples_of(
    pretrained: Pretrained, prompt: Sequence[int], samples: int, max_new_tokens: int, sampling: Sampling, seed: int = 0
) -> tuple[list[list[int]], int, int]:
    """Continuations of a prompt.

    Returns:
        The token ids of each sample, and the bytes of the forked caches and of caches that held a prompt each.
    """
    decoder = Decoder(pretrained.model, batch=1, max_length=len(prompt) + max_new_tokens, sampling=sampling, seed=seed)
    decoder.feed([prompt])
    apart = samples * decoder.nbytes
    decoder.fork(samples, max_new_tokens)
    size, found = decoder.nbytes, [list[int]() for _ in range(samples)]
    for drawn in decoder.decode(max_new_tokens, end_ids=pretrained.eos_ids):
        for sample, token in drawn.items():
            if token not in pretrained.eos_ids:
                found[sample].append(token)
    return found, size, apart


def _main(argv: list[str] | None) -> None:
    parser = Parser(prog="python -m examples.fork", description=__doc__)
    add_model_flags(parser)
    parser.add_argument("--prompt", default="Once upon a time there was a lighthouse keeper who", help="to continue")
    parser.add_argument("--samples", type=int, default=4, help="default %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="default %(default)s")
    given = parser.parse_args(argv)
    pretrained, sampling = load_model(given), Sampling(given.temperature, top_p=0.95)
    assert pretrained.tokenizer is not None
    prompt = pretrained.encode(given.prompt)
    found, size, apart = samples_of(pretrained, prompt, given.samples, given.max_new_tokens, sampling)
    for number, ids in enumerate(found):
        print(f"{number + 1}: {given.prompt}{pretrained.tokenizer.decode(ids)!r}")
    print(f"caches: {size / 2**20:.1f} MiB; a cache for each sample would take {apart / 2**20:.1f} MiB")


if __name__ == "__main__":
    sys.exit(run("examples.fork", _main, None))
