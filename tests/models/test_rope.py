"""Rotary angles against 50-digit decimals, the frequency scaling against its published rule."""

import dataclasses
import math
from decimal import Decimal, getcontext

import jax.numpy as jnp
import numpy as np
import pytest

from puna.configs.schema import ModelConfig
from puna.models import rope

getcontext().prec = 50
PI = Decimal("3.14159265358979323846264338327950288419716939937510")

PLAIN = ModelConfig(head_dim=128, rope_theta=5e5)
LLAMA2 = dataclasses.replace(PLAIN, rope_theta=1e4)
LLAMA31 = dataclasses.replace(
    PLAIN, rope_scaling_factor=8.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0,
    rope_original_positions=8192,
)  # fmt: skip
LLAMA32 = dataclasses.replace(LLAMA31, head_dim=64, rope_scaling_factor=32.0)
SCOUT = dataclasses.replace(LLAMA31, rope_scaling_factor=16.0, rope_high_freq_factor=1.0)
POSITIONS = [0, 1, 2, 8191, 8192, 131071, 262143, 1048575, 2**23 + 1, 10485759, 2**24 - 1]


def exact_frequency(config, j):
    """The published rule, one frequency at a time: compare wavelengths, blend in between."""
    f = (Decimal(config.rope_theta).ln() * -2 * j / config.head_dim).exp()
    factor = Decimal(config.rope_scaling_factor)
    if factor == 1:
        return f
    old = Decimal(config.rope_original_positions)
    low, high = Decimal(config.rope_low_freq_factor), Decimal(config.rope_high_freq_factor)
    wavelength = 2 * PI / f
    if wavelength < old / high:
        return f
    if wavelength > old / low:
        return f / factor
    s = (old / wavelength - low) / (high - low)
    return (1 - s) * f / factor + s * f


def test_the_decimals_know_pi():
    assert float(PI) == math.pi


@pytest.mark.parametrize("config", [PLAIN, LLAMA31, LLAMA32, SCOUT])
def test_frequencies_follow_the_published_rule(config):
    want = [float(exact_frequency(config, j)) for j in range(config.head_dim // 2)]
    np.testing.assert_allclose(rope.frequencies(config), want, rtol=1e-13)


def test_the_scaling_keeps_short_waves_and_stretches_long_ones():
    ratio = rope.frequencies(LLAMA31) / rope.frequencies(PLAIN)
    assert ratio[0] == 1.0 and ratio[-1] == pytest.approx(1 / 8)
    assert np.any((ratio > 0.13) & (ratio < 0.99))
    # Without a band to blend in, every frequency is one of the two.
    ratio = rope.frequencies(SCOUT) / rope.frequencies(PLAIN)
    assert set(np.round(ratio, 12)) == {1.0, 1 / 16}


@pytest.mark.parametrize("config", [PLAIN, LLAMA2, LLAMA31, SCOUT])
def test_angles_are_exact_at_any_position(config):
    got = np.asarray(rope.angles(jnp.array(POSITIONS), rope.frequencies(config)))
    assert got.dtype == np.float32 and np.all(np.abs(got) <= np.float32(math.pi))
    for p, row in zip(POSITIONS, got, strict=True):
        for j, angle in enumerate(row):
            error = float((Decimal(float(angle)) - p * exact_frequency(config, j)) % (2 * PI))
            error = min(abs(error), abs(error - 2 * math.pi), abs(error + 2 * math.pi))
            assert error < 1e-4, (p, j, error)


def test_float32_multiplication_would_not_do():
    """The reason for the integer arithmetic, and proof that the test above can fail."""
    p, f = 10485759, rope.frequencies(PLAIN)
    wrong = np.float32(p) * f.astype(np.float32)
    right = np.asarray(rope.angles(jnp.array([p]), f))[0]
    assert np.abs(np.exp(1j * wrong) - np.exp(1j * right)).max() > 0.1


def test_rotate_turns_the_halves_as_complex_numbers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, 8)).astype(np.float32)
    angles = rng.uniform(-3, 3, size=(2, 3, 4)).astype(np.float32)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, :, None]
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rope.rotate(jnp.array(x), jnp.array(angles)), want, atol=1e-5)
    assert rope.rotate(jnp.array(x, jnp.bfloat16), angles).dtype == jnp.bfloat16


@pytest.mark.parametrize("config", [PLAIN, SCOUT])
def test_scores_depend_on_the_distance_only(config):
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 1, 1, 1, 128)).astype(np.float32)

    def scores(offset):
        def at(x, positions):
            angles = rope.angles(jnp.array([positions]), rope.frequencies(config))
            return rope.rotate(jnp.broadcast_to(x, (1, len(positions), 1, 128)), angles)[0, :, 0]

        distances = [0, 1, 2, 17, 100, 5000]
        return at(q, [offset + d for d in distances]) @ at(k, [offset]).T

    near = np.asarray(scores(0))
    assert np.ptp(near) > 1.0
    for offset in (1, 8191, 10_000_000):
        # Two angles, each right to 3e-5 rad, times |q| |k| of about 128.
        np.testing.assert_allclose(scores(offset), near, atol=8e-3)
