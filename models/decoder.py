"""Decoding of a batch of sequences over a model's caches."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from models.sampling import UNDEFINED, Sampling, undefined_message
from models.sharding import batch_sharding, batch_spec, resharded
from models.transformer import Transformer

WIDEST = 256
"""Steps are padded to a power of two up to this width, or to a multiple of it, so that few widths are compiled."""


def padded_width(tokens: int) -> int:
    """The number of tokens, 1 or more, that a step for `tokens` of them is compiled for."""
    if tokens >= WIDEST:
        return -(-tokens // WIDEST) * WIDEST
    return 1 if tokens == 1 else max(16, 1 << (tokens - 1).bit_length())


class Decoder:
    """A batch of sequences of different lengths, to which tokens are appended and from which they are drawn.

    All transfers to and from the device are explicit (`device_put`, `device_get`), as a transfer guard demands. A model
    on a mesh decodes under `jax.set_mesh`, with Explicit axes; sequences are split over "data" and "fsdp".

    Args:
        model: with its weights.
        batch: number of sequences.
        max_length: tokens of the longest sequence.
        sampling: a function from logits [b, v] and a key to tokens [b], such as a `Sampling`.
        seed: of the draws. A sequence's draws depend on it, on the sequence's place in the batch and on the number of
            draws before.
        chunk: most tokens of a prompt in one step, which bounds the memory; None for whole prompts.
        cache_dtype: dtype of the caches; by default the model's.
        max_rollback: tokens that `rollback` may take back.
        say: is given a line before anything is compiled.

    Attributes:
        tokens: the ids in the caches, one list for each sequence.
        caches: one for each layer.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        batch: int,
        max_length: int,
        sampling: Callable[[Array, Array], Array] = Sampling(),  # noqa: B008 - a frozen value
        seed: int = 0,
        chunk: int | None = None,
        cache_dtype: str | None = None,
        max_rollback: int = 0,
        say: Callable[[str], None] = lambda line: None,
    ):
        self._model, self._batch, self._chunk, self._say = model, batch, chunk, say
        self._sampling, self._seed, self._sharding = sampling, seed, batch_sharding()
        self._graph, self._state = nnx.split(model)
        self.max_length = -(-max_length // WIDEST) * WIDEST
        self._cache_settings = {"max_length": self.max_length, "max_rollback": max_rollback, "dtype": cache_dtype}
        self._steps: dict[tuple[int, bool], Any] = {}
        self._draws = 0
        self._choose = _chooser(sampling, seed, batch)
        self.empty()

    @property
    def lengths(self) -> Int[np.ndarray, " b"]:
        """The number of tokens of each sequence in the caches."""
        return np.array([len(row) for row in self.tokens])

    def empty(self) -> None:
        """Removes all tokens of all sequences."""
        create = functools.partial(self._model.create_caches, self._batch, **self._cache_settings)
        self.caches = create() if self._sharding is None else jax.jit(create)()  # made where they lie
        self.tokens: list[list[int]] = [[] for _ in range(self._batch)]
        # Logits of NaN could mark sequences without tokens, but JAX's debug_nans refuses NaN in results.
        self._fed = np.zeros(self._batch, bool)
        self._logits = self._put(np.zeros((self._batch, self._model.config.vocab_size), np.float32))

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' caches."""
        return sum(cache.nbytes for cache in self.caches)

    @property
    def full_nbytes(self) -> int:
        """Bytes of caches that held every token."""
        return sum(_full_bytes(cache, self.max_length) for cache in self.caches)

    def prepare(self, tokens: int) -> None:
        """Compiles the steps for prompts of `tokens` tokens and for single tokens."""
        width, begin = self._way(tokens)
        self._compiled(width, begin=begin)
        self._compiled(1, begin=False)
        self._choose(self._logits, jax.device_put(np.int32(0)))

    def feed(self, tokens: Sequence[Sequence[int]]) -> None:
        """Appends tokens to every sequence, any number to each; a sequence without new tokens is unchanged.

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
        inputs = self._put((padded, counts))
        self._logits, self.caches = step(self._state, inputs[0], self.caches, inputs[1], self._logits)
        for row, new in zip(self.tokens, tokens, strict=True):
            row += new
        self._fed |= counts > 0

    def draw(self, which: Sequence[bool] | None = None) -> list[int]:
        """The next token of every sequence, not fed yet.

        Args:
            which: sequences whose tokens are needed; by default all. The others' tokens are undefined.

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
        """Removes the last tokens of every sequence; it must be fed again before a token is drawn from it."""
        counts = self._put(np.asarray(tokens, np.int32))
        self.caches = tuple(cache.rollback(counts) for cache in self.caches)
        for row, count in zip(self.tokens, tokens, strict=True):
            del row[len(row) - count :]
        self._fed &= np.asarray(tokens) == 0

    def reset(self, which: Sequence[bool]) -> None:
        """Removes all tokens of some sequences, so that others can take their places."""
        emptied = self._put(np.asarray(which, bool))
        self.caches = tuple(cache.reset(emptied) for cache in self.caches)
        self.tokens = [[] if gone else row for gone, row in zip(which, self.tokens, strict=True)]
        self._fed[np.asarray(which)] = False

    def fork(self, samples: int, max_new_tokens: int) -> None:
        """Continues every sequence in several samples, which share its blocks: [b] -> [b · samples].

        Args:
            samples: continuations of each sequence.
            max_new_tokens: most tokens of each.
        """
        self.caches = tuple(cache.fork(samples, max_new_tokens) for cache in self.caches)
        self.max_length = min(self.max_length, int(self.lengths.max()) + max_new_tokens)
        self.tokens = [list(row) for row in self.tokens for _ in range(samples)]
        self._batch, self._fed = samples * self._batch, np.repeat(self._fed, samples)
        self._logits = _repeated(self._logits, samples)
        self._steps, self._choose = {}, _chooser(self._sampling, self._seed, self._batch)

    def decode(
        self, max_new_tokens: int, *, end_ids: Sequence[int] = (), ended: set[int] | None = None
    ) -> Iterator[dict[int, int]]:
        """Draws tokens and feeds them back until every sequence has ended.

        Args:
            max_new_tokens: most tokens of a sequence.
            end_ids: tokens that end a sequence. They are drawn, but not fed.
            ended: indices of the sequences that have ended. The caller may add to it between two steps.

        Yields:
            The next token of each sequence that continues, by its index.

        Raises:
            FloatingPointError: see `draw`.
        """
        ended = set() if ended is None else ended
        for number in range(max_new_tokens):
            active = [row not in ended for row in range(self._batch)]
            drawn = {row: token for row, token in enumerate(self.draw(active)) if active[row]}
            ended |= {row for row, token in drawn.items() if token in end_ids}
            yield drawn
            following = [[] if row in ended else [drawn[row]] for row in range(self._batch)]
            if not any(following) or number + 1 == max_new_tokens:
                return
            self.feed(following)

    def wait(self) -> None:
        """Waits until the device has finished all steps."""
        jax.block_until_ready(self._logits)

    def _compiled(self, width: int, *, begin: bool):
        """The model's step on `width` tokens of each sequence. Caches are updated in place."""
        if (width, begin) not in self._steps:
            if not self._steps:
                self._say("compiling …")
            tokens = jax.ShapeDtypeStruct((self._batch, width), jnp.int32, sharding=self._sharding)
            counts = jax.ShapeDtypeStruct((self._batch,), jnp.int32, sharding=self._sharding)
            step = jax.jit(self._on_tokens(begin), donate_argnums=2)
            self._steps[width, begin] = step.lower(self._state, tokens, self.caches, counts, self._logits).compile()
        return self._steps[width, begin]

    def _put[T](self, arrays: T) -> T:
        """Brings arrays [b, ...] to the devices."""
        return jax.device_put(arrays, self._sharding)

    def _on_tokens(self, begin: bool):
        def step(state, tokens, caches, counts, logits: Array):
            model = nnx.merge(self._graph, state)
            last, caches = (model.prefill if begin else model.extend)(tokens, caches, counts=counts, last=True)
            last = resharded(last[:, 0], batch_spec(tokens))
            return jnp.where((counts > 0)[:, None], last, logits), caches

        return step


def _chooser(sampling: Callable[[Array, Array], Array], seed: int, batch: int):
    """The function from logits [b, v] and the number of draws before to token ids [b]."""

    @jax.jit
    def choose(logits, draws):
        def one(row, logits):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), draws)
            return sampling(logits[None], key)[0]

        logits = resharded(logits, PartitionSpec())  # every process draws all tokens
        return jax.vmap(one)(jnp.arange(batch, dtype=jnp.int32), logits)

    return choose


@functools.partial(jax.jit, static_argnums=1)
def _repeated(logits: Array, samples: int) -> Array:
    return jnp.repeat(logits, samples, 0)


def _full_bytes(cache, length: int) -> int:
    blocks = -(-length // cache.layout.block_size) * len(cache.layout.num_slots)
    slots = sum(buffer.block_ids.shape[1] * buffer.block_ids.shape[2] for buffer in cache.buffers)
    return cache.nbytes * blocks // slots
