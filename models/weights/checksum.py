"""Checksums of arrays, computed where the arrays lie: the same on any mesh, of any process count.

Orbax writes and reads arrays without one. Each element's bits are scrambled with a key of its own
place by a bijection of 32 bits (the finalizer of MurmurHash3, Austin Appleby, public domain) and
the results are added modulo 2**32. So any change within one element is found with certainty, a
swap, a shift or a lost block but for a chance of 2**-64: there are two such sums.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ..parallel import sharding

_SEEDS = (0x9E3779B9, 0x7F4A7C15)


def checksums(tree) -> dict[str, str]:
    """Path of each array of a tree -> its dtype, shape and checksum, such as `int32[] 0f...`.

    With several processes all of them call this together, and all get the same.
    """
    leaves = jax.tree.leaves_with_path(tree)
    if not leaves:
        return {}
    meshes = {x.sharding.mesh for _, x in leaves if isinstance(x, jax.Array) and _is_named(x)}
    everywhere = NamedSharding(meshes.pop(), PartitionSpec()) if len(meshes) == 1 else None
    sums = np.asarray(_summing(everywhere)([x for _, x in leaves]))
    return {
        sharding.path_name(path): f"{x.dtype}{list(x.shape)} {high:08x}{low:08x}"
        for (path, x), (high, low) in zip(leaves, sums, strict=True)
    }


def _is_named(x: jax.Array) -> bool:
    return isinstance(x.sharding, NamedSharding)


@functools.cache
def _summing(everywhere):
    return jax.jit(lambda xs: jnp.stack([checksum(x) for x in xs]), out_shardings=everywhere)


@jax.jit  # traced once for all arrays of a shape
def checksum(x):
    """uint32 [2] of an array."""
    bits = _bits(x)
    # Row-major and modulo 2**32; the compiler makes it on each device for what lies there.
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * np.uint32(size % 2**32)
        place = place + lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    mixed = tuple(_mix(bits ^ _mix(place ^ np.uint32(seed))) for seed in _SEEDS)
    # As one reduction, for XLA on CPU makes whole arrays of what goes into two, or into a sum.
    zeros = (np.uint32(0),) * len(_SEEDS)
    add = functools.partial(jax.tree.map, jnp.add)
    return jnp.stack(lax.reduce(mixed, zeros, add, tuple(range(bits.ndim))))


def _bits(x):
    """What an array holds as unsigned 32-bit numbers, bit for bit."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = math.gcd(x.dtype.itemsize, 4)
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)


def _mix(x):
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
