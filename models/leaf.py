"""A weight as products meet it: a leaf of the parameter tree, whatever kind it is.

Plain, bits, quantised, turned or adapted: `resolve` is the one place that knows what a leaf can be.
Whoever multiplies by a weight reads what it returns: `layers.contract`, `layers.look_up`,
`kernels.experts.grouped_matmul`, and the loss.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import bits
from .adapters import Adapted, factor_names, is_adapted
from .quantize import Grouped, Int8, is_quantized
from .turned import Turned


class Weight(NamedTuple):
    """The weight `(values * scale + a b) * gain`; what is None is left out.

    values: an array, or a `Grouped` or `Turned`, of which whoever multiplies by it takes the
      `numbers`; so a gradient rule keeps the bytes.
    scale, gain: have size 1 along the dims that a product sums over, so they can multiply it.
    a, b: see `adapters.Adapted`, its scale included.
    counts_Br: which ranks of `a b` a row of what is multiplied has; all where None.
    """

    values: jax.Array | Grouped | Turned
    scale: jax.Array | None = None
    a: jax.Array | None = None
    b: jax.Array | None = None
    gain: jax.Array | None = None
    counts_Br: jax.Array | None = None

    def low(self, x):
        """The product x [B, ..., r] with `a`, as it is multiplied by `b`."""
        if self.counts_Br is None:
            return x
        B, r = self.counts_Br.shape
        return jnp.where(self.counts_Br.reshape(B, *(1,) * (x.ndim - 2), r), x, 0)


def resolve(leaf) -> Weight:
    """What a leaf stands for."""
    if isinstance(leaf, Adapted):
        leaf = settle(leaf)
        counts_Br = None
        if leaf.owner_r is not None:
            if leaf.chosen_B is None:
                return resolve(leaf.base)
            counts_Br = leaf.chosen_B[:, None] == leaf.owner_r
        a, b, gain = bits.unpack((leaf.a, leaf.b, leaf.gain))
        return resolve(leaf.base)._replace(a=a, b=b * leaf.scale, gain=gain, counts_Br=counts_Br)
    leaf = bits.unpack(leaf)
    if isinstance(leaf, Turned):
        values, scale, *_ = resolve(leaf.held)
        scale = None if scale is None else leaf.replace(held=scale).numbers()
        return Weight(leaf.replace(held=values), scale)
    if isinstance(leaf, Int8):
        return Weight(leaf.values, leaf.scale)
    return Weight(leaf)


def numbers(values):
    """`Weight.values` as one array."""
    return values.numbers() if isinstance(values, Grouped | Turned) else values


def dense(leaf):
    """The weight as one array: of a plain leaf as it is, of any other in float32."""
    assert not is_adapted(leaf) or leaf.owner_r is None, "it is another weight in each row"
    weight = resolve(leaf)
    values = numbers(weight.values)
    if weight.scale is None and weight.a is None:
        return values
    dense = values.astype(jnp.float32)
    if weight.scale is not None:
        dense *= weight.scale
    if weight.a is not None and weight.b is not None:
        letters = "abcdefgh"[: dense.ndim]
        a, b = factor_names(letters.upper(), weight.a.ndim, weight.b.ndim)
        dense += jnp.einsum(
            f"{a},{b}->{letters.upper()}", *(x.astype(jnp.float32) for x in (weight.a, weight.b)),
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
    return dense if weight.gain is None else dense * weight.gain


def settle(leaf):
    """A leaf whose gain is known, where it is of DoRA: the length it is to have over that it has.

    A module does so with each parameter, since a part of a weight does not tell its length. The
    norm is a constant to the gradient, as in section 4.3 of the paper and in PEFT.
    """
    if not isinstance(leaf, Adapted) or leaf.m is None:
        return leaf
    m = bits.unpack(leaf.m)
    return leaf.replace(m=None, gain=m / jax.lax.stop_gradient(_norm(leaf, m.shape)))


def _norm(leaf: Adapted, shape):
    """The norm of a weight, its gain apart, over the dims that have size 1 in `shape` [shape]."""
    plain = jax.lax.stop_gradient(leaf.replace(m=None, gain=None))
    dims = tuple(i for i, (n, whole) in enumerate(zip(shape, leaf.shape, strict=True)) if n < whole)
    return jnp.sqrt(jnp.sum(jnp.square(dense(plain)), axis=dims, keepdims=True))


def with_magnitudes(adapters: dict, base: dict) -> dict:
    """Nested dicts of adapters; those of DoRA have m such that they change nothing.

    Args:
      base: the weights under them, or more.
    """

    def one(new, under):
        if not is_adapted(new):
            return with_magnitudes(new, under)
        if new.m is None:
            return new
        return new.replace(m=_measurer(new.m.sharding)(new.replace(base=under)))

    return {name: one(new, base[name]) for name, new in adapters.items()}


@functools.cache
def _measurer(place):
    return jax.jit(lambda leaf: _norm(leaf, leaf.m.shape), out_shardings=place)


def settled(params):
    """Parameters whose gains are all known: for many calls of the model, once and not at each."""

    def one(leaf):
        if not is_adapted(leaf) or leaf.m is None:
            return leaf
        return leaf.replace(m=None, gain=_gain(leaf))

    return jax.tree.map(one, params, is_leaf=is_adapted)


@jax.jit
def _gain(leaf: Adapted):
    return settle(leaf).gain


def of_rows(leaves, arrange):
    """Leaves for rows that come from those of a batch: `arrange` of what each row has chosen.

    All of them have chosen alike.
    """
    chosen = [x.chosen_B for x in leaves if is_adapted(x) and x.chosen_B is not None]
    if not chosen:
        return leaves
    arranged = arrange(chosen[0])
    return [
        x.replace(chosen_B=arranged) if is_adapted(x) and x.chosen_B is not None else x
        for x in leaves
    ]


def merge(params, dtype=None):
    """Parameters with their adapters added into what they adapt.

    Sums are in float32 and rounded once. A quantised base is merged as the numbers it stands for,
    and is then no longer quantised.

    Args:
      dtype: of the merged weights; by default that of their base, float32 where it is quantised.
    """
    return plain(params, dtype, kept=(Int8, Grouped))


def plain(params, dtype=None, kept=()):
    """`merge`, and the same of quantised weights, but for those of a type in `kept`."""

    def one(x):
        base = x.base if is_adapted(x) else x
        if not is_adapted(x) and (not is_quantized(x) or isinstance(x, kept)):
            return x
        array, least = (base.values, jnp.float32) if is_quantized(base) else (base, base.dtype)
        return _merger(jnp.dtype(dtype or least), array.sharding)(x)

    return jax.tree.map(one, params, is_leaf=lambda x: is_adapted(x) or is_quantized(x))


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
        m, gain = (x if x is None else _beside(x, names) for x in (leaf.m, leaf.gain))
        owner, chosen = (
            x if x is None else (*names[: x.ndim - 1], name)
            for x, name in ((leaf.owner_r, "rank"), (leaf.chosen_B, "batch"))
        )
        return leaf.replace(
            base=split_names(leaf.base, names), a=a, b=b, m=m, gain=gain, owner_r=owner,
            chosen_B=chosen,
        )  # fmt: skip
    if isinstance(leaf, Grouped):
        return jax.tree.map(lambda _: names, leaf)
    if isinstance(leaf, Int8):
        return Int8(names, _beside(leaf.scale, names))
    return names


def _beside(x, names):
    return tuple(None if n == 1 else name for name, n in zip(names, x.shape, strict=True))
