"""From files to devices, slice by slice.

A device's part of a leaf is read, cast and sent before the next one is touched, and the layers of
a scanned leaf arrive a few at a time, so the host never holds more than a fraction of the largest
tensor beyond what the devices themselves keep. Every process reads what its own devices hold.
"""

import functools
import mmap
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tqdm.auto import tqdm

from ..parallel import sharding
from ..transformer import abstract_params
from .huggingface import REWARD, Leaf, Source
from .tensors import Weights

# What is read from a file in one go.
_CHUNK_BYTES = 8 * 2**20
# Below this there is no memory to save, and each further piece of a leaf costs a dispatch.
_SMALL_BYTES = 32 * 2**20


def place(weights: Weights, mesh, dtype=None, title: str = "loading", each=None):
    """Read a checkpoint onto a mesh.

    Args:
      weights: an opened checkpoint.
      mesh: where to; `sharding.RULES` say which device gets what.
      dtype: to cast to while reading; None keeps that of the files, leaf by leaf.
      title: of the progress bar, which is shown on a terminal only.
      each: a function of a parameter and the names of its dims, called before the next one is read;
        what it returns takes the parameter's place.

    Returns:
      The nested dict that `Transformer.apply` takes; of a reward model with its vector.
    """
    boxed = abstract_params(weights.config)
    leaves = jax.tree.leaves_with_path(sharding.shardings(boxed, mesh))
    where = {sharding.path_name(path): place for path, place in leaves}
    names = sharding.names(boxed)
    if weights.rewards:
        where[REWARD], names[REWARD] = sharding.replicated(mesh), ("norm",)
    assert where.keys() == weights.table.keys(), where.keys() ^ weights.table.keys()
    dtypes = {
        path: np.dtype(dtype) if dtype else weights.dtype(leaf)
        for path, leaf in weights.table.items()
    }
    largest = max(_layer_bytes(leaf, dtypes[path]) for path, leaf in weights.table.items())
    limit = max(_SMALL_BYTES, largest // 4)
    total = sum(
        sum(dtypes[path].itemsize * _size(index) for index in parts(leaf.shape, where[path]))
        for path, leaf in weights.table.items()
    )
    flat = {}
    with tqdm(
        total=total, desc=title, unit="B", unit_scale=True, unit_divisor=1024, disable=None
    ) as bar:
        for path, leaf in weights.table.items():
            flat[path] = _place_leaf(weights, leaf, dtypes[path], where[path], limit, bar)
            if each:
                flat[path] = each(flat[path], names[path])
    return traverse_util.unflatten_dict(flat, sep="/")


def _place_leaf(weights, leaf: Leaf, dtype, where, limit: int, bar):
    layers = len(leaf.sources)
    step = max(1, limit // _layer_bytes(leaf, dtype))
    if step >= layers:
        return _array(weights, leaf, range(layers), dtype, where, bar)
    whole = _zeros(leaf.shape, dtype, where)()
    for start in range(0, layers, step):
        stop = min(start + step, layers)
        # No name for the piece: it is gone before the next one is read.
        whole = _update(where)(
            whole, _array(weights, leaf, range(start, stop), dtype, where, bar), start
        )
        whole.block_until_ready()
    return whole


def _array(weights, leaf: Leaf, layers: range, dtype, where, bar):
    """Some layers of a leaf as one array on the devices; all of it if it is not stacked."""
    shape = (len(layers), *leaf.shape[1:]) if leaf.stacked else leaf.shape
    arrays = []
    for index, devices in parts(shape, where).items():
        host = scratch([stop - start for start, stop in index], dtype)
        if leaf.stacked:
            (first, last), *rest = index
            for i in range(first, last):
                _fill(weights, leaf.sources[layers[i]], rest, host[i - first], bar)
        else:
            _fill(weights, leaf.sources[0], index, host, bar)
        sent = [jax.device_put(host, device) for device in devices]
        jax.block_until_ready(sent)
        arrays += sent
        del host
    return jax.make_array_from_single_device_arrays(shape, where, arrays)


def scratch(shape, dtype) -> np.ndarray:
    """An empty array of pages of its own: malloc keeps what is given back to it.

    Their alignment also lets a CPU device take the array as it is.
    """
    count = int(np.prod(shape))
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    pages = mmap.mmap(-1, max(1, count * dtype.itemsize), **private)
    return np.frombuffer(pages, dtype, count).reshape(shape)


def _fill(weights, source: Source, index, out: np.ndarray, bar) -> None:
    """Read one layer's leaf at `index` into `out`, a few rows of the file at a time."""
    dims = source.row.dims.split()
    slowest = source.row.hf_dims[0]
    axis = dims.index(slowest) if slowest in dims else 0
    row_bytes = max(1, out.nbytes // max(1, out.shape[axis]))
    rows = max(1, _CHUNK_BYTES // row_bytes) if slowest in dims else out.shape[axis]
    begin, end = index[axis]
    for start in range(begin, end, rows):
        stop = min(start + rows, end)
        part = [slice(*bounds) for bounds in index]
        part[axis] = slice(start, stop)
        block = weights.read(source, tuple(part))
        out[(slice(None),) * axis + (slice(start - begin, stop - begin),)] = block
        bar.update(block.size * out.dtype.itemsize)


def parts(shape, where) -> dict[tuple[tuple[int, int], ...], list]:
    """What this process's devices hold of an array: bounds of each part, and who holds it."""
    found: dict = {}
    for device, index in where.addressable_devices_indices_map(tuple(shape)).items():
        bounds = tuple(s.indices(dim)[:2] for s, dim in zip(index, shape, strict=True))
        found.setdefault(bounds, []).append(device)
    return found


def _size(bounds) -> int:
    return int(np.prod([stop - start for start, stop in bounds]))


def _layer_bytes(leaf: Leaf, dtype) -> int:
    return int(np.prod(leaf.sources[0].shape)) * dtype.itemsize


@functools.cache
def _zeros(shape, dtype, where):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)


@functools.cache
def _update(where):
    """Write into an array in place: its buffer is given away and comes back changed."""
    return jax.jit(
        lambda whole, piece, start: jax.lax.dynamic_update_slice_in_dim(whole, piece, start, 0),
        donate_argnums=0,
        out_shardings=where,
    )
