"""Tensors inside files: slicing one reads that part and nothing else.

The formats differ in what they say about their tensors; this is what they have in common. A
checkpoint may join a tensor from the files of several devices (`Joined`) or hold several in one
(`Part`).
"""

import dataclasses
import mmap
import os
import sys
from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from ...configs.errors import UserError
from ...configs.schema import ModelConfig
from .huggingface import REWARD, Leaf, Source

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CAST_BYTES = 8 * 2**20


class Tensor(Protocol):
    """What `Source.load` needs: a shape, a dtype, and slices that return arrays."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


class File:
    """A file mapped into memory, whose pages are given back after each read.

    Raises:
      UserError: it cannot be read or is empty.
    """

    def __init__(self, path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None

    def array(self, offset: int, shape: tuple[int, ...], dtype) -> np.ndarray:
        """A view of the file; its pages count as used until `release`."""
        count = int(np.prod(shape, dtype=object))
        return np.frombuffer(self.map, dtype, count, offset).reshape(shape)

    def release(self) -> None:
        """Give the pages back to the system; they are read again when they are needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


class Mapped:
    """A tensor that lies in a file as a plain row-major array."""

    def __init__(self, file: File, offset: int, shape: tuple[int, ...], dtype: np.dtype):
        self.file, self.offset, self.shape, self.dtype = file, offset, shape, dtype

    def reshape(self, shape: tuple[int, ...]) -> "Mapped":
        return Mapped(self.file, self.offset, shape, self.dtype)

    def __getitem__(self, index):
        found = self.file.array(self.offset, self.shape, self.dtype)[index].copy()
        self.file.release()
        return found


class Part:
    """A range of the first axis of another tensor."""

    def __init__(self, whole: Tensor, start: int, stop: int):
        self.whole, self.start, self.dtype = whole, start, whole.dtype
        self.shape = (stop - start, *whole.shape[1:])

    def __getitem__(self, index):
        start, stop, _ = index[0].indices(self.shape[0])
        return self.whole[(slice(self.start + start, self.start + stop), *index[1:])]


class Joined:
    """Tensors side by side along an axis, as tensor parallelism splits them."""

    def __init__(self, parts: list[Tensor], axis: int):
        self.parts, self.axis = parts, axis
        self.dtype = np.result_type(*{part.dtype for part in parts})
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        self.shape = tuple(shape)

    def __getitem__(self, index):
        start, stop, _ = index[self.axis].indices(self.shape[self.axis])
        found, offset = [], 0
        for part in self.parts:
            size = part.shape[self.axis]
            low, high = max(start - offset, 0), min(stop - offset, size)
            if low < high:
                found.append(part[(*index[: self.axis], slice(low, high), *index[self.axis + 1 :])])
            offset += size
        return np.concatenate(found, self.axis)


@dataclasses.dataclass
class Weights:
    """A checkpoint of others: opened and checked, but not read.

    table: where each leaf of puna's parameters is found. tensors: by the table's names. origin:
    what is known of the model it comes from, see `licences.py`. nonfinite: names of the tensors in
    which NaN or infinity has been read so far. to: a dtype to read all of them in, or None for that
    of the file.
    """

    config: ModelConfig
    table: dict[str, Leaf]
    tensors: Mapping[str, Tensor]
    origin: dict[str, Any]
    nonfinite: set[str] = dataclasses.field(default_factory=set)
    to: np.dtype | None = None

    @property
    def rewards(self) -> bool:
        """Whether it is a reward model: it has a vector that gives rewards, and no output."""
        return REWARD in self.table

    def read(self, source: Source, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """One layer's leaf, or a slice of it, in the dtype of the file or that of `to`.

        Raises:
          UserError: a value is too large for `to`.
        """
        block = source.load(self.tensors[source.name], index)
        if not np.isfinite(block).all():
            self.nonfinite.add(source.name)
        return cast(block, self.to, f"tensor {source.name}")

    def dtype(self, leaf: Leaf) -> np.dtype:
        """The dtype that holds every layer of a leaf exactly, or `to`."""
        return self.to or np.result_type(*{self.tensors[s.name].dtype for s in leaf.sources})

    def warn_of_nonfinite(self, where) -> None:
        """Say on standard error which tensors are not all numbers, if any."""
        if self.nonfinite:
            names = sorted(self.nonfinite)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            warn(f"{where}: NaN or infinity in {', '.join(names[:3])}{more}")


def cast(block: np.ndarray, dtype: np.dtype | None, name: str) -> np.ndarray:
    """An array in another dtype, rounded to the nearest; None keeps its own.

    Raises:
      UserError: a number would become infinite.
    """
    if dtype is None or dtype == block.dtype:
        return block
    made = np.empty(block.shape, dtype)
    # Some rows at a time: what is held beside the two arrays stays small.
    rows = max(1, _CAST_BYTES // max(1, block[:1].nbytes))
    with np.errstate(over="ignore"):
        for start in range(0, len(block), rows):
            part = slice(start, start + rows)
            made[part] = block[part]
            if np.any(np.isinf(made[part]) & np.isfinite(block[part])):
                most = float(ml_dtypes.finfo(dtype).max)
                raise UserError(f"{name} has values beyond {most:g}, the largest of {dtype.name}")
    return made


def warn(message: str) -> None:
    """Say something on standard error that the user should know and that stops nothing."""
    print(f"puna: warning: {message}", file=sys.stderr, flush=True)


def check(
    where, table: dict[str, Leaf], tensors: Mapping[str, Tensor], ignored: set[str] = frozenset()
) -> None:
    """Compare the names and shapes that an architecture needs with those that are there.

    Args:
      where: the checkpoint, for messages.
      ignored: names that may be there and hold nothing of the model.

    Raises:
      UserError: a tensor is missing, left over, or of another shape.
    """
    wanted = {s.name: s.hf_shape for leaf in table.values() for s in leaf.sources}
    problems = []
    for names, what in (
        (wanted.keys() - tensors.keys(), "is missing"),
        (tensors.keys() - wanted.keys() - ignored, "is not part of this architecture"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            problems.append(f"{sorted(names)[0]} {what}{more}")
    if problems:  # both: names that begin otherwise show it
        raise UserError(f"{where}: tensor {', and '.join(problems)}")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{where}: tensor {name} has shape {tuple(tensors[name].shape)}, "
                f"the architecture says {shape}"
            )
