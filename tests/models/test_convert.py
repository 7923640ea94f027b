"""Which layers stay dense: lost mass against softmax weights written out, and the budget kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import TransformerConfig
from models.convert import dense_layers_within, kv_share, lost_mass
from s2jax import Dense, FirstTokens, Local, LocalStride
from tests.models.tiny_checkpoints import transformer

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")

CONFIG = TransformerConfig(
    vocab_size=50, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48, pattern=Dense(),
    qk_norm=True, dtype="float32", implementation="xla",
)  # fmt: skip


@pytest.mark.parametrize("pattern", [LocalStride(16, 1, 3), Local(tokens=10) | FirstTokens(2)], ids=str)
def test_lost_mass_is_that_of_the_weights(pattern):
    model = transformer(CONFIG)
    tokens = jax.random.randint(jax.random.key(0), (2, 70), 0, CONFIG.vocab_size)
    mask, causal = pattern.token_mask(4, 2, 70, 70), np.tril(np.ones((70, 70), bool))
    x, expected = model.embed(tokens), []
    for layer in model.layers:
        attend, y = layer.attention, layer.attention_norm(x)
        key = jnp.repeat(attend.keys_values(y)[0], 2, 2)
        logits = jnp.einsum("bthd,bshd->bhts", attend.queries(y), key) * 8**-0.5
        weights = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf))
        expected.append(1 - jnp.where(mask, weights, 0).sum(-1).mean())
        x = layer(x)
    np.testing.assert_allclose(lost_mass(model, pattern, tokens), expected, atol=1e-5)


def test_all_of_the_mass_is_kept_by_dense_attention():
    model = transformer(CONFIG)
    np.testing.assert_allclose(lost_mass(model, Dense(), jnp.arange(40)[None]), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("budget", "chosen"), [(0.2, ()), (0.39, ()), (0.4, (3,)), (0.6, (0, 3)), (0.99, (0, 2, 3)), (1, (0, 1, 2, 3))]
)
def test_layers_that_lose_most_stay_dense_within_the_budget(budget, chosen):
    assert dense_layers_within(np.array([0.5, 0.1, 0.2, 0.9]), 0.2, budget) == chosen
    assert 0.2 + len(chosen) / 4 * 0.8 <= budget + 1e-9


def test_a_sparse_layer_loses_of_what_it_reads_itself():
    own = Local(2, 16)
    model = transformer(dataclasses.replace(CONFIG, pattern=own, dense_layers=(1,)))
    tokens = jax.random.randint(jax.random.key(0), (1, 70), 0, CONFIG.vocab_size)
    lost = lost_mass(model, own, tokens)
    assert lost[1] > 0.01
    np.testing.assert_allclose(lost[[0, 2]], 0, atol=1e-6)


def test_share_of_a_cache():
    assert kv_share(CONFIG, Dense(), 1000) == 1
    assert kv_share(CONFIG, LocalStride(64, 16, 2), 128 << 10) == (1024 + 8) / 2048


@pytest.mark.parametrize("budget", [0.1, 1.5, float("nan")])
def test_a_budget_that_cannot_be(budget):
    with pytest.raises(ValueError, match=r"must be from 0\.200, which the pattern takes in all layers, to 1"):
        dense_layers_within(np.zeros(3), 0.2, budget)
