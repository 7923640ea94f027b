"""The decoder: causality and pattern by gradients, hybrid layers, remat, precision, packed documents."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models.transformer
from models import Transformer, TransformerConfig
from pallas_kernels.reference import REFERENCE
from s2jax.patterns import Dense, LocalStride
from tests.models import tiny_checkpoints

PATTERN = LocalStride(block_size=16, local_blocks=1, vert_stride=2)
CONFIG = TransformerConfig(
    vocab_size=50,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    pattern=PATTERN,
    dense_layers=(0,),
    qk_norm=True,
    dtype="float32",
    implementation="reference",  # compiles fastest
)


def transformer(**changes):
    return tiny_checkpoints.transformer(dataclasses.replace(CONFIG, **changes), unit_gains=True)


def tokens(batch=2, length=70, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, CONFIG.vocab_size)


def loss(state, graph, ids, **arguments):
    logits = nnx.merge(graph, state)(ids[:, :-1], **arguments)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1))


def influence(function):
    """Which of 70 input positions reaches which output position of a function of [b, t, f]: bool [t, s]."""
    x = jax.random.normal(jax.random.key(3), (70, CONFIG.d_model))
    jacobian = jax.jit(jax.jacrev(lambda x: function(x[None])[0].sum(-1)))(x)
    return np.abs(jacobian).max(-1) > 0


def test_logits_are_float32_of_the_vocabulary():
    for tie_embeddings in (False, True):
        for dtype in ("float32", "bfloat16"):
            logits = jax.eval_shape(transformer(tie_embeddings=tie_embeddings, dtype=dtype), tokens())
            assert (logits.shape, logits.dtype) == ((2, 70, 50), jnp.float32)


def test_a_fresh_model_is_undecided():
    model = Transformer(dataclasses.replace(CONFIG, num_layers=8), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    assert loss(state, graph, tokens()) == pytest.approx(math.log(50), abs=0.1)
    x = model.embed(tokens()) / 0.02
    for layer in model.layers:
        x = layer(x)
    assert 0.7 < float(x.std()) < 2  # the residual stream keeps its size


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_logit_depends_on_a_later_token(remat):
    model = transformer(remat=remat)

    def logits(x):
        for layer in model.layers:
            x = layer(x)
        return model.lm_head(model.final_norm(x))

    np.testing.assert_array_equal(influence(logits), np.tri(70, dtype=bool))  # one layer is dense
    ids = tokens()
    later = ids.at[:, 40:].set(0)
    np.testing.assert_array_equal(model(ids)[:, :40], model(later)[:, :40])


@pytest.mark.filterwarnings("ignore:.*together read 25%")
def test_dense_layers_are_dense_and_the_others_follow_the_pattern():
    pattern = LocalStride(block_size=16, local_blocks=1, vert_stride=4, homo_head=True)  # reads part of the context
    model = transformer(num_layers=3, pattern=pattern, dense_layers=(1,))
    dense, sparse = np.tri(70, dtype=bool), pattern.token_mask(4, 2, 70, 70).any(0)
    assert not np.array_equal(dense, sparse)
    for layer, expected in zip(model.layers, (sparse, dense, sparse), strict=True):
        np.testing.assert_array_equal(influence(layer), expected)


@pytest.mark.parametrize(
    ("remat", "dtype"), [("attention", "float32"), pytest.param("full", "bfloat16", marks=pytest.mark.slow)]
)
def test_remat_changes_no_gradient(remat, dtype):
    graph, state = nnx.split(transformer(dtype=dtype))
    recomputing, same_state = nnx.split(transformer(dtype=dtype, remat=remat))
    expected = jax.jit(jax.grad(loss), static_argnums=1)(state, graph, tokens())
    result = jax.jit(jax.grad(loss), static_argnums=1)(same_state, recomputing, tokens())
    tolerance = 1e-6 if dtype == "float32" else 5e-3  # XLA rounds to bfloat16 in other places
    chex.assert_trees_all_close(result, expected, rtol=1e-7, atol=tolerance)


@pytest.mark.parametrize(
    ("remat", "runs"), [pytest.param("attention", 2, marks=pytest.mark.slow), ("full", 2), ("everything", 4)], ids=str
)
def test_no_remat_runs_the_attention_again(remat, runs, monkeypatch):
    """Counts runs of the attention's forward pass in one step of two layers, by a callback that can be left out."""
    count = []
    forward = REFERENCE.forward

    def counted(problem, operands):
        results = forward(problem, operands)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), results)
        return jax.pure_callback(lambda results: count.append(1) or results, like, results)

    monkeypatch.setattr(REFERENCE, "forward", counted, raising=False)
    if remat == "everything":  # the counter counts
        monkeypatch.setattr(models.transformer, "keep_attention", jax.checkpoint)
    jax.clear_caches()  # what was traced before has no counter
    graph, state = nnx.split(transformer(remat="full" if remat == "everything" else remat))
    jax.block_until_ready(jax.jit(jax.grad(loss), static_argnums=1)(state, graph, tokens()))
    jax.clear_caches()  # and what is traced later shall have none
    assert len(count) == runs


