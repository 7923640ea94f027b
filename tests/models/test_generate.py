"""Generation over caches: the tokens are those of the whole model without any, in whatever portions they came."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Transformer, TransformerConfig
from models.generate import Spent, generate, main
from models.pretrained import Pretrained
from models.sampling import Sampling
from s2jax import Dense, FirstTokens, Local, LocalStride

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")

CONFIG = TransformerConfig(
    vocab_size=50, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48,
    pattern=LocalStride(16, 1, 2), dense_layers=(1,), qk_norm=True, dtype="float32", implementation="xla",
)  # fmt: skip


def pretrained(**changes) -> Pretrained:
    model = Transformer(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))
    return Pretrained(model=model, max_context=200)


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, CONFIG.vocab_size, length).tolist()


def without_cache(model: Transformer, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        padded = jnp.asarray([ids + [0] * (128 - len(ids))])
        ids.append(int(RUN(*nnx.split(model), padded)[0, len(ids) - 1].argmax()))
    return ids[-count:]


RUN = jax.jit(lambda graph, state, tokens: nnx.merge(graph, state)(tokens), static_argnums=0)


@pytest.mark.usefixtures("quick_compilation")
class TestModel:
    @pytest.mark.parametrize("pattern", [LocalStride(16, 1, 2), FirstTokens(4) | Local(tokens=20), Dense()], ids=str)
    @pytest.mark.parametrize("chunk", [None, 7])
    def test_greedy_tokens_are_those_of_the_model_without_a_cache(self, pattern, chunk):
        ours = pretrained(pattern=pattern)
        spent = Spent()
        found = list(generate(ours, prompt(53), 12, chunk=chunk, spent=spent))
        assert found == without_cache(ours.model, prompt(53), 12)
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
        with pytest.raises(ValueError, match="a model of 3 layers needs as many caches, got 2"):
            ours.extend(jnp.zeros((1, 1), int), ours.create_caches(1, max_length=64)[:2])
        dense = pretrained(pattern=Dense()).model.create_caches(1, max_length=64)
        with pytest.raises(ValueError, match=r"the cache was made for Dense\(\), the layer reads by LocalStride"):
            ours.extend(jnp.zeros((1, 1), int), dense)


class TestCommand:
    def test_continues_a_text(self, smollm2_path, capsys):
        main(["--model", str(smollm2_path), "--prompt", "The capital of Italy is", "--max-new-tokens", "4"])
        told = capsys.readouterr()
        assert told.out == " Rome.\n\n\n"  # the last one ends the output
        assert "prompt: 5 tokens in " in told.err
        assert "100% of a full one" in told.err

    @pytest.mark.slow
    def test_answers(self, smollm2_path, capsys):
        said = ["--chat", "--system", "Be brief.", "--prompt", "Hello!", "--max-new-tokens", "2"]
        main(["--model", str(smollm2_path), *said])
        told = capsys.readouterr()
        assert told.out.strip()
        assert "prompt: 19 tokens in " in told.err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--prompt", ""], "the prompt is empty"),
            (["--prompt", "a", "--pattern", "Diagonal(3)"], "expected a pattern such as"),
            (["--prompt", "a", "--temperature", "-1"], "temperature must be at least 0, got -1"),
            (["--prompt", "a", "--model", "nowhere"], "nowhere"),
            (["--prompt", "a", "--max-new-tokens", "9000"], "do not fit into the model's context of 8192"),
            (["--prompt", "a", "--dense-layers", "31"], "dense_layers must be layer indices from 0 to 29"),
            (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
            (["--prompt", "a", "--system", "b"], "--system is part of a conversation: give --chat, too"),
        ],
    )
    def test_errors_are_one_line(self, smollm2_path, arguments, message):
        model = [] if "--model" in arguments else ["--model", str(smollm2_path)]
        with pytest.raises(SystemExit) as raised:
            main([*model, *arguments])
        assert message in raised.value.code
        assert "\n" not in raised.value.code
