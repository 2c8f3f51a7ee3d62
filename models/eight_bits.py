"""Matrix products of 8-bit numbers: float8 (arXiv 2209.05433) and int8, scaled as they are made.

Each row of an activation and each channel of a weight is divided by its own largest number, over
all that the product sums over, on whatever devices that lies (current scaling: nothing is kept
from step to step). So a token's numbers depend on no other token: a model stays causal, and is the
same in any batch, microbatch and mesh, and in generation.

Of the three products of a training step two are in 8 bits, y = x w and dx = dy w. The third,
dw = x dy, sums over tokens, so its scales would mix them; it stays in bfloat16, as in torchao's
`rowwise_with_gw_hp`, in SwitchBack (arXiv 2304.13013) and in what MaxText does by default with AQT
(arXiv 2105.03536). Left out on purpose: delayed scaling, blocks along the sum, stochastic rounding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Format(NamedTuple):
    """The dtypes of a kind: of activations and weights, and of gradients."""

    forward: jnp.dtype
    backward: jnp.dtype


# Gradients have the wider range: e5m2, as in the paper.
FORMATS = {
    "float8": Format(jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)),
    "int8": Format(jnp.dtype(jnp.int8), jnp.dtype(jnp.int8)),
}
# Far above what float32 has least, and below any number that matters: rows of zeros.
_LEAST = 1e-30


def quantize(x, dims, dtype, axis: str | None = None):
    """x as `values * scale`; rounds to the nearest. NaN and infinity make their scale NaN or more.

    Args:
      dims: that share a scale.
      dtype: of the values.
      axis: in a `shard_map`, the mesh axis that these dims are split over.

    Returns:
      (values, scale): scale in float32, of size 1 along `dims`.
    """
    x = x.astype(jnp.float32)
    whole = jnp.issubdtype(dtype, jnp.integer)
    largest = jnp.iinfo(dtype).max if whole else jnp.finfo(dtype).max
    scale = jnp.max(jnp.abs(x), axis=dims, keepdims=True)
    if axis is not None:
        scale = jax.lax.pmax(scale, axis)
    # Times the reciprocal, which compilers make of a division by a constant, not all of them.
    scale = jnp.maximum(scale, _LEAST) * jnp.float32(1 / float(largest))
    values = x / scale
    return (jnp.round(values) if whole else values).astype(dtype), scale


def einsum(spec: str, a, b, a_dtype, b_dtype, axis: str | None = None):
    """Einsum of two arrays, quantised along what it sums over, in float32.

    Args:
      spec: such as "BTD,DF->BTF"; a letter that the result lacks stands in both operands.
      axis: in a `shard_map`, the mesh axis that what is summed over is split over.
    """
    terms, out = spec.split("->")
    operands, scales = [], []
    for letters, x, dtype in zip(terms.split(","), (a, b), (a_dtype, b_dtype), strict=True):
        dims = tuple(i for i, letter in enumerate(letters) if letter not in out)
        values, scale = quantize(x, dims, dtype, axis)
        operands.append(values)
        scales.append(beside(letters, out, scale))
    y = jnp.einsum(spec, *operands, preferred_element_type=accumulator(a_dtype))
    return y.astype(jnp.float32) * scales[0] * scales[1]


def accumulator(dtype):
    """What products of a dtype are added up in."""
    return jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else jnp.float32


def beside(letters: str, out: str, scale):
    """A scale in the dims of a product: of size 1 along letters of an operand that `out` lacks."""
    kept = [letter for letter in out if letter in letters]
    scale = jnp.einsum(f"{letters}->{''.join(kept)}", scale)
    return scale.reshape([scale.shape[kept.index(a)] if a in kept else 1 for a in out])
