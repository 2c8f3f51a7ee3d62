"""Context parallelism: the tokens of a row on several devices.

Under a causal mask late tokens attend to more keys than early ones, so a row is cut into twice
as many blocks as there are devices, and device i holds blocks i and 2n - 1 - i ("zig-zag": arXiv
2407.21783, section 3.3.2). Everything but attention works token by token and does not notice;
attention gathers the keys and values of the row, which grouped queries make a small part of it.
"""

import functools

import jax
import jax.numpy as jnp

from . import sharding

AXIS = "context"


def devices(length: int) -> int:
    """How many devices share rows of this length: 1 where it does not divide into their blocks."""
    n = sharding.split_axes().get(AXIS, 1)
    return 1 if length % (2 * n) else n


def to_zigzag(x):
    """Bring rows [B, T, ...] from their natural order into zig-zag order."""
    return _permute(x, _to_zigzag)


def from_zigzag(x):
    """Bring rows [B, T, ...] back from zig-zag order."""
    return _permute(x, _from_zigzag)


def _permute(x, permute):
    n = devices(x.shape[1])
    if n == 1:
        return x
    spec = sharding.activation(x.shape, ("batch", "length", *(None for _ in x.shape[2:])))
    return sharding.per_device(functools.partial(permute, n), (spec,), spec)(x)


# In natural order device i has blocks 2i and 2i + 1; block b belongs to device min(b, 2n - 1 - b),
# which has exactly one even and one odd block. So all even blocks move at once, then all odd ones.
def _routes(n: int, odd: int) -> list[tuple[int, int]]:
    return [(i, min(2 * i + odd, 2 * n - 1 - 2 * i - odd)) for i in range(n)]


def _to_zigzag(n, x):
    even, odd = (
        jax.lax.ppermute(half, AXIS, _routes(n, b)) for b, half in enumerate(jnp.split(x, 2, 1))
    )
    first = jax.lax.axis_index(AXIS) % 2 == 0
    return jnp.concatenate([jnp.where(first, even, odd), jnp.where(first, odd, even)], 1)


def _from_zigzag(n, x):
    low, high = jnp.split(x, 2, 1)
    first = jax.lax.axis_index(AXIS) % 2 == 0
    halves = jnp.where(first, low, high), jnp.where(first, high, low)
    back = [
        jax.lax.ppermute(half, AXIS, [(j, i) for i, j in _routes(n, b)])
        for b, half in enumerate(halves)
    ]
    return jnp.concatenate(back, 1)


def gather(x, n: int):
    """The whole row, in natural order, on each of its n devices; for use in `per_device`."""
    x = jax.lax.all_gather(x, AXIS, axis=1, tiled=True)
    blocks = x.reshape(x.shape[0], 2 * n, -1, *x.shape[2:])
    order = [2 * b if b < n else 2 * (2 * n - 1 - b) + 1 for b in range(2 * n)]
    return jnp.concatenate([blocks[:, i] for i in order], 1)


def starts(n: int, length: int):
    """Where the two blocks of this device begin in rows of `length`; for use in `per_device`."""
    i, block = jax.lax.axis_index(AXIS), length // (2 * n)
    return i * block, (2 * n - 1 - i) * block
