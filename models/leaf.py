"""A weight as products meet it: a leaf of the parameter tree that is plain, bits or quantised.

`resolve` is the one place that knows what a leaf can be. Whoever multiplies by a weight reads what
it returns: `layers.contract`, `layers.look_up`, `kernels.experts.grouped_matmul`, and the loss.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import bits
from .quantize import Int8


class Weight(NamedTuple):
    """The weight `values * scale`; without a scale just `values`.

    scale: has size 1 along the dims that a product sums over, so it can multiply the product.
    """

    values: jax.Array
    scale: jax.Array | None = None


def resolve(leaf) -> Weight:
    """What a leaf stands for."""
    leaf = bits.unpack(leaf)
    if isinstance(leaf, Int8):
        return Weight(leaf.values, leaf.scale)
    return Weight(leaf)


def dense(leaf):
    """The weight as one array: of a plain leaf as it is, of any other in float32."""
    weight = resolve(leaf)
    if weight.scale is None:
        return weight.values
    return weight.values.astype(jnp.float32) * weight.scale


def split_names(leaf, names):
    """The logical names of each array of a leaf, in the leaf's own structure.

    Args:
      names: of the dims of the weight.
    """
    if isinstance(leaf, Int8):
        scale = zip(names, leaf.scale.shape, strict=True)
        return Int8(names, tuple(None if size == 1 else name for name, size in scale))
    return names
