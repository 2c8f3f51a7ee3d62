"""Weight-only int8, int4 and NF4: a matrix as whole numbers, with scales in floating point.

int8 has a scale for each output channel, which multiplies the product, so the numbers go into the
matmul as they are (LLM.int8(), arXiv 2208.07339, without its outliers). int4 has a scale and an
offset for each group of numbers that a product sums over, those of least squared error among some,
and is multiplied out where it is used. nf4 is the NormalFloat of QLoRA (arXiv 2305.14314): the
nearest of 16 quantiles of the normal distribution, times the largest number of each group. Its
scales are bfloat16 here, and not quantised once more. Tables of ids are int8 with both, as in
Meta's quantised Llama 3.2. Norms, biases, patches and routers stay plain: they are small, and a
rounded logit sends a token to another expert.
Calibration, activations and training of such weights are left out on purpose.
"""

import functools
import itertools
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ..configs.errors import ConfigError
from .parallel import sharding
from .parallel.sharding import Param

# Numbers that share a scale by kind, fewer where that does not divide their dim.
GROUPS = {"int4": 32, "nf4": 64}
# arXiv 2305.14314, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_LARGEST = 127
# Ends of the range that are tried for a group, as parts of its own: what lies beyond is cut.
_ENDS = (1.0, 0.93, 0.86)


class Int8(flax.struct.PyTreeNode):
    """A weight that is `values * scale`.

    values: int8, in the shape of the weight. scale: float32, of size 1 along the dims that a
    product sums over.
    """

    values: Any
    scale: Any

    @property
    def shape(self):
        return self.values.shape

    @property
    def T(self):
        return Int8(self.values.T, self.scale.T)


class Grouped(flax.struct.PyTreeNode):
    """A weight of 4 bits a number, in groups of G numbers along one dim.

    values: 0..15, two in a byte: uint8, in the shape of the weight but half as large along that
    dim. Of a group's G / 2 bytes, byte i has number i in its low half and number i + G / 2 in its
    high half, so a group is whole on a device wherever the dim is split between groups. scale:
    bfloat16, likewise, with one number for each group.
    """

    values: Any
    scale: Any

    @property
    def dim(self) -> int:
        """The dim that the groups lie along, from 0."""
        sizes = zip(self.values.shape, self.scale.shape, strict=True)
        return next(i for i, (bytes_, groups) in enumerate(sizes) if bytes_ != groups)

    @property
    def group(self) -> int:
        return 2 * self.values.shape[self.dim] // self.scale.shape[self.dim]

    @property
    def shape(self):
        return tuple(s * (1 + (i == self.dim)) for i, s in enumerate(self.values.shape))

    def numbers(self):
        """The weight in float32."""
        dim, groups = self.dim, self.scale.shape[self.dim]
        both = _split(self.values, dim, groups)
        both = jnp.concatenate([both & 15, both >> 4], dim + 1)
        return self.of_steps(both, lambda x: jnp.expand_dims(x, dim + 1).astype(jnp.float32)
                             ).reshape(self.shape)  # fmt: skip

    def of_steps(self, steps, beside):
        """The numbers of 0..15; `beside` gives what there is of each group the dims of `steps`."""
        raise NotImplementedError


class Int4(Grouped):
    """A weight that is `values * scale + least`; least: as the scale."""

    least: Any

    def of_steps(self, steps, beside):
        return steps.astype(jnp.float32) * beside(self.scale) + beside(self.least)

    def times_row(self, x, num_summed: int):
        """The product with one row x in float32; the weight's first dims are summed over.

        A sum a group, of whole numbers, which the scales multiply: a CPU takes a third of the time
        that it takes to multiply the weight out.
        """
        assert self.dim == num_summed - 1, "groups lie along the last dim that is summed over"
        out = self.shape[num_summed:]
        half, x_GI = self.group // 2, x.reshape(-1, self.group)
        values_GIX = self.values.reshape(len(x_GI), half, -1)
        sums_GX = sum(
            jnp.einsum(
                "GI,GIX->GX", part_GI, steps_GIX.astype(jnp.float32),
                precision=jax.lax.Precision.HIGHEST,
            )
            for part_GI, steps_GIX in (
                (x_GI[:, :half], values_GIX & 15), (x_GI[:, half:], values_GIX >> 4),
            )
        )  # fmt: skip
        scale_GX, least_GX = (
            a.astype(jnp.float32).reshape(sums_GX.shape) for a in (self.scale, self.least)
        )
        return jnp.sum(sums_GX * scale_GX + x_GI.sum(1)[:, None] * least_GX, 0).reshape(out)


