"""The arrays of one item of a checkpoint, as Orbax stores them: OCDBT and zarr, read in pieces.

Several pieces are on their way at a time, for a disk may be far away and unpacking takes a core;
how many is bounded by their bytes. Orbax itself would hold every array of an item on the host.
"""

import collections
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
import tensorstore

from ...configs import paths
from ..parallel import sharding
from . import placing

# What is read and unpacked as one; arrays are stored in pieces of at most this size.
_PIECE_BYTES = 4 * 2**20
# Bytes on their way at most: a quarter of the largest array, within these bounds.
_LEAST_BYTES, _MOST_BYTES = 2 * _PIECE_BYTES, 64 * 2**20


class _Part(NamedTuple):
    """What some devices hold of an array: which one, where in it, and room for it on the host."""

    array: int
    bounds: tuple[tuple[int, int], ...]
    devices: list
    host: np.ndarray


class Item:
    """The arrays in a folder, by the path of their parameter."""

    def __init__(self, folder: pathlib.Path):
        # The table of what lies where is read once, not for each array anew.
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 2 * _PIECE_BYTES}})
        base = os.fspath(paths.absolute(folder))
        self._base = f"{base if paths.is_url(base) else f'file://{base}'}/"
        self._arrays: dict[str, tensorstore.TensorStore] = {}

    def open(self, paths: Iterable[str]) -> list[tensorstore.TensorStore]:
        """The arrays of these paths; their shapes and dtypes are read, all at a time.

        Raises:
          ValueError: one is not there, or damaged.
        """
        paths = list(paths)
        found = {p: self._open(p) for p in paths if p not in self._arrays}
        self._arrays |= {p: future.result() for p, future in found.items()}
        return [self._arrays[p] for p in paths]

    def _open(self, path: str):
        name = path.replace("/", ".") + "/"
        kvstore = {"driver": "ocdbt", "base": self._base, "path": name}
        spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
        return tensorstore.open(spec, open=True, context=self._context)

    def read(self, abstract):
        """Read arrays into the shapes, dtypes and shardings of `abstract`, each device's part.

        Raises:
          ValueError: they are not there, damaged, or of another shape or dtype.
        """
        leaves = jax.tree.leaves_with_path(abstract)
        arrays = self.open(sharding.path_name(path) for path, _ in leaves)
        for (path, x), stored in zip(leaves, arrays, strict=True):
            if stored.shape != x.shape or stored.dtype.numpy_dtype != x.dtype:
                raise ValueError(
                    f"{sharding.path_name(path)} is {stored.dtype.name}{list(stored.shape)} and "
                    f"must be {x.dtype}{list(x.shape)}"
                )
        where = [placing.parts(x.shape, x.sharding) for _, x in leaves]
        largest = max((math.prod(x.shape) * x.dtype.itemsize for _, x in leaves), default=0)
        limit = min(max(_LEAST_BYTES, largest // 4), _MOST_BYTES)
        parts = (
            _Part(i, bounds, devices, placing.scratch([b - a for a, b in bounds], x.dtype))
            for i, ((_, x), found) in enumerate(zip(leaves, where, strict=True))
            for bounds, devices in found.items()
        )
        sent: list[list[jax.Array]] = [[] for _ in leaves]
        for part in _filled(arrays, parts, limit):
            copies = [jax.device_put(part.host, device) for device in part.devices]
            sent[part.array] += jax.block_until_ready(copies)
            # No name for it while the next one is waited for.
            del part, copies
        found = [
            jax.make_array_from_single_device_arrays(x.shape, x.sharding, pieces)
            for (_, x), pieces in zip(leaves, sent, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(abstract), found)


def _filled(arrays, parts: Iterable[_Part], limit: int) -> Iterator[_Part]:
    """Each part once it is read; reads of those after it are under way by then."""
    waiting: collections.deque = collections.deque()
    room = limit

    def oldest():
        nonlocal room
        future, size, done = waiting.popleft()
        future.result()
        room += size
        return done

    for part in parts:
        pieces = list(_pieces(part.bounds, part.host.itemsize))
        for n, bounds in enumerate(pieces, 1):
            size = _size(bounds) * part.host.itemsize
            while waiting and room < size:
                if done := oldest():
                    yield done
                    del done
            future = _start(arrays[part.array], bounds, part)
            waiting.append((future, size, part if n == len(pieces) else None))
            room -= size
        del part
    while waiting:
        if done := oldest():
            yield done
            del done


def _start(array: tensorstore.TensorStore, bounds, part: _Part) -> tensorstore.WriteFutures:
    """Begin to read a piece of an array into its place in a part."""
    here = tuple(
        slice(start - low, stop - low)
        for (start, stop), (low, _) in zip(bounds, part.bounds, strict=True)
    )
    wanted = array[tuple(slice(*b) for b in bounds)][tensorstore.d[:].translate_to[0]]
    # The dots make a view of a scalar too.
    return tensorstore.array(part.host[*here, ...]).write(wanted)


def _size(bounds) -> int:
    return math.prod(stop - start for start, stop in bounds)


def _pieces(bounds, itemsize: int):
    """Split a part of an array in halves until each can be unpacked at a time."""
    if _size(bounds) * itemsize <= _PIECE_BYTES:
        yield bounds
        return
    sizes = [stop - start for start, stop in bounds]
    axis = sizes.index(max(sizes))
    start, stop = bounds[axis]
    middle = (start + stop) // 2
    for half in ((start, middle), (middle, stop)):
        yield from _pieces((*bounds[:axis], half, *bounds[axis + 1 :]), itemsize)
