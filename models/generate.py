"""Continues a text with a pretrained model, dense or sparse, over a cache that holds what will be read again.

    python -m models.generate --prompt "The capital of Italy is"
    python -m models.generate --chat --prompt "What is the capital of Italy?"
    python -m models.generate --model my-model/ --pattern "LocalStride(64, 16, 3)" --dense-layers 0 1 --prompt "..."

The text goes to stdout as it comes; what it took to stderr, at the end.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from models import smollm2
from models.chat_template import chat_tokens
from models.pattern_text import pattern_of
from models.pretrained import Pretrained, load
from models.sampling import Sampling
from s2jax import Dense, PatternWarning

WHOLE = 256
"""A prompt, or the last chunk of it, is padded to a multiple of so many tokens: so that few lengths are compiled."""


@dataclasses.dataclass
class Spent:
    """What a generation took; filled in while it runs.

    Attributes:
        prefill, decode: seconds, compilation not counted; of the prompt, and of all further tokens.
        tokens: that were generated.
        cache_bytes, full_bytes: of all layers' caches, and of caches that held every token.
    """

    prompt: int = 0
    prefill: float = 0.0
    decode: float = 0.0
    tokens: int = 0
    cache_bytes: int = 0
    full_bytes: int = 0

    def __str__(self) -> str:
        share = self.cache_bytes / max(1, self.full_bytes)
        rate = max(0, self.tokens - 1) / self.decode if self.decode else 0.0
        return (
            f"prompt: {self.prompt} tokens in {self.prefill:.2f} s; then {self.tokens} tokens, {rate:.1f} a second; "
            f"cache: {self.cache_bytes / 2**20:.1f} MiB, {share:.0%} of a full one"
        )


def generate(
    pretrained: Pretrained,
    prompt: list[int],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    chunk: int | None = None,
    cache_dtype: str | None = None,
    spent: Spent | None = None,
) -> Iterator[int]:
    """Token ids after a prompt, one by one, until one that ends a text or `max_new_tokens`.

    Args:
        prompt: token ids.
        sampling: how to choose a token; by default as the checkpoint wants it, see `Pretrained.own_sampling`.
        chunk: so many tokens of the prompt at a time, which bounds the memory; by default all at once.
        cache_dtype: of what the caches store, by default the model's.
        spent: is filled in.

    Raises:
        ValueError: the prompt is empty, has an id that the model does not know, or does not fit into
            the model's context together with the new tokens; or the checkpoint's own sampling cannot be followed.
    """
    model, spent = pretrained.model, spent or Spent()
    sampling = pretrained.own_sampling() if sampling is None else sampling
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token to go on from")
    if strays := [token for token in prompt if not 0 <= token < model.config.vocab_size]:
        raise ValueError(f"the prompt must have ids from 0 to {model.config.vocab_size - 1}, got {strays[0]}")
    if max_new_tokens < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"max_new_tokens and chunk must be at least 1, got {max_new_tokens} and {chunk}")
    whole = len(prompt) + max_new_tokens
    if whole > pretrained.max_context:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones do not fit into the model's context of "
            f"{pretrained.max_context}"
        )
    graph, state = nnx.split(model)
    steps = [len(prompt)] if chunk is None else [min(chunk, len(prompt) - at) for at in range(0, len(prompt), chunk)]
    width = -(-steps[0] // WHOLE) * WHOLE if chunk is None else steps[0]
    length = -(-max(whole, width) // WHOLE) * WHOLE
    caches = model.create_caches(1, max_length=length, dtype=cache_dtype)
    spent.prompt, spent.cache_bytes = len(prompt), sum(cache.nbytes for cache in caches)
    spent.full_bytes = sum(_full_bytes(cache, length) for cache in caches)

    begin = _compiled(graph, state, caches, width, begin=chunk is None)
    step = _compiled(graph, state, caches, 1, begin=False)
    start, at, logits = time.perf_counter(), 0, jnp.empty(0)
    for count in steps:
        tokens = jnp.asarray([prompt[at : at + count] + [0] * (width - count)], jnp.int32)
        logits, caches = begin(state, tokens, caches, jnp.array([count], jnp.int32))
        at += count
    jax.block_until_ready(logits)
    spent.prefill = time.perf_counter() - start

    choose, key = jax.jit(sampling), jax.random.key(seed)
    for number in range(max_new_tokens):
        key, now = jax.random.split(key)
        token = int(choose(logits[:, -1], now)[0])
        spent.tokens += 1
        spent.decode = time.perf_counter() - start - spent.prefill
        yield token
        if token in pretrained.eos_ids or number + 1 == max_new_tokens:
            return
        logits, caches = step(state, jnp.array([[token]], jnp.int32), caches, jnp.array([1], jnp.int32))


def _compiled(graph, state, caches, width: int, *, begin: bool):
    """The model's step on so many tokens, compiled before any time is taken. Caches are updated in place."""
    like = functools.partial(jax.tree.map, lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype))
    tokens, counts = jax.ShapeDtypeStruct((1, width), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)

    def step(state, tokens, caches, counts):
        model = nnx.merge(graph, state)
        return (model.prefill if begin else model.extend)(tokens, caches, counts=counts, last=True)

    return jax.jit(step, donate_argnums=2).lower(like(state), tokens, like(caches), counts).compile()


