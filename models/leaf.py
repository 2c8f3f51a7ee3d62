"""A weight as products meet it: a leaf of the parameter tree, plain, bits, quantised or adapted.

`resolve` is the one place that knows what a leaf can be. Whoever multiplies by a weight reads what
it returns: `layers.contract`, `layers.look_up`, `kernels.experts.grouped_matmul`, and the loss.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import bits
from .adapters import Adapted, factor_names, is_adapted
from .quantize import Int8


class Weight(NamedTuple):
    """The weight `values * scale + a b`; what is None is left out.

    scale: has size 1 along the dims that a product sums over, so it can multiply the product.
    a, b: see `adapters.Adapted`, its scale included.
    """

    values: jax.Array
    scale: jax.Array | None = None
    a: jax.Array | None = None
    b: jax.Array | None = None


def resolve(leaf) -> Weight:
    """What a leaf stands for."""
    if isinstance(leaf, Adapted):
        a, b = bits.unpack((leaf.a, leaf.b))
        return resolve(leaf.base)._replace(a=a, b=b * leaf.scale)
    leaf = bits.unpack(leaf)
    if isinstance(leaf, Int8):
        return Weight(leaf.values, leaf.scale)
    return Weight(leaf)


def dense(leaf):
    """The weight as one array: of a plain leaf as it is, of any other in float32."""
    weight = resolve(leaf)
    if weight.scale is None and weight.a is None:
        return weight.values
    dense = weight.values.astype(jnp.float32)
    if weight.scale is not None:
        dense *= weight.scale
    if weight.a is not None and weight.b is not None:
        letters = "abcdefgh"[: dense.ndim]
        a, b = factor_names(letters.upper(), weight.a.ndim, weight.b.ndim)
        dense += jnp.einsum(
            f"{a},{b}->{letters.upper()}", *(x.astype(jnp.float32) for x in (weight.a, weight.b)),
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
    return dense


def merge(params, dtype=None):
    """Parameters with their adapters added into what they adapt.

    Sums are in float32 and rounded once. An int8 base is merged as the numbers it stands for, and
    is then no longer int8.

    Args:
      dtype: of the merged weights; by default that of their base, float32 for int8.
    """

    def one(x):
        if not is_adapted(x):
            return x
        base = x.base.values if isinstance(x.base, Int8) else x.base
        kept = jnp.float32 if isinstance(x.base, Int8) else base.dtype
        return _merger(jnp.dtype(dtype or kept), base.sharding)(x)

    return jax.tree.map(one, params, is_leaf=is_adapted)


@functools.cache
def _merger(dtype, place):
    return jax.jit(lambda leaf: dense(leaf).astype(dtype), out_shardings=place)


def split_names(leaf, names):
    """The logical names of each array of a leaf, in the leaf's own structure.

    Args:
      names: of the dims of the weight.
    """
    if isinstance(leaf, Adapted):
        a, b = factor_names(names, leaf.a.ndim, leaf.b.ndim)
        return leaf.replace(base=split_names(leaf.base, names), a=a, b=b)
    if isinstance(leaf, Int8):
        scale = zip(names, leaf.scale.shape, strict=True)
        return Int8(names, tuple(None if size == 1 else name for name, size in scale))
    return names
