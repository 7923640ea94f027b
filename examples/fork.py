"""Several samples of one prompt over a forked cache: the prompt is read and stored once for all of them.

python -m examples.fork --prompt "Once upon a time" --samples 4
"""

import functools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from models.checkpoints.pretrained import Pretrained
from models.command_line import Parser, add_model_flags, load_model, run
from models.sampling import Sampling


def samples_of(
    pretrained: Pretrained, prompt: Sequence[int], samples: int, max_new_tokens: int, sampling: Sampling, seed: int = 0
) -> tuple[list[list[int]], int, int]:
    """Continuations of a prompt.

    Returns:
        The token ids of each sample, and the bytes of the forked caches and of caches that held a prompt each.
    """
    model, settings = pretrained.model, {"max_length": len(prompt) + max_new_tokens}
    graph, state = nnx.split(model)

    @jax.jit
    def prefill(state, tokens, caches):
        return nnx.merge(graph, state).prefill(tokens, caches)

    @functools.partial(jax.jit, donate_argnums=2)
    def extend(state, tokens, caches):
        return nnx.merge(graph, state).extend(tokens, caches)

    logits, caches = prefill(state, jnp.array([prompt]), model.create_caches(1, **settings))
    forked = tuple(cache.fork(samples, max_new_tokens) for cache in caches)
    size = sum(cache.nbytes for cache in forked)
    apart = samples * sum(cache.nbytes for cache in caches)
    logits, found = jnp.repeat(logits, samples, 0), []
    for number in range(max_new_tokens):
        tokens = jax.jit(sampling)(logits[:, -1], jax.random.fold_in(jax.random.key(seed), number))
        found.append(tokens.tolist())
        if number + 1 < max_new_tokens:
            logits, forked = extend(state, tokens[:, None], forked)
    return [_ended(list(ids), pretrained.eos_ids) for ids in zip(*found, strict=True)], size, apart


def _ended(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first that ends a text."""
    return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]


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
