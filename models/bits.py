"""bfloat16 arrays kept as their bits, in uint16, where a CPU would move them slowly.

XLA of jax 0.10 for CPUs takes a slice of a bfloat16 array, gathers from it or writes into it by
converting all of it to float32 first: at each token the weights of all layers, and the cache. It
moves uint16 as it is; the bits become bfloat16 again where they are multiplied.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .parallel import sharding


def dtype(of):
    """What to keep arrays of a dtype in, on the platform that is traced for."""
    of = jnp.dtype(of)
    return jnp.dtype("uint16") if of == jnp.bfloat16 and sharding.platform() == "cpu" else of


def pack(x):
    """An array, or a tree of them, as it is kept."""

    def one(x):
        kept = dtype(x.dtype)
        return x if kept == x.dtype else jax.lax.bitcast_convert_type(x, kept)

    return jax.tree.map(one, x)


def unpack(x):
    """What it was before `pack`; anything but uint16 is left alone."""

    def one(x):
        return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x

    return jax.tree.map(one, x)


def view(tree):
    """A tree of arrays with the bfloat16 ones on CPUs as their bits, sharing their memory."""

    def share(x):
        if not isinstance(x, jax.Array) or x.dtype != jnp.bfloat16:
            return x
        if {device.platform for device in x.sharding.device_set} != {"cpu"}:
            return x
        parts = [
            jax.device_put(np.asarray(part.data).view(np.uint16), part.device, may_alias=True)
            for part in x.addressable_shards
        ]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)

    return jax.tree.map(share, tree)
