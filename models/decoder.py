"""A batch of sequences over a model's caches: prompts in, one token after the other out."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from models.checkpoints.pretrained import Pretrained
from models.sampling import UNDEFINED, Sampling, undefined_message
from s2jax.counted import counted

WIDEST = 256
"""Tokens of a step are padded to a power of two up to this, or to a multiple of it, so that few widths are compiled."""


def padded_width(tokens: int) -> int:
    """The number of tokens, 1 or more, that a step for `tokens` of them is compiled for."""
    if tokens >= WIDEST:
        return -(-tokens // WIDEST) * WIDEST
    return 1 if tokens == 1 else max(16, 1 << (tokens - 1).bit_length())


class Decoder:
    """Sequences of a model at lengths of their own: feeds them tokens and draws the next ones.

    Whatever goes to the device or comes from it does so by `device_put` and `device_get`, as a transfer guard asks.

    Args:
        pretrained: the model.
        batch: number of sequences.
        max_length: tokens of the longest sequence.
        sampling: how to choose tokens.
        seed: of the draws. A sequence's draws depend on it, on the sequence's place in the batch and on the number of
            draws before.
        chunk: most tokens of a prompt in one step, which bounds the memory; None for whole prompts.
        cache_dtype: of what the caches store; by default the model's.
        max_rollback: tokens that `rollback` may take back.
        say: is given a line before anything is compiled.

    Attributes:
        lengths: int [b], tokens of every sequence in the caches.
        caches: one for each layer.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        *,
        batch: int,
        max_length: int,
        sampling: Sampling = Sampling(),  # noqa: B008 - a frozen value
        seed: int = 0,
        chunk: int | None = None,
        cache_dtype: str | None = None,
        max_rollback: int = 0,
        say: Callable[[str], None] = lambda line: None,
    ):
        self._model, self._batch, self._chunk, self._say = pretrained.model, batch, chunk, say
        self._graph, self._state = nnx.split(pretrained.model)
        self.max_length = -(-max_length // WIDEST) * WIDEST
        self._cache_settings = {"max_length": self.max_length, "max_rollback": max_rollback, "dtype": cache_dtype}
        self._steps: dict[tuple[int, bool], Any] = {}
        self._draws = 0
        self._choose = _chooser(sampling, seed, batch)
        self.empty()

    def empty(self) -> None:
        """Begins all sequences anew."""
        self.caches = self._model.create_caches(self._batch, **self._cache_settings)
        self.lengths = np.zeros(self._batch, int)
        # NaN would say that there is nothing to draw from, but JAX's debug_nans refuses them in results.
        self._fed = np.zeros(self._batch, bool)
        self._logits = _no_logits(self._batch, self._model.config.vocab_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' caches."""
        return sum(cache.nbytes for cache in self.caches)

    @property
    def full_nbytes(self) -> int:
        """Bytes of caches that held every token."""
        return sum(_full_bytes(cache, self.max_length) for cache in self.caches)

    def prepare(self, tokens: int) -> None:
        """Compiles the steps for prompts of `tokens` tokens, and for single tokens, before anything is timed."""
        width, begin = self._way(tokens)
        self._compiled(width, begin=begin)
        self._compiled(1, begin=False)
        self._choose(self._logits, jax.device_put(np.int32(0)))

    def feed(self, tokens: Sequence[Sequence[int]]) -> None:
        """Appends tokens to every sequence, any number to each; to those that get none nothing happens.

        Raises:
            ValueError: a sequence would grow beyond `max_length`.
        """
        counts = np.array([len(row) for row in tokens])
        most = int(counts.max())
        if (longest := int((self.lengths + counts).max())) > self.max_length:
            raise ValueError(f"{longest} tokens do not fit into caches for {self.max_length}")
        width, begin = self._way(most)
        for start in range(0, most, width):
            part = [list(row[start : start + width]) for row in tokens]
            self._step(width, part, begin=begin)

    def _way(self, tokens: int) -> tuple[int, bool]:
        """The width of the steps for so many tokens, and whether one step begins all sequences as a whole prompt."""
        width = padded_width(max(1, tokens))
        if not self.lengths.any() and (self._chunk is None or width <= self._chunk):
            return width, True
        return min(width, self._chunk or WIDEST), False

    def _step(self, width: int, tokens: list[list[int]], *, begin: bool) -> None:
        counts = np.array([len(row) for row in tokens], np.int32)
        padded = np.array([row + [0] * (width - len(row)) for row in tokens], np.int32)
        step = self._compiled(width, begin=begin)
        on_device = jax.device_put((padded, counts))
        self._logits, self.caches = step(self._state, on_device[0], self.caches, on_device[1], self._logits)
        self.lengths += counts
        self._fed |= counts > 0

    def draw(self, which: Sequence[bool] | None = None) -> list[int]:
        """The next token of every sequence, not fed yet.

        Args:
            which: sequences whose tokens are needed; by default all. Those of the others mean nothing.

        Raises:
            FloatingPointError: the logits of a sequence define no distribution; its position is named.
        """
        chosen = self._choose(self._logits, jax.device_put(np.int32(self._draws)))
        tokens = np.where(self._fed, jax.device_get(chosen), UNDEFINED).tolist()
        self._draws += 1
        for row, token in enumerate(tokens):
            if token == UNDEFINED and (which is None or which[row]):
                where = "" if self._batch == 1 else f"sequence {row + 1}: "
                raise FloatingPointError(where + undefined_message(int(self.lengths[row])))
        return tokens

    def rollback(self, tokens: Sequence[int]) -> None:
        """Takes back the last tokens of every sequence. What follows must be fed before anything is drawn."""
        counts = jax.device_put(np.asarray(tokens, np.int32))
        self.caches = tuple(cache.rollback(counts) for cache in self.caches)
        self.lengths -= np.asarray(tokens)
        self._fed &= np.asarray(tokens) == 0

    def reset(self, which: Sequence[bool]) -> None:
        """Empties some of the sequences, for others to take their places."""
        emptied = jax.device_put(np.asarray(which, bool))
        self.caches = tuple(cache.reset(emptied) for cache in self.caches)
        self.lengths[np.asarray(which)] = 0
        self._fed[np.asarray(which)] = False

    def wait(self) -> None:
        """Returns when the device has done what it was given."""
        jax.block_until_ready(self._logits)

    def _compiled(self, width: int, *, begin: bool):
        """The model's step on `width` tokens of each sequence. Caches are updated in place."""
        if (width, begin) not in self._steps:
            if not self._steps:
                self._say("compiling …")
            arrays = self._state, self.caches, self._logits
            state, caches, logits = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arrays)
            tokens = jax.ShapeDtypeStruct((self._batch, width), jnp.int32)
            counts = jax.ShapeDtypeStruct((self._batch,), jnp.int32)
            step = jax.jit(self._on_tokens(begin), donate_argnums=2)
            self._steps[width, begin] = step.lower(state, tokens, caches, counts, logits).compile()
        return self._steps[width, begin]

    def _on_tokens(self, begin: bool):
        def step(state, tokens, caches, counts, logits: Array):
            model = nnx.merge(self._graph, state)
            last, caches = (model.prefill if begin else model.extend)(tokens, caches, counts=counts, last=True)
            return jnp.where((counts > 0)[:, None], last[:, 0], logits), caches

        return step


def _chooser(sampling: Sampling, seed: int, batch: int):
    """The function from logits [b, v] and the number of draws before to token ids [b]."""

    @jax.jit
    def choose(logits, draws):
        def one(row, logits):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), draws)
            return sampling(logits[None], key)[0]

        return jax.vmap(one)(jnp.arange(batch, dtype=jnp.int32), logits)

    return choose


