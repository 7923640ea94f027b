"""The KV cache under operations in any order, against lists of tokens and a dense attention written out in NumPy."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from s2jax import BlockMask, Dense, FirstTokens, KVCache, Local, LocalStride, Pattern, PerHead, Ranges

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")

BATCH, HEADS, KV_HEADS, FEATURES, VALUES, SIZE = 2, 4, 2, 8, 4, 16
LONGEST, PROMPT, ROLLBACK, SAMPLES = 150, 60, 6, 2
DRAFT, CHUNK = ROLLBACK + 1, 40  # the most that is written before it is read, and what takes the other way


@dataclasses.dataclass(frozen=True)
class Case:
    """A pattern, and for how many tokens it forks."""

    pattern: Pattern
    new: int
    max_length: int | None = LONGEST


RANGES = Ranges(((2, 2), (None, 3)), SIZE)
WINDOW = FirstTokens(5) | Local(tokens=18)
STRIDE = LocalStride(SIZE, 2, 3)
MASK = BlockMask(np.random.default_rng(1).random((HEADS, 10, 10)) < 0.4, SIZE)
QUICK = {
    "by head": Case(PerHead([STRIDE, STRIDE, WINDOW, RANGES]), 20),
}
THOROUGH = {
    "streaming": Case(Local(2, block_size=SIZE), 20, None),
    "without their own blocks": Case(LocalStride(SIZE, 0, 4, head_offset=1), 100),
    "any mask": Case(MASK, 40),
    "local stride": Case(STRIDE, 20),
    "local stride, forks with room for all": Case(STRIDE, 100),
    "read again after a while": Case(RANGES, 20),
    "first tokens": Case(WINDOW, 100),
    "streaming stripes": Case(Ranges(((2, 1), (6, 2)), SIZE), 100, None),
    "dense heads": Case(PerHead([Dense(), STRIDE, MASK, MASK]), 40),
}


@jax.jit
def prefill(cache, *tokens_and_counts):
    *tokens, counts = tokens_and_counts
    return cache.prefill(*tokens, counts=counts, implementation="reference", return_lse=True)


@jax.jit
def extend(cache, *tokens_and_counts):
    *tokens, counts = tokens_and_counts
    return cache.extend(*tokens, counts=counts, return_lse=True)


rollback = jax.jit(KVCache.rollback)
reset = jax.jit(KVCache.reset)
fork = jax.jit(KVCache.fork, static_argnums=(1, 2))


@functools.cache
def mask_of(pattern: Pattern) -> np.ndarray:
    return np.asarray(pattern.token_mask(HEADS, KV_HEADS, LONGEST, LONGEST))


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Its keys [n, k, d] and values [n, k, e], how long it ever was, and whether it was asked for what cannot be."""

    keys: np.ndarray
    values: np.ndarray
    max_length: int = 0
    begins: int = 0
    lost: bool = False

    @classmethod
    def empty(cls) -> "Sequence":
        return cls(np.zeros((0, KV_HEADS, FEATURES)), np.zeros((0, KV_HEADS, VALUES)))

    def __len__(self):
        return len(self.keys)

    def extended(self, keys, values) -> "Sequence":
        length = len(self) + len(keys)
        keys, values = np.concatenate([self.keys, keys]), np.concatenate([self.values, values])
        return dataclasses.replace(self, keys=keys, values=values, max_length=max(self.max_length, length))

    def shortened(self, count: int) -> "Sequence":
        length = len(self) - count
        lost = self.lost or length < max(self.max_length - ROLLBACK, self.begins)
        length = max(length, 0)
        return dataclasses.replace(self, keys=self.keys[:length], values=self.values[:length], lost=lost)

    def forked(self) -> "Sequence":
        return dataclasses.replace(self, max_length=len(self), begins=len(self) // SIZE * SIZE)

    def attended(self, query: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """From the last positions, those of query [t, h, d]: out [t, h, e] and lse [h, t]."""
        group, begin = HEADS // KV_HEADS, len(self) - len(query)
        keys, values = (np.repeat(array, group, 1) for array in (self.keys, self.values))
        logits = np.einsum("thd,nhd->htn", query, keys) * FEATURES**-0.5
        weights = np.where(mask[:, begin : len(self), : len(self)], np.exp(logits), 0)
        total = weights.sum(-1)
        with np.errstate(divide="ignore"):
            lse = np.log(total)
        return np.einsum("htn,nhe->the", weights / np.where(total > 0, total, 1)[..., None], values), lse


class Machine(RuleBasedStateMachine):
    def __init__(self, case: Case):
        super().__init__()
        self.case, self.rng = case, np.random.default_rng(0)
        self.model = [Sequence.empty()] * BATCH
        self.parents: tuple[KVCache, list[Sequence]] | None = None
        self.cache = KVCache.create(
            case.pattern, batch=BATCH, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=FEATURES, value_dim=VALUES,
            max_length=case.max_length, max_rollback=ROLLBACK, dtype=jnp.float32,
        )  # fmt: skip

    def tokens(self, count: int) -> list[np.ndarray]:
        shapes = (HEADS, FEATURES), (KV_HEADS, FEATURES), (KV_HEADS, VALUES)
        return [self.rng.normal(size=(len(self.model), count, *shape)).astype(np.float32) for shape in shapes]

    def check(self, found, before: list[Sequence], query, counts):
        """Of the sequences, now in the model as they were before and so many tokens."""
        out, lse = map(np.asarray, found)
        for b, (old, new, count) in enumerate(zip(before, self.model, counts, strict=True)):
            out_b, lse_b = out[b, :count], lse[b, :, :count]
            if new.lost:
                assert np.isnan(out_b).all()
                assert np.isnan(lse_b).all()
                continue
            expected = new.attended(query[b, :count], mask_of(self.case.pattern))
            # A fork may have room for a few more tokens than it was asked to have, by which it fills a block.
            roomy = 10**9 if self.parents is None else len(self.parents[1][b // SAMPLES]) + self.case.new
            some = np.arange(len(old), len(new)) < roomy
            some |= ~np.isnan(lse_b).all(0)
            np.testing.assert_allclose(out_b[some], expected[0][some], atol=2e-5, rtol=0)
            np.testing.assert_allclose(lse_b[:, some], expected[1][:, some], atol=2e-5, rtol=0)
            assert np.isnan(out_b[~some]).all()

    def extended(self, length: int, counts: list[int]):
        # No further than the mask that is known.
        counts = [min(c, length, LONGEST - len(each)) for c, each in zip(counts, self.model, strict=False)]
        query, keys, values = self.tokens(length)
        found, self.cache = extend(self.cache, query, keys, values, np.array(counts))
        before = self.model
        new = [(each, k[:c], v[:c]) for each, k, v, c in zip(before, keys, values, counts, strict=True)]
        self.model = [each.extended(k, v) for each, k, v in new]
        self.check(found, before, query, counts)

    @initialize(counts=st.lists(st.integers(0, PROMPT), min_size=BATCH, max_size=BATCH))
    def begins(self, counts):
        self.prefill(counts)

    @precondition(lambda self: self.parents is None)
    @rule(counts=st.lists(st.integers(0, PROMPT), min_size=BATCH, max_size=BATCH))
    def prefill(self, counts):
        query, keys, values = self.tokens(PROMPT)
        found, self.cache = prefill(self.cache, query, keys, values, np.array(counts))
        before = [Sequence.empty()] * BATCH
        self.model = [s.extended(k[:c], v[:c]) for s, k, v, c in zip(before, keys, values, counts, strict=True)]
        self.check(found, before, query, counts)

    @rule(counts=st.lists(st.integers(0, DRAFT), min_size=BATCH * SAMPLES, max_size=BATCH * SAMPLES))
    def extend_by_some(self, counts):
        self.extended(DRAFT, counts)

    @rule(counts=st.lists(st.sampled_from([0, 1, 16, 33, CHUNK]), min_size=BATCH * SAMPLES, max_size=BATCH * SAMPLES))
    def extend_by_many(self, counts):
        self.extended(CHUNK, counts)

    @rule(taken_back=st.lists(st.integers(0, ROLLBACK), min_size=BATCH * SAMPLES, max_size=BATCH * SAMPLES))
    def verify_a_draft(self, taken_back):
        before = [len(each) for each in self.model]
        self.extended(DRAFT, [DRAFT] * len(self.model))
        added = [len(each) - length for each, length in zip(self.model, before, strict=True)]
        self.rollback([min(pair) for pair in zip(taken_back, added, strict=False)])

    @rule(counts=st.lists(st.integers(0, ROLLBACK), min_size=BATCH * SAMPLES, max_size=BATCH * SAMPLES))
    def rollback(self, counts):
        counts = counts[: len(self.model)]
        self.cache = rollback(self.cache, np.array(counts))
        self.model = [each.shortened(count) for each, count in zip(self.model, counts, strict=True)]

    @precondition(lambda self: self.parents is None)
    @rule(which=st.lists(st.booleans(), min_size=BATCH, max_size=BATCH))
    def reset(self, which):
        self.cache = reset(self.cache, np.array(which))
        self.model = [Sequence.empty() if gone else each for each, gone in zip(self.model, which, strict=True)]

    @precondition(lambda self: self.parents is None)
    @rule()
    def fork(self):
        self.parents = self.cache, self.model
        self.cache = fork(self.cache, SAMPLES, self.case.new)
        self.model = [each.forked() for each in self.model for _ in range(SAMPLES)]

    @precondition(lambda self: self.parents is not None)
    @rule()
    def back_to_the_prompts(self):
        assert self.parents is not None
        (self.cache, self.model), self.parents = self.parents, None

    @invariant()
    def lengths_agree(self):
        lengths = np.asarray(self.cache.lengths)
        assert all(each.lost or length == len(each) for each, length in zip(self.model, lengths, strict=True))


def run(case: Case, **settings):
    run_state_machine_as_test(functools.partial(Machine, case), settings=hypothesis.settings(**settings))


@pytest.mark.parametrize("name", QUICK)
def test_any_order(name):
    run(QUICK[name], stateful_step_count=30)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, *THOROUGH])
def test_any_order_of_many(name):
    run({**QUICK, **THOROUGH}[name], stateful_step_count=50)