def test_default_implementation_agrees_with_the_reference():
    graph, state = nnx.split(transformer(implementation=None))
    of_reference, _ = nnx.split(transformer())
    result, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(state, graph, tokens())
    expected, expected_grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(state, of_reference, tokens())
    np.testing.assert_allclose(result, expected, atol=1e-5)
    chex.assert_trees_all_close(grads, expected_grads, rtol=1e-7, atol=1e-5)


def test_bfloat16_is_close_to_float32():
    wide, narrow = transformer()(tokens()), transformer(dtype="bfloat16")(tokens())
    assert np.abs(wide - narrow).max() < 0.05 * np.abs(wide).max()
    assert np.abs(wide - narrow).max() > 0


def packed(lengths):
    segment_ids = jnp.concatenate([jnp.full(n, i) for i, n in enumerate(lengths)])
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])
    return {"segment_ids": segment_ids[None].astype(jnp.int32), "positions": positions[None]}


@pytest.mark.parametrize(
    ("pattern", "lengths"),
    [(Dense(), (21, 30, 19)), (PATTERN, (32, 64, 19))],  # blocks and stripes of PATTERN repeat after 32 tokens
    ids=["dense", "sparse"],
)
def test_packed_documents_are_as_if_alone(pattern, lengths):
    model, ids = transformer(pattern=pattern), tokens(1, sum(lengths))
    together = model(ids, **packed(lengths))
    ends = np.cumsum(lengths)
    alone = [model(ids[:, end - n : end]) for end, n in zip(ends, lengths, strict=True)]
    np.testing.assert_allclose(together, jnp.concatenate(alone, axis=1), atol=1e-5)


def test_positions_matter_by_their_differences_only():
    model, ids = transformer(), tokens()
    expected = model(ids)
    np.testing.assert_allclose(model(ids, positions=jnp.arange(70) + 1000), expected, atol=1e-4)
    assert np.abs(model(ids, positions=jnp.arange(70) * 2) - expected).max() > 1e-3


def test_jit_vmap_and_training_steps():
    graph, state = nnx.split(transformer())
    ids = tokens()
    run = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))
    expected = nnx.merge(graph, state)(ids)
    np.testing.assert_allclose(run(state, ids), expected, atol=1e-5)
    mapped = jax.vmap(run, in_axes=(None, 0))(state, jnp.stack([ids, ids[::-1]]))
    np.testing.assert_allclose(mapped[1], expected[::-1], atol=1e-5)

    step = jax.jit(jax.value_and_grad(lambda state: loss(state, graph, ids)))
    before, _ = step(state)
    for _ in range(10):
        _, grads = step(state)
        state = jax.tree.map(lambda p, g: p - 0.3 * g, state, grads)
    after, grads = step(state)
    assert after < before - 0.1
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_ids_beyond_the_vocabulary_give_nan_instead_of_another_tokens_logits():
    logits = transformer()(jnp.array([[0, 1, 50], [0, -1, 2], [0, 1, 49]]))
    assert np.isnan(logits[0, 2]).all()
    assert np.isnan(logits[1, 1]).all()
    assert np.isfinite(logits[2]).all()


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        (tokens()[0], {}, r"\[batch, length\], got int32 \[70\]"),
        (tokens().astype(jnp.float32), {}, "integer ids.*float32"),
        (tokens(), {"positions": jnp.arange(69)}, r"\[70\] or \[2, 70\].*\[69\]"),
        (tokens(), {"segment_ids": jnp.zeros((2, 69), jnp.int32)}, "69"),
    ],
)
def test_input_that_does_not_fit(ids, arguments, message):
    with pytest.raises(ValueError, match=message):
        transformer()(ids, **arguments)


@pytest.mark.optimised
def test_layers_that_read_alike_look_up_once_what_their_caches_hold():
    """Whatever depends on lengths and blocks alone; there are gathers for the embedding, too."""

    def gathers(num_layers: int) -> int:
        model = transformer(num_layers=num_layers, dense_layers=())
        graph, state = nnx.split(model)
        step = jax.jit(lambda state, caches: nnx.merge(graph, state).extend(tokens(length=1), caches))
        return step.lower(state, model.create_caches(2, max_length=64)).compile().as_text().count(" gather(")

    assert gathers(1) == gathers(3)


def test_layers_that_were_not_treated_alike_give_nan():
    model, ids = transformer(num_layers=3, dense_layers=()), tokens(length=40)
    extend = nnx.jit(Transformer.extend)
    _, caches = model.prefill(ids[:, :30], model.create_caches(2, max_length=48, max_rollback=4))
    following = ids[:, 30:32]
    expected = extend(model, following, caches)[0]
    one = jnp.array([3, 0])
    for layer in range(3):
        apart = tuple(cache.rollback(one) if i == layer else cache for i, cache in enumerate(caches))
        logits = extend(model, following, apart)[0]
        assert jnp.isnan(logits[0]).all()
        np.testing.assert_allclose(logits[1], expected[1], atol=1e-5)
    together = tuple(cache.rollback(one) for cache in caches)
    np.testing.assert_allclose(extend(model, ids[:, 27:29], together)[0][0], model(ids)[0, 27:29], atol=2e-5)
    # Forks with more room in some layers than in others hold other blocks in their slots.
    forks = tuple(cache.fork(1, room) for cache, room in zip(caches, (10, 40, 10), strict=True))
    np.testing.assert_allclose(extend(model, following, forks)[0], expected, atol=1e-5)
