"""Rotary position embedding (arXiv 2104.09864) with the scaling of Llama 3.1 or YaRN.

The first half of a head's dims rotates with the second half; weights of the interleaved
formats are permuted when they are loaded. Angles are kept in turns, in integer arithmetic: in
float32 a position times a frequency is off by half a radian at 10 million positions.
"""

import math

import jax.numpy as jnp
import numpy as np

from ..configs.schema import ModelConfig

MAX_POSITIONS = 2**24


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair of dims, [H/2] in float64.

    The scaling keeps wavelengths that fit the old context `rope_high_freq_factor` times or more,
    divides the frequency of those that fit it `rope_low_freq_factor` times or less by
    `rope_scaling_factor` and blends between: linearly in how often they fit (Llama 3.1) or, with
    `rope_ramp` of dims, in the number of the pair (YaRN, arXiv 2309.00071, whose beta are the two
    factors; rounded_dims widens the band to whole pairs, as its authors' code does).
    """
    f = config.rope_theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    if config.rope_scaling_factor == 1.0:
        return f
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    if config.rope_ramp != "periods":
        interpolated = _by_dims(config, low, high)
        return f * (1.0 - interpolated + interpolated / config.rope_scaling_factor)
    periods = config.rope_original_positions * f / (2 * math.pi)  # that fit the old context
    # low == high (Llama 4 Scout) has no band to blend in.
    smooth = (periods - low) / (high - low) if high > low else (periods >= high).astype(float)
    keep = np.clip(smooth, 0.0, 1.0)
    return f * (keep + (1.0 - keep) / config.rope_scaling_factor)


def _by_dims(config, low, high):
    """How far each pair is into the band, 0 to 1: pair j of J turns theta^(-j / J) a position."""
    J = config.head_dim // 2

    def pair(periods):
        """The pair, between two, that fits the old context so often."""
        wavelength = config.rope_original_positions / periods
        return J * math.log(wavelength / (2 * math.pi)) / math.log(config.rope_theta)

    first, last = pair(high), pair(low)
    if config.rope_ramp == "rounded_dims":
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    last += 0.001 * (first == last)
    return np.clip((np.arange(J) - first) / (last - first), 0.0, 1.0)


def angles(positions, radians_per_position: np.ndarray):
    """Angles in (-pi, pi] of integer positions below 2**24, in float32.

    Args:
      positions: int32 of any shape.
      radians_per_position: [J] float64, below 2 pi.

    Returns:
      float32 [..., J], right to about 3e-5 rad at the last position.
    """
    # A turn is 2**40 steps: 32 bits that wrap round as turns do, and 8 below them.
    steps = np.round(radians_per_position / (2 * math.pi) * 2**40).astype(np.uint64)
    high, low = (steps >> 8).astype(np.uint32), (steps & 0xFF).astype(np.uint32)
    p = jnp.asarray(positions).astype(jnp.uint32)[..., None]
    turns = p * high + ((p * low) >> 8)
    return turns.astype(jnp.int32).astype(jnp.float32) * np.float32(2 * math.pi / 2**32)


def rotate(x_BTNH, angles_BTJ):
    """Rotate each pair (x[j], x[j + H/2]) by its angle, in float32, back in x's dtype."""
    cos, sin = jnp.cos(angles_BTJ)[:, :, None], jnp.sin(angles_BTJ)[:, :, None]
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
