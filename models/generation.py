"""Generation from prompts, one by one or in a batch."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from models.checkpoints.pretrained import Pretrained
from models.decoder import Decoder
from models.sampling import Sampling
from s2jax.messages import counted


@dataclasses.dataclass
class Spent:
    """Measurements of a generation, filled in while it runs.

    Attributes:
        prompt: tokens of the prompts.
        prefill, decode: seconds for the prompts and for all further tokens, compilation not counted.
        tokens: generated tokens, of all sequences.
        sequences: number of prompts.
        cache_bytes, full_bytes: of all layers' caches, and of caches that held every token.
    """

    prompt: int = 0
    prefill: float = 0.0
    decode: float = 0.0
    tokens: int = 0
    sequences: int = 1
    cache_bytes: int = 0
    full_bytes: int = 0

    def __str__(self) -> str:
        share = self.cache_bytes / max(1, self.full_bytes)
        rate = max(0, self.tokens - self.sequences) / self.decode if self.decode else 0.0
        prompts = "prompt" if self.sequences == 1 else f"{self.sequences} prompts"
        return (
            f"{prompts}: {counted(self.prompt, 'token')} in {self.prefill:.2f} s; "
            f"then {counted(self.tokens, 'token')}, {rate:.1f} a second; "
            f"cache: {self.cache_bytes / 2**20:.1f} MiB, {share:.0%} of a full one"
        )


def generate(pretrained: Pretrained, prompt: list[int], max_new_tokens: int, **settings: Any) -> Iterator[int]:
    """Token ids after a prompt, one by one, until one that ends a text or `max_new_tokens`.

    Args and errors are those of `generate_batch`, for one prompt.
    """
    for tokens in generate_batch(pretrained, [prompt], max_new_tokens, **settings):
        yield tokens[0]


def generate_batch(
    pretrained: Pretrained,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    chunk: int | None = None,
    cache_dtype: str | None = None,
    spent: Spent | None = None,
    ended: set[int] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[int, int]]:
    """The next token of each prompt that goes on, by the prompt's index, until all have ended.

    A prompt ends with a token that ends a text, or after `max_new_tokens`.

    Args:
        pretrained: the model.
        prompts: token ids, of lengths of their own.
        max_new_tokens: most tokens after each prompt.
        sampling: how to choose a token; by default as the checkpoint wants it, see `Pretrained.own_sampling`.
        seed: of the draws.
        chunk: most tokens of a prompt in one step, which bounds the memory; by default all at once.
        cache_dtype: dtype of the caches; by default the model's.
        spent: is filled in.
        ended: the caller adds to it whatever prompts need no further tokens.
        say: is given a line before anything is compiled.

    Raises:
        ValueError: there is no prompt; one is empty, has an id that the model does not know, or does not fit into the
            model's context together with the new tokens; or the checkpoint's own sampling cannot be followed.
        FloatingPointError: the model's logits are NaN.
    """
    spent = spent or Spent()
    sampling = pretrained.own_sampling() if sampling is None else sampling
    longest = _check_prompts(pretrained, prompts, max_new_tokens, chunk)
    decoder = Decoder(
        pretrained.model, batch=len(prompts), max_length=longest + max_new_tokens, sampling=sampling, seed=seed,
        chunk=chunk, cache_dtype=cache_dtype, say=say,
    )  # fmt: skip
    spent.prompt, spent.sequences = sum(map(len, prompts)), len(prompts)
    spent.cache_bytes, spent.full_bytes = decoder.nbytes, decoder.full_nbytes
    decoder.prepare(longest)
    start = time.perf_counter()
    decoder.feed(prompts)
    decoder.wait()
    spent.prefill = time.perf_counter() - start
    for tokens in decoder.decode(max_new_tokens, end_ids=pretrained.eos_ids, ended=ended):
        spent.tokens += len(tokens)
        spent.decode = time.perf_counter() - start - spent.prefill
        yield tokens


def _check_prompts(pretrained: Pretrained, prompts: Sequence[Sequence[int]], new: int, chunk: int | None) -> int:
    """Returns the length of the longest prompt."""
    if not prompts or not all(prompts):
        raise ValueError("the prompt is empty: give at least one token to go on from")
    vocab_size, context = pretrained.vocab_size, pretrained.max_context
    if strays := [token for prompt in prompts for token in prompt if not 0 <= token < vocab_size]:
        raise ValueError(f"the prompt must have ids from 0 to {vocab_size - 1}, got {strays[0]}")
    if new < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"max_new_tokens and chunk must be at least 1, got {new} and {chunk}")
    longest = max(map(len, prompts))
    if longest + new > context:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones do not fit into the model's context of {context}"
        )
    return longest