def _full_bytes(cache, length: int) -> int:
    """Of a cache that held every token."""
    blocks = -(-length // cache.layout.block_size) * len(cache.layout.slots)
    slots = sum(buffer.held.shape[1] * buffer.held.shape[2] for buffer in cache.buffers)
    return cache.nbytes * blocks // slots


def text_of(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Pieces of text as they become whole; special tokens, as those that end a text, are left out."""
    stream = DecodeStream(skip_special_tokens=True)
    for token in ids:
        if piece := stream.step(tokenizer, token):
            yield piece


def main(argv: list[str] | None = None) -> None:
    given = _parser().parse_args(argv)
    warnings.filterwarnings("ignore", category=PatternWarning)
    try:
        pattern = Dense() if given.pattern is None else pattern_of(given.pattern)
        prompt = pathlib.Path(given.prompt_file).read_text("utf-8") if given.prompt_file else given.prompt
        if not prompt:
            raise ValueError("the prompt is empty: give a text to go on from")
        if given.system is not None and not given.chat:
            raise ValueError("--system is part of a conversation: give --chat, too")
        pretrained = load(
            smollm2.fetch() if given.model is None else given.model,
            pattern, dense_layers=tuple(given.dense_layers), dtype=given.dtype,
        )  # fmt: skip
        if pretrained.tokenizer is None:
            raise ValueError(f"{given.model} has no tokenizer: put a tokenizer.json beside its weights")
        asked = {"temperature": given.temperature, "top_k": given.top_k, "top_p": given.top_p}
        asked = {name: value for name, value in asked.items() if value is not None}
        # What is not asked for is as the checkpoint wants it. What it wants beyond that is refused, unless one asks.
        sampling = dataclasses.replace(pretrained.sampling, **asked) if asked else pretrained.own_sampling()
        spent = Spent()
        if given.chat:
            system = [] if given.system is None else [{"role": "system", "content": given.system}]
            tokens = chat_tokens(pretrained, [*system, {"role": "user", "content": prompt}])
        else:
            tokens = pretrained.encode(prompt)
        ids = generate(
            pretrained, tokens, given.max_new_tokens, sampling=sampling,
            seed=given.seed, chunk=given.chunk, cache_dtype=given.cache_dtype, spent=spent,
        )  # fmt: skip
        for piece in text_of(pretrained.tokenizer, ids):
            print(piece, end="", flush=True)
    except (ValueError, OSError) as error:
        sys.exit(f"{error}")
    print(flush=True)
    print(spent, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="a GGUF file, or a directory with config.json; by default SmolLM2-135M-Instruct, fetched"
    )
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="the text to continue")
    text.add_argument("--prompt-file", help="a UTF-8 file with it")
    parser.add_argument("--chat", action="store_true", help="the prompt is what a user says, to be answered")
    parser.add_argument("--system", help="what is said before, with --chat; by default what the checkpoint says")
    parser.add_argument("--pattern", help="who reads whom, such as 'LocalStride(64, 16, 3)'; by default dense")
    parser.add_argument("--dense-layers", type=int, nargs="*", default=[], help="layers that stay dense, from 0 on")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default %(default)s")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token; default the checkpoint's, or 0")
    parser.add_argument("--top-k", type=int, help="only so many of the likeliest tokens; default the checkpoint's")
    parser.add_argument("--top-p", type=float, help="only the likeliest tokens of this share together; likewise")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    parser.add_argument("--chunk", type=int, help="tokens of the prompt at a time; by default all at once")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default %(default)s")
    parser.add_argument(
        "--cache-dtype", choices=("float32", "bfloat16", "float16", "int8"), help="by default that of --dtype"
    )
    return parser


if __name__ == "__main__":
    main()
