"""Which parameters Muon takes, what decays, and how the rate goes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

import models
from training.config import OptimizerOptions
from training.optimizer import make_optimizer, matrix_axes, schedule_change, warmup_cosine


@pytest.fixture(scope="module")
def params(small_model):
    config = dataclasses.replace(small_model, tie_embeddings=False).transformer()
    return nnx.to_pure_dict(nnx.state(models.Transformer(config, rngs=nnx.Rngs(0))))


def by_name(tree, **options):
    leaves = jax.tree_util.tree_flatten_with_path(tree, **options)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def test_muon_takes_the_matrices_of_the_layers_and_nothing_else(params):
    is_leaf = lambda leaf: leaf is None or isinstance(leaf, MuonDimensionNumbers)  # noqa: E731
    axes = by_name(matrix_axes(params), is_leaf=is_leaf)
    matrices = {name.removeprefix("layers.0.") for name, value in axes.items() if value and "layers.0" in name}
    assert matrices == {
        *(f"attention.{name}.kernel" for name in ("query", "key", "value", "out")),
        *(f"mlp.{name}.kernel" for name in ("gate", "up", "down")),
    }
    assert axes["embed.embedding"] is None
    assert axes["lm_head.kernel"] is None
    shapes = by_name(params)
    for name, value in axes.items():
        if value is not None:  # rows and columns of the matrix that the kernel is
            rows, columns = (np.atleast_1d(side) for side in value)
            assert sorted([*rows, *columns]) == list(range(shapes[name].ndim))
            fan_in = np.prod([shapes[name].shape[i] for i in rows])
            assert fan_in == {"down": 48}.get(name.split(".")[-2], 32)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_rates_are_of_their_groups_and_only_matrices_decay(params, optimizer):
    """With no gradient Adam and Muon do not move, so that what moves is decay."""
    options = OptimizerOptions(optimizer=optimizer, learning_rate=0.1, weight_decay=0.5, warmup_steps=0)
    rule = make_optimizer(options, steps=10)
    updates, _ = jax.jit(rule.update)(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
    rate = 0.1 * float(warmup_cosine(options, 10)(0))
    for (name, update), leaf in zip(by_name(updates).items(), by_name(params).values(), strict=True):
        matrix = name.endswith("kernel") and "lm_head" not in name
        np.testing.assert_allclose(update, -rate * 0.5 * leaf if matrix else 0 * leaf, atol=1e-7, err_msg=name)


@pytest.mark.slow
def test_muon_s_updates_are_nearly_orthogonal_and_adam_s_are_signs(params):
    options = OptimizerOptions(learning_rate=1.0, rest_learning_rate=0.25, weight_decay=0, warmup_steps=0)
    rule = make_optimizer(options, steps=1_000_000)
    grads = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    updates = by_name(jax.jit(rule.update)(grads, rule.init(params), params)[0])
    out = np.asarray(updates["layers.0.attention.out.kernel"]).reshape(32, 32)
    singular = np.linalg.svd(out, compute_uv=False)
    assert singular.min() > 0.3
    assert singular.max() < 1.5
    nesterov = 0.9 * 0.1 / (1 - 0.9**2) + 1  # the first step of Adam with Nesterov momentum, in units of the rate
    np.testing.assert_allclose(np.abs(updates["embed.embedding"]), 0.25 * nesterov, rtol=0.1)


def test_gradients_are_clipped_by_their_global_norm(params):
    """Adam's second step tells the sizes of two gradients apart, unless both were clipped to the same."""
    rule = make_optimizer(OptimizerOptions(optimizer="adamw", clip_norm=1.0), steps=10)
    grads = jax.tree.map(jnp.ones_like, params)
    norm = optax.tree.norm(grads)
    update = jax.jit(rule.update)
    states = [update(jax.tree.map(lambda g, s=s: g * s, grads), rule.init(params), params)[1] for s in (1, 100)]
    chex.assert_trees_all_close(*states, rtol=1e-5)
    moments = optax.tree.get_all_with_path(states[0], "mu")
    clipped = sum(float(optax.tree.norm(mu)) ** 2 for _, mu in moments) ** 0.5
    np.testing.assert_allclose(clipped, 0.1 * min(1, 1 / norm) * norm, rtol=1e-5)


@pytest.mark.parametrize(("warmup", "steps"), [(10, 100), (0, 100), (20, 10)])
def test_the_rate_rises_to_its_peak_and_falls_to_its_end(warmup, steps):
    share = warmup_cosine(OptimizerOptions(warmup_steps=warmup, final_fraction=0.1), steps)
    shares = np.array([share(step) for step in range(steps)])
    top = min(warmup, steps // 2)
    assert shares[0] > 0
    np.testing.assert_allclose(shares.max(), 1, atol=1e-3)
    assert (np.diff(shares[: max(top, 1)]) > 0).all()
    assert (np.diff(shares[top:]) < 0).all()
    np.testing.assert_allclose(shares[-1], 0.1, rtol=1e-5)


def test_going_on_with_more_steps_says_what_that_does_to_the_rates(small_config):
    before = dataclasses.replace(small_config, steps=1100, optimizer=OptimizerOptions())
    longer = dataclasses.replace(before, steps=2200)
    said = schedule_change(before, longer, 1100)
    assert said is not None
    assert said.startswith("--steps 2200 instead of 1100: warmup and cosine are drawn over the whole run")
    assert said.endswith("go on at 53.1% of their peaks; step 1100 was at 5.0%")
    for step in (1, 500, 1100):
        assert schedule_change(before, before, step) is None
    other = dataclasses.replace(before, optimizer=OptimizerOptions(final_fraction=0.5))
    assert (schedule_change(before, other, 1000) or "").startswith("Another schedule: ")
