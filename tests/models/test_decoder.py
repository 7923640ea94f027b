"""Generation over caches: the tokens are those of the whole model without any, in whatever portions they came."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Transformer, TransformerConfig
from models.checkpoints.pretrained import Pretrained
from models.decoder import Decoder, padded_width
from models.generation import Spent, generate, generate_batch
from models.sampling import Sampling
from s2jax import Dense, FirstTokens, Local, LocalStride
from tests.models.tiny_checkpoints import greedy, transformer

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")

SLOW = pytest.mark.slow
CONFIG = TransformerConfig(
    vocab_size=50, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48,
    pattern=LocalStride(16, 1, 2), dense_layers=(1,), qk_norm=True, dtype="float32", implementation="xla",
)  # fmt: skip


def pretrained(**changes) -> Pretrained:
    return Pretrained(model=transformer(dataclasses.replace(CONFIG, **changes)), max_context=200)


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, CONFIG.vocab_size, length).tolist()


RUN = jax.jit(lambda graph, state, tokens: nnx.merge(graph, state)(tokens), static_argnums=0)


@pytest.mark.usefixtures("kept_compilations")
class TestModel:
    @pytest.mark.parametrize(
        ("pattern", "chunk"),
        [
            (FirstTokens(4) | Local(tokens=20), 7),
            *(pytest.param(LocalStride(16, 1, 2), chunk, marks=SLOW) for chunk in (None, 7)),
            *(pytest.param(Dense(), chunk, marks=SLOW) for chunk in (None, 7)),
        ],
        ids=str,
    )
    def test_greedy_tokens_are_those_of_the_model_without_a_cache(self, pattern, chunk):
        ours = pretrained(pattern=pattern)
        spent = Spent()
        found = list(generate(ours, prompt(53), 12, chunk=chunk, spent=spent))
        assert found == greedy(ours.model, prompt(53), 12)
        assert (spent.prompt, spent.tokens) == (53, 12)
        assert (spent.cache_bytes < spent.full_bytes) == (pattern != Dense())

    def test_logits_of_prefill_and_extend(self):
        ours, ids = pretrained().model, jnp.asarray([prompt(60), prompt(60)[::-1]])
        expected = RUN(*nnx.split(ours), ids)
        caches = ours.create_caches(2, max_length=64)
        counts = jnp.array([30, 17])
        last, caches = ours.prefill(ids[:, :30], caches, counts=counts)
        for row, count in enumerate(counts):
            np.testing.assert_allclose(last[row, 0], expected[row, count - 1], atol=2e-5)
        following = jnp.stack([ids[0, 30:40], ids[1, 17:27]])
        logits, caches = ours.extend(following, caches)
        np.testing.assert_allclose(logits[0], expected[0, 30:40], atol=2e-5)
        np.testing.assert_allclose(logits[1], expected[1, 17:27], atol=2e-5)

    def test_a_seed_decides(self):
        ours, sampling = pretrained(), Sampling(1.0)
        first, second, third = (
            list(generate(ours, prompt(20), 10, sampling=sampling, seed=seed)) for seed in (0, 0, 1)
        )
        assert first == second != third

    def test_lengths_and_draws_compile_nothing_again(self, monkeypatch):
        """A prompt's step and a token's are traced once each, the choice of tokens too."""
        chex.clear_trace_counter()
        monkeypatch.setattr(Transformer, "_cached", chex.assert_max_traces(Transformer._cached, 2))
        chosen = chex.assert_max_traces(lambda logits, key: Sampling(1.0)(logits, key), 1)
        decoder = Decoder(pretrained().model, batch=2, max_length=100, sampling=chosen)
        decoder.feed([prompt(20), prompt(31)])
        assert len(list(decoder.decode(12))) == 12
        decoder.empty()
        decoder.feed([prompt(17), prompt(32)])
        assert len(list(decoder.decode(5))) == 5

    def test_a_text_ends(self):
        ours = pretrained()
        ids = list(generate(ours, prompt(20), 10))
        ends = dataclasses.replace(ours, eos_ids=(ids[3],))
        assert list(generate(ends, prompt(20), 10)) == ids[: ids.index(ids[3]) + 1]

    @pytest.mark.parametrize(
        ("ids", "count", "settings", "message"),
        [
            ([], 1, {}, "the prompt is empty"),
            (prompt(150), 51, {}, "a prompt of 150 tokens and 51 new ones do not fit into the model's context of 200"),
            ([1], 0, {}, "max_new_tokens and chunk must be at least 1, got 0"),
            ([1], 1, {"chunk": 0}, "must be at least 1, got 1 and 0"),
        ],
    )
    def test_errors(self, ids, count, settings, message):
        with pytest.raises(ValueError, match=message):
            list(generate(pretrained(), ids, count, **settings))

    def test_caches_of_another_model(self):
        ours = pretrained().model
        with pytest.raises(ValueError, match="a model of 2 layers needs as many caches, got 1"):
            ours.extend(jnp.zeros((1, 1), int), ours.create_caches(1, max_length=64)[:1])
        dense = pretrained(pattern=Dense()).model.create_caches(1, max_length=64)
        with pytest.raises(ValueError, match=r"the cache was made for Dense\(\), the layer reads by LocalStride"):
            ours.extend(jnp.zeros((1, 1), int), dense)

    def test_prompts_of_any_length_go_on_as_if_alone(self):
        ours = pretrained()
        prompts = [prompt(53), prompt(3), prompt(17)]
        alone = [greedy(ours.model, ids, 8) for ids in prompts]
        ends = dataclasses.replace(ours, eos_ids=(alone[1][2],))
        for chunk in (None, 16):
            found: list[list[int]] = [[], [], []]
            ended = set[int]()
            for step in generate_batch(ends, prompts, 8, chunk=chunk, ended=ended):
                for row, token in step.items():
                    found[row].append(token)
                if len(found[2]) == 5:
                    ended.add(2)  # as when a stop string was found
            for row, most in enumerate((8, 8, 5)):
                expected = alone[row][:most]
                end = alone[1][2]
                assert found[row] == (expected[: expected.index(end) + 1] if end in expected else expected)

    @pytest.mark.parametrize(
        "sampling", [Sampling(), pytest.param(Sampling(1.0), marks=SLOW)], ids=["greedy", "sampled"]
    )
    def test_logits_without_a_distribution_end_it_and_name_the_place(self, sampling):
        ours = pretrained()
        ours.model.final_norm.scale.set_value(jnp.full(32, jnp.nan))
        with pytest.raises(FloatingPointError, match="for the token at position 20 are NaN or all -inf"):
            list(generate(ours, prompt(20), 10, sampling=sampling))
        with pytest.raises(FloatingPointError, match="sequence 1: the model's logits for the token at position 20"):
            list(generate_batch(ours, [prompt(20), prompt(3)], 10, sampling=sampling))

    def test_a_decoder_takes_back_and_empties(self):
        ours, ids = pretrained(), prompt(40)
        decoder = Decoder(ours.model, batch=2, max_length=100, max_rollback=8)
        decoder.feed([ids, ids[:20]])
        expected = decoder.draw()
        decoder.feed([[1, 2, 3], [4]])
        decoder.rollback([3, 1])
        assert decoder.lengths.tolist() == [40, 20]
        decoder.rollback([1, 1])
        with pytest.raises(FloatingPointError, match=r"sequence 1: .* position 39"):
            decoder.draw()  # the logits are of the tokens that were taken back
        decoder.feed([[ids[39]], [ids[19]]])
        assert decoder.draw() == expected
        decoder.reset([True, False])
        with pytest.raises(FloatingPointError, match=r"sequence 1: .* position 0"):
            decoder.draw()
        decoder.feed([ids[:20], []])
        assert decoder.draw() == [expected[1]] * 2
        assert decoder.lengths.tolist() == [20, 20]
        with pytest.raises(ValueError, match="257 tokens do not fit into caches for 256"):
            decoder.feed([prompt(237), []])

    def test_a_forked_decoder_goes_on_in_samples(self):
        ours, prompts = pretrained(), [prompt(40), prompt(23)]
        decoder = Decoder(ours.model, batch=2, max_length=100)
        decoder.feed(prompts)
        decoder.fork(2, 6)
        found = [list(ids) for ids in decoder.tokens]
        for drawn in decoder.decode(6, ended={3}):
            for row, token in drawn.items():
                found[row].append(token)
        first, second = (ids + greedy(ours.model, ids, 6) for ids in prompts)
        assert found == [first, first, second, prompts[1]]
        assert decoder.tokens == [first[:-1], first[:-1], second[:-1], prompts[1]]  # the last tokens are not fed


@pytest.mark.parametrize(
    ("tokens", "width"), [(1, 1), (2, 16), (16, 16), (17, 32), (200, 256), (256, 256), (257, 512), (512, 512)]
)
def test_few_widths_are_compiled(tokens, width):
    assert padded_width(tokens) == width


def test_measurements_in_words():
    one = Spent(1, 0.5, 0.25, 1, 1, 1 << 20, 4 << 20)
    assert str(one) == "prompt: 1 token in 0.50 s; then 1 token, 0.0 a second; cache: 1.0 MiB, 25% of a full one"
    several = Spent(1200, 0.5, 0.25, 6, 2, 1 << 20, 4 << 20)
    assert str(several).startswith("2 prompts: 1,200 tokens in 0.50 s; then 6 tokens, 16.0 a second; ")
