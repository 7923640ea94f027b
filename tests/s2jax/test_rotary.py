"""Rotary positions and RMS norm, and the counts that layers check."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2jax.layers import head_counts
from s2jax.rotary import RopeScaling, apply_rope, rms_norm


def heads(seed=0, batch=2, length=7, num_heads=3, head_dim=8, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (batch, length, num_heads, head_dim), dtype)


def test_rotary_is_a_rotation_by_position_times_frequency():
    x = np.asarray(heads(), np.float64)
    positions = np.array([0, 1, 2, 5, 100, 1000, 4000])
    pairs = x[..., :4] + 1j * x[..., 4:]
    frequencies = 10_000.0 ** (-2 * np.arange(4) / 8)
    turned = pairs * np.exp(1j * positions[:, None, None] * frequencies)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    result = apply_rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions), 10_000.0)
    np.testing.assert_allclose(result, expected, atol=2e-3)  # float32 angles: 4000 * 2**-24
    np.testing.assert_allclose(result[:, :4], expected[:, :4], atol=1e-5)


def test_rotary_products_depend_on_distance_only():
    query, key = heads(1), heads(2)
    positions = jnp.arange(7)

    def products(shift):
        return jnp.einsum("bthd,bshd->bhts", *(apply_rope(x, positions + shift, 100.0) for x in (query, key)))

    np.testing.assert_allclose(products(0), products(37), atol=1e-4)


def test_slow_pairs_of_llama_3_turn_slower():
    theta, scaling = 500.0, RopeScaling(8.0, 1.0, 4.0, 256)
    frequencies = theta ** (-2 * np.arange(8) / 16)
    turns = frequencies * 256 / (2 * np.pi)
    share = (turns - 1) / (4 - 1)  # of the frequency that is kept, in between
    assert ((turns > 4).sum(), (turns < 1).sum()) == (3, 3)
    between = (1 - share) * frequencies / 8 + share * frequencies
    expected = np.where(turns > 4, frequencies, np.where(turns < 1, frequencies / 8, between))
    x, positions = jnp.ones((1, 5, 1, 16)), jnp.array([0, 1, 7, 100, 300])
    result = apply_rope(x, positions, theta, scaling)[0, :, 0]
    angles = np.asarray(positions)[:, None] * expected
    turned = [np.cos(angles) - np.sin(angles), np.sin(angles) + np.cos(angles)]
    np.testing.assert_allclose(result, np.concatenate(turned, 1), atol=1e-4)


@pytest.mark.parametrize("numbers", [(0.5, 1, 4, 8192), (8, 4, 1, 8192), (8, 0, 4, 8192), (8, 1, 4, 0), (8, 1, 1, 8)])
def test_numbers_that_make_no_scaling(numbers):
    with pytest.raises(ValueError, match="needs a factor of at least 1, 0 < low_freq_factor < high_freq_factor"):
        RopeScaling(*numbers).check()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "rope_scaling must be a RopeScaling or its four numbers, got 5"),
        ("a", "rope_scaling must be a RopeScaling or its four numbers, got 'a'"),
        ((8, 1, 4), "rope_scaling must be a RopeScaling or its four numbers, got (8, 1, 4)"),
        (("a", 1, 4, 8), "rope_scaling's factor must be a number known while tracing, got str"),
        ((10**39, 1, 4, 8), "rope_scaling's factor must be a number of at most 3.40282e+38, got 1e+39"),
    ],
)
def test_what_is_no_scaling(given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        apply_rope(heads(), jnp.arange(7), 1e4, given)


def test_rotary_positions_per_batch_entry():
    x = heads()
    shifted = jnp.stack([jnp.arange(7), jnp.arange(7) + 3])
    result = apply_rope(x, shifted, 100.0)
    np.testing.assert_array_equal(result[0], apply_rope(x, jnp.arange(7), 100.0)[0])
    np.testing.assert_array_equal(result[1], apply_rope(x, jnp.arange(7) + 3, 100.0)[1])


def test_rms_norm_is_computed_in_float32():
    x = heads(dtype=jnp.bfloat16)
    gain = jnp.linspace(0.5, 2.0, 8)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(gain)
    result = rms_norm(x, gain)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=2**-8)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (jnp.arange(6), r"\[7\] or \[2, 7\].*\[6\]"),
        (jnp.zeros((3, 7), jnp.int32), r"\[7\] or \[2, 7\].*\[3, 7\]"),
        (jnp.arange(7.0), "integers, got float32"),
    ],
)
def test_positions_that_do_not_fit(positions, message):
    with pytest.raises(ValueError, match=message):
        apply_rope(heads(), positions, 100.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 3, 8, 32), "num_heads=4, num_kv_heads=3"),
        ((0, None, 8, 32), "num_heads must be a positive integer, got 0"),
        ((4, -2, 8, 32), "num_kv_heads must be a positive integer, got -2"),
        ((4, 2.0, 8, 32), "num_kv_heads must be a positive integer, got 2.0"),
        ((4, None, 0, 32), "head_dim must be a positive integer, got 0"),
        ((4, None, None, 30), "in_features=30, num_heads=4"),
        ((4, None, 7, 32, 1e4), "even, got 7"),
        ((4, None, None, 10**30), f"in_features must be at most 2**31 - 1, got {10**30}"),
        ((2**31, None, 1, 32), "num_heads must be at most 2**31 - 1, got 2147483648"),
        ((4, None, 10**30, 32), f"head_dim must be at most 2**31 - 1, got {10**30}"),
        ((4, None, 2**29, 32), "num_heads * head_dim must be at most 2**31 - 1, got 2147483648"),
    ],
)
def test_head_counts_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        head_counts(*arguments)


def test_head_count_defaults():
    assert head_counts(4, None, None, 32) == (4, 8)
    assert head_counts(4, 2, 16, 30) == (2, 16)