@functools.partial(jax.jit, static_argnums=(0, 1))
def _no_logits(batch: int, vocab_size: int) -> Array:
    return jnp.zeros((batch, vocab_size), jnp.float32)


def _full_bytes(cache, length: int) -> int:
    blocks = -(-length // cache.layout.block_size) * len(cache.layout.slots)
    slots = sum(buffer.held.shape[1] * buffer.held.shape[2] for buffer in cache.buffers)
    return cache.nbytes * blocks // slots


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
        prompts: token ids, of lengths of their own.
        sampling: how to choose a token; by default as the checkpoint wants it, see `Pretrained.own_sampling`.
        chunk: most tokens of a prompt in one step, which bounds the memory; by default all at once.
        cache_dtype: of what the caches store; by default the model's.
        spent: is filled in.
        ended: the caller adds to it whatever prompts need no further tokens.
        say: is given a line before anything is compiled.

    Raises:
        ValueError: there is no prompt; one is empty, has an id that the model does not know, or does not fit into the
            model's context together with the new tokens; or the checkpoint's own sampling cannot be followed.
        FloatingPointError: the model's logits are NaN.
    """
    spent, ended = spent or Spent(), set() if ended is None else ended
    sampling = pretrained.own_sampling() if sampling is None else sampling
    longest = _check_prompts(pretrained, prompts, max_new_tokens, chunk)
    decoder = Decoder(
        pretrained, batch=len(prompts), max_length=longest + max_new_tokens, sampling=sampling, seed=seed, chunk=chunk,
        cache_dtype=cache_dtype, say=say,
    )  # fmt: skip
    spent.prompt, spent.sequences = sum(map(len, prompts)), len(prompts)
    spent.cache_bytes, spent.full_bytes = decoder.nbytes, decoder.full_nbytes
    decoder.prepare(longest)
    start = time.perf_counter()
    decoder.feed(prompts)
    decoder.wait()
    spent.prefill = time.perf_counter() - start
    for number in range(max_new_tokens):
        active = [row not in ended for row in range(len(prompts))]
        tokens = {row: token for row, token in enumerate(decoder.draw(active)) if active[row]}
        spent.tokens += len(tokens)
        spent.decode = time.perf_counter() - start - spent.prefill
        ended |= {row for row, token in tokens.items() if token in pretrained.eos_ids}
        yield tokens
        going_on = [[tokens[row]] if row not in ended else [] for row in range(len(prompts))]
        if not any(going_on) or number + 1 == max_new_tokens:
            return
        decoder.feed(going_on)


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
