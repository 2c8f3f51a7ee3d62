"""Weights turned round: as one row of activations reads them fastest on a CPU.

XLA of jax 0.10 for CPUs copies each layer's weights out of the scan before it multiplies by them,
and converts what is not float32. A product of one row with the transpose of an array that has the
summed dims last it compiles into one loop that reads each weight once, where it lies. For several
rows the copy costs less than what that order costs the matmul; so does it for experts, of which a
loop reads few. What is turned round is for generation alone: see `turn`.
"""

import functools
import math
from typing import Any

import flax
import jax
import jax.numpy as jnp

from . import bits
from .adapters import is_adapted
from .parallel import sharding
from .parallel.sharding import Param
from .quantize import Grouped

# What each new token reads; encoders read whole pictures.
_READ = ("blocks", "tail", "unembed")


class Turned(flax.struct.PyTreeNode):
    """A weight whose summed dims lie last.

    held: the weight so, plain, bits or quantised, perhaps of several layers. own: how many of the
    dims are of one layer. summed: how many of those a product sums over.
    """

    held: Any
    own: int = flax.struct.field(pytree_node=False)
    summed: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self):
        stack, out, rows = self._dims()
        return (*stack, *rows, *out)

    def numbers(self):
        """The weight, or its scale, in the usual order of dims."""
        stack, out, rows = self._dims()
        return jnp.swapaxes(self._matrix(), -1, -2).reshape(*stack, *rows, *out)

    def is_for(self, x) -> bool:
        """Whether an activation [..., summed dims] is one row."""
        return x.size == math.prod(self._dims()[2])

    def times(self, x, dtype: str):
        """The product with one row [..., summed dims], both rounded to `dtype`; in float32."""
        stack, out, _ = self._dims()
        assert not stack, "one layer at a time"
        w = self._matrix()
        if w.dtype not in (jnp.int8, jnp.dtype(dtype)):
            w = w.astype(dtype)
        # A CPU multiplies in float32 whatever they are in.
        x_BTX = _written(x.astype(dtype).astype(jnp.float32).reshape(1, 1, -1))
        y = jnp.einsum(
            "BTX,XY->BTY", x_BTX, w.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST
        )
        return y.reshape(*x.shape[: x.ndim - self.summed], *out)

    def _dims(self):
        shape = self.held.shape
        start, end = len(shape) - self.own, len(shape) - self.summed
        return shape[:start], shape[start:end], shape[end:]

    def _matrix(self):
        stack, out, rows = self._dims()
        return self.held.reshape(*stack, math.prod(out), math.prod(rows))


def _written(x):
    """An array as it is, in memory.

    XLA would fuse what computes a row with a product that it has fused with its weights, and
    compute it again for each output. It fuses no scatter.
    """
    return x.at[..., jnp.arange(x.shape[-1])].set(x, unique_indices=True)


def turn(params: dict, boxed: dict, rows: int) -> dict:
    """Parameters as they are best for decoding `rows` rows at a time.

    Args:
      params: what changes is deleted, array by array, so that there are never two of a model.
      boxed: `transformer.abstract_params`.

    Returns:
      The same parameters, some of them `Turned`; `params` itself where that gains nothing: on
      anything but one CPU, or for several rows.
    """
    devices = {device for x in jax.tree.leaves(params) for device in x.sharding.device_set}
    if rows > 1 or len(devices) > 1 or {device.platform for device in devices} != {"cpu"}:
        return params

    def one(p, x):
        if is_adapted(x):
            return x.replace(base=one(p, x.base))
        own, summed = len(sharding.own_dims(p.names)), len(sharding.row_dims(p.names))
        if own < 2 or {"experts", "router"} & set(p.names) or isinstance(x, Turned | Grouped):
            return x
        held = jax.tree.map(lambda x: _turned(x, own, summed), bits.view(x))
        jax.block_until_ready(held)
        for array in jax.tree.leaves(x):
            array.delete()
        return Turned(held, own, summed)

    def is_param(x):
        return isinstance(x, Param)

    return {
        name: jax.tree.map(one, boxed[name], part, is_leaf=is_param) if name in _READ else part
        for name, part in params.items()
    }


@functools.partial(jax.jit, static_argnums=(1, 2))
def _turned(x, own, summed):
    start = x.ndim - own
    order = (*range(start), *range(start + summed, x.ndim), *range(start, start + summed))
    return jnp.transpose(x, order)
