"""Weight-only int8: a matrix as whole numbers of -127..127 and a scale for each output channel.

The scale belongs to what a product does not sum over, so it multiplies the product and the numbers
go into the matmul as they are (LLM.int8(), arXiv 2208.07339, without its outliers). Norms, biases,
patches and routers stay plain: they are small, and a rounded logit sends a token to another expert.
Activations and training of such weights are left out on purpose.
"""

import functools

import flax
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from .parallel import sharding
from .parallel.sharding import Param

KINDS = ("int8",)
_LARGEST = 127


class Int8(flax.struct.PyTreeNode):
    """A weight that is `values * scale`.

    values: int8, in the shape of the weight. scale: float32, of size 1 along the dims that a
    product sums over.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self):
        return self.values.shape

    @property
    def T(self):
        return Int8(self.values.T, self.scale.T)


def quantize(x: jax.Array, names):
    """Quantise one parameter, if it is one that is; it stays where it lies.

    Args:
      names: the logical name of each dim.

    Returns:
      An `Int8` whose error is at most half its scale, 1/254 of the channel's largest number.
    """
    dims = _summed(names)
    return x if dims is None else _quantizer(dims, x.sharding)(x)


def quantize_tree(params, boxed):
    """`quantize` of a tree of parameters, with the names of `transformer.abstract_params`."""
    return jax.tree.map(
        lambda p, x: x if isinstance(x, Int8) else quantize(x, p.names),
        boxed, params, is_leaf=lambda x: isinstance(x, Param),
    )  # fmt: skip


def box_int8(boxed):
    """What `quantize_tree` makes of `transformer.abstract_params`, boxed likewise."""

    def one(p):
        dims = _summed(p.names)
        if dims is None:
            return p
        sizes = (1 if i in dims else size for i, size in enumerate(p.value.shape))
        names = (None if i in dims else name for i, name in enumerate(p.names))
        values = Param(jax.ShapeDtypeStruct(p.value.shape, jnp.int8), p.names)
        return Int8(values, Param(jax.ShapeDtypeStruct(tuple(sizes), jnp.float32), tuple(names)))

    return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, Param))


def _summed(names):
    own = sharding.own_dims(names)
    if len(own) < 2 or {"router", "patches"} & set(names):
        return None
    # A table of ids is looked up, and where it is tied the product sums over its rows.
    return tuple(own[1:]) if names[own[0]] == "vocab" else sharding.row_dims(names)


@functools.cache
def _quantizer(dims: tuple[int, ...], place):
    out = place
    if isinstance(place, NamedSharding):
        spec = tuple(None if i in dims else axes for i, axes in enumerate(place.spec))
        out = NamedSharding(place.mesh, PartitionSpec(*spec))

    def make(x):
        x = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(x), axis=dims, keepdims=True) / _LARGEST
        # A channel of zeros; NaN stays in the scale, so it is not lost.
        values = jnp.round(x / jnp.where(scale > 0, scale, 1))
        return Int8(values.astype(jnp.int8), scale)

    return jax.jit(make, out_shardings=Int8(place, out))