class Nf4(Grouped):
    """A weight that is `NF4[values] * scale`."""

    def of_steps(self, steps, beside):
        # A chain of selects: accelerators do not look up in tables number by number, and a tree of
        # them, of fewer steps, XLA has been seen not to fuse on GPUs.
        found = jnp.full(steps.shape, NF4[0], jnp.float32)
        for i, level in enumerate(NF4[1:], 1):
            found = jax.lax.select(steps == i, jnp.full_like(found, level), found)
        return found * beside(self.scale)


TYPES = {"int8": Int8, "int4": Int4, "nf4": Nf4}
KINDS = tuple(TYPES)
SPELT = " or ".join([", ".join(KINDS[:-1]), KINDS[-1]])


def is_quantized(x) -> bool:
    """Whether a leaf of a tree of parameters is one of the kinds of this file."""
    return isinstance(x, tuple(TYPES.values()))


def kind_of(x) -> str:
    """The kind of a leaf, "" for what is not quantised."""
    return next((kind for kind, of in TYPES.items() if isinstance(x, of)), "")


def of_arrays(values, scale, least=None):
    """The leaf that consists of these arrays, or of their shapes and dtypes."""
    if least is not None:
        return Int4(values, scale, least)
    return (Nf4 if values.dtype == jnp.uint8 else Int8)(values, scale)


def _split(x, dim, groups):
    return x.reshape(*x.shape[:dim], groups, -1, *x.shape[dim + 1 :])


def quantize(x: jax.Array, names, kind: str = "int8", group: int | None = None):
    """Quantise one parameter, if it is one that is; it stays where it lies.

    Args:
      names: the logical name of each dim.
      kind: one of KINDS.
      group: most numbers that share a scale of int4 or nf4; that of GROUPS by default.

    Returns:
      An `Int8` whose error is at most half its scale, 1/254 of the channel's largest number; or an
      `Int4`, whose error is about half its scale, 1/30 of the range of the group; of its ends more,
      where cutting them makes the squared error of the group smaller; or an `Nf4`, the nearest
      there is.

    Raises:
      ConfigError: the mesh would split a group.
    """
    dims = _summed(names)
    if dims is None:
        return x
    if kind in GROUPS and (size := _group_size(x.shape, names, group or GROUPS[kind])):
        _check_split(x, names, dims[-1], size, kind)
        return _QUANTIZERS[kind](dims[-1], size, x.sharding)(x)
    return _int8_quantizer(dims, x.sharding)(x)


def quantize_tree(params, boxed, kind: str = "int8", group: int | None = None):
    """`quantize` of a tree of parameters, with the names of `transformer.abstract_params`."""
    return jax.tree.map(
        lambda p, x: x if is_quantized(x) else quantize(x, p.names, kind, group),
        boxed, params, is_leaf=lambda x: isinstance(x, Param),
    )  # fmt: skip


def box(boxed, kind: str):
    """What `quantize_tree` makes of `transformer.abstract_params`, boxed likewise."""

    def one(p):
        dims, shape = _summed(p.names), p.value.shape
        if dims is None:
            return p
        size = _group_size(shape, p.names, GROUPS[kind]) if kind in GROUPS else 0
        if size:
            halved, scales = (
                tuple(s // part if i == dims[-1] else s for i, s in enumerate(shape))
                for part in (2, size)
            )
            values = Param(jax.ShapeDtypeStruct(halved, jnp.uint8), p.names)
            scale = Param(jax.ShapeDtypeStruct(scales, jnp.bfloat16), p.names)
            return Int4(values, scale, scale) if kind == "int4" else Nf4(values, scale)
        sizes = (1 if i in dims else s for i, s in enumerate(shape))
        names = (None if i in dims else name for i, name in enumerate(p.names))
        values = Param(jax.ShapeDtypeStruct(shape, jnp.int8), p.names)
        return Int8(values, Param(jax.ShapeDtypeStruct(tuple(sizes), jnp.float32), tuple(names)))

    return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, Param))


