"""The examples, on a tiny model: their tokens are those of plain decoding."""

import dataclasses
import io
import sys

import numpy as np
import pytest

from examples import continuous_batching, fork, speculative_decoding
from models.checkpoints.pretrained import Pretrained
from models.command_line import run
from models.sampling import Sampling
from s2jax import Dense, FirstBlocks, Local, LocalStride
from tests.models.tiny_checkpoints import LLAMA, greedy, transformer

pytestmark = pytest.mark.usefixtures("quick_compilation", "kept_compilations")

CONFIG = dataclasses.replace(LLAMA, pattern=LocalStride(16, 1, 2), dense_layers=(0,))
OURS = Pretrained(model=transformer(CONFIG), max_context=256)


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, 96, length).tolist()


@pytest.mark.parametrize(
    ("pattern", "drafts"),
    [(Local(1, 16) | FirstBlocks(1, 16), 4), pytest.param(Dense(), 1, marks=pytest.mark.slow)],
    ids=str,
)
def test_speculative_decoding_gives_the_tokens_of_greedy_decoding(pattern, drafts):
    expected = greedy(OURS.model, prompt(70), 24)
    found = speculative_decoding.speculate(OURS, pattern, prompt(70), 24, drafts)
    assert found.tokens == expected
    assert found.drafted == drafts * found.rounds
    assert 1 + found.rounds + found.accepted >= 24
    ends = dataclasses.replace(OURS, eos_ids=(expected[9],))
    cut = speculative_decoding.speculate(ends, pattern, prompt(70), 24, drafts)
    assert cut.tokens == expected[: expected.index(expected[9]) + 1]


def test_drafts_of_the_model_itself_are_all_right():
    same = Pretrained(model=transformer(dataclasses.replace(CONFIG, dense_layers=())), max_context=256)
    found = speculative_decoding.speculate(same, CONFIG.pattern, prompt(40), 20, 4)
    assert (found.accepted, found.rounds) == (found.drafted, 4)


def test_requests_come_and_go():
    lengths = [(40, 5), (3, 12), (17, 1), (33, 7), (8, 9)]
    requests = [continuous_batching.Request(prompt(length), new) for length, new in lengths]
    done = list(continuous_batching.serve(OURS, requests, slots=2))
    assert sorted(map(id, done)) == sorted(map(id, requests))
    for request in requests:
        assert request.tokens == greedy(OURS.model, request.prompt, request.max_new_tokens)
    assert done[0] is requests[0]
    assert requests[2].slot == requests[0].slot  # which was empty first
    assert requests[2].first_step == requests[0].last_step + 1


def test_samples_of_one_prompt():
    expected = greedy(OURS.model, prompt(200), 6)
    found, size, apart = fork.samples_of(OURS, prompt(200), 4, 6, Sampling())
    assert found == [expected] * 4
    assert size < apart
    sampled, *_ = fork.samples_of(OURS, prompt(200), 4, 6, Sampling(1.0))
    assert len({tuple(ids) for ids in sampled}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("example", [continuous_batching, fork, speculative_decoding])
def test_on_a_real_model(example, smollm2_path, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert run(example.__name__, example._main, ["--model", str(smollm2_path)]) == 0
    assert out.getvalue()