def _summed(names):
    own = sharding.own_dims(names)
    if len(own) < 2 or {"router", "patches"} & set(names):
        return None
    # A table of ids is looked up, and where it is tied the product sums over its rows.
    return tuple(own[1:]) if names[own[0]] == "vocab" else sharding.row_dims(names)


def _group_size(shape, names, most: int) -> int:
    """Numbers of a group: the most that divide the dim evenly; 0 where a weight stays int8."""
    if "vocab" in names:
        return 0
    size = shape[sharding.row_dims(names)[-1]]
    return max((g for g in range(4, most + 1, 2) if size % g == 0), default=0)


def _check_split(x, names, dim, size, kind):
    parts = x.sharding.shard_shape(x.shape)[dim]
    if parts % size:
        raise ConfigError(
            f"{kind} groups of {size}: the mesh splits {names[dim]}={x.shape[dim]} into parts of "
            f"{parts}, which must be a multiple of {size}"
        )


@functools.cache
def _int8_quantizer(dims: tuple[int, ...], place):
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


@functools.cache
def _int4_quantizer(dim: int, size: int, place):
    def steps(x, scale, least):
        return jnp.clip(jnp.round((x - least) / jnp.where(scale > 0, scale, 1)), 0, 15)

    def rounded(x):
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    def make(x):
        x = _split(x.astype(jnp.float32), dim, x.shape[dim] // size)
        low, high = (f(x, axis=dim + 1, keepdims=True) for f in (jnp.min, jnp.max))
        middle, half = (low + high) / 2, (high - low) / 2

        def try_ends(best, ends):
            width, below = ends
            scale, least = rounded(half * width / 15), rounded(middle - half * below)
            off = steps(x, scale, least) * scale + least - x
            found = jnp.sum(off * off, axis=dim + 1, keepdims=True), scale, least
            is_better = found[0] < best[0]
            return [
                jnp.where(is_better, new, old) for new, old in zip(found, best, strict=True)
            ], None

        # No error is less than infinity where a number is NaN: such a group stays NaN.
        start = [jnp.full_like(half, value) for value in (jnp.inf, jnp.nan, jnp.nan)]
        ends = [(below + above, below) for below, above in itertools.product(_ENDS, _ENDS)]
        best, _ = jax.lax.scan(try_ends, start, jnp.array(ends, jnp.float32))
        _, scale, least = best
        values = _packed(steps(x, scale, least).astype(jnp.uint8), dim)
        return Int4(values, *(jnp.squeeze(s, dim + 1).astype(jnp.bfloat16) for s in (scale, least)))

    return jax.jit(make, out_shardings=Int4(place, place, place))


@functools.cache
def _nf4_quantizer(dim: int, size: int, place):
    borders = [(low + high) / 2 for low, high in itertools.pairwise(NF4)]

    def make(x):
        x = _split(x.astype(jnp.float32), dim, x.shape[dim] // size)
        scale = jnp.max(jnp.abs(x), axis=dim + 1, keepdims=True).astype(jnp.bfloat16)
        # A group of zeros; NaN stays in the scale.
        x /= jnp.where(scale > 0, scale, 1).astype(jnp.float32)
        steps = sum((x > border).astype(jnp.uint8) for border in borders)
        return Nf4(_packed(steps, dim), jnp.squeeze(scale, dim + 1))

    return jax.jit(make, out_shardings=Nf4(place, place))


def _packed(steps, dim: int):
    """0..15 of groups [..., groups, G, ...] as bytes [..., groups * G / 2, ...]."""
    first, second = jnp.split(steps, 2, axis=dim + 1)
    bytes_ = first | (second << 4)
    return bytes_.reshape(*bytes_.shape[:dim], -1, *bytes_.shape[dim + 2 :])


_QUANTIZERS = {"int4": _int4_quantizer, "nf4": _nf4_quantizer}
