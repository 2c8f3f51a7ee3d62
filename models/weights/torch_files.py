"""`torch.save` files, read and written without torch, and read without trusting them.

Such a file is a zip archive: `data.pkl`, a pickle that describes the tensors, and one member of
raw bytes for each storage. A pickle may call anything, so this one may name nothing but what a
dict of tensors takes; the bytes are mapped, not read. Compressed archives, the format before
torch 1.6 and tensors that are not row-major are left out on purpose. What is written is what
`torch.load(weights_only=True)` takes, its tensors at the places where torch itself puts them.
"""

import collections
import dataclasses
import io
import math
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ...configs.errors import UserError
from .tensors import BFLOAT16, File, Mapped

DTYPES = {
    "BFloat16Storage": BFLOAT16,
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
}
# The description of the largest Llama's tensors takes less than 1 MB.
_MAX_PICKLE = 64 * 2**20
_LOCAL_HEADER = 30
# What `zipfile` adds to that for sizes beyond 4 GB, and where torch lets bytes begin.
_ZIP64_EXTRA = 20
_ALIGNMENT = 64


class _Rebuild:
    """Stands for `torch._utils._rebuild_tensor_v2`; nothing can be set on it."""

    __slots__ = ()

    def __call__(self, storage, offset, size, stride, *_):
        return _Described(storage, offset, size, stride)


class _Encode:
    """Stands for `_codecs.encode`, by which protocol 2 spells bytes; of `_Ignored` only."""

    __slots__ = ()

    def __call__(self, *_):
        return None


class _Ignored:
    """Stands for `io.BytesIO`, which Llama 4's files keep beside some tensors; holds nothing."""

    __slots__ = ()

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


@dataclasses.dataclass(frozen=True, slots=True)
class _Described:
    storage: Any
    offset: Any
    size: Any
    stride: Any


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    kind: str
    key: str
    count: int


# The one in Python: that in C lets a file of a few bytes reserve gigabytes for its memo.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("_io", "BytesIO"):
            return _Ignored
        if (module, name) == ("_codecs", "encode"):
            return _Encode()
        if module == "torch" and name.endswith("Storage") and name.isidentifier():
            return name  # only ever looked up in DTYPES
        raise UserError(
            f"asks for {module[:60]}.{name[:60]}, which a file of weights has no use for"
        )

    def persistent_load(self, pid):
        match pid:
            case ("storage", str(kind), str(key), _, int(count)) if count >= 0:
                return _Storage(kind, key, count)
        raise UserError("names a storage in a way that torch does not")


def open_file(path: pathlib.Path) -> dict[str, Mapped]:
    """Return the tensors of a `torch.save`d dict by name, unread.

    Raises:
      UserError: the file is damaged, wants more than tensors, or holds tensors of other dtypes.
    """
    file = File(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            prefix = _prefix(members)
            order = f"{prefix}byteorder"
            if (
                order in members
                and members[order].file_size < 99
                and archive.read(order) != b"little"
            ):
                raise UserError("is of a big-endian machine")
            if members[f"{prefix}data.pkl"].file_size > _MAX_PICKLE:
                raise UserError("has a description of absurd size")
            state = _Unpickler(io.BytesIO(archive.read(f"{prefix}data.pkl"))).load()
        if not isinstance(state, dict):
            raise UserError("does not hold a dict of tensors")
        return {
            name: _tensor(file, members, prefix, name, value)
            for name, value in state.items()
            if not isinstance(value, _Ignored)
        }
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except zipfile.BadZipFile:
        raise UserError(f"{path}: is damaged, or not a zip archive of torch 1.6 or newer") from None
    # A hostile pickle can make the unpickler fail in nearly any way.
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{path}: is damaged ({lines[0][:100]})") from None


def _prefix(members) -> str:
    found = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(found) != 1:
        raise UserError("is a zip archive, but not one of torch.save")
    return found[0][: -len("data.pkl")]


def _tensor(file: File, members, prefix: str, name, value) -> Mapped:
    if not isinstance(name, str) or not isinstance(value, _Described):
        raise UserError(f"holds {str(name)[:60]!r}, which is not a tensor")
    storage, offset, size, stride = value.storage, value.offset, value.size, value.stride
    if not isinstance(storage, _Storage) or not all(
        isinstance(numbers, tuple) and all(type(n) is int and n >= 0 for n in numbers)
        for numbers in (size, stride, (offset,))
    ):
        raise UserError(f"describes tensor {name} in a way that torch does not")
    if storage.kind not in DTYPES:
        raise UserError(f"tensor {name} is a {storage.kind}; {', '.join(DTYPES)} are read")
    dtype, count = DTYPES[storage.kind], math.prod(size)
    rows = [math.prod(size[i + 1 :]) for i in range(len(size))]
    if len(stride) != len(size) or any(
        s != row and n > 1 for s, row, n in zip(stride, rows, size, strict=True)
    ):
        raise UserError(f"tensor {name} is not stored row by row")
    info = members.get(f"{prefix}data/{storage.key}")
    if info is None:
        raise UserError(f"lacks the bytes of tensor {name}")
    if info.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"tensor {name} is compressed")
    header = bytes(file.map[info.header_offset : info.header_offset + _LOCAL_HEADER])
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise UserError(f"the bytes of tensor {name} are not where the archive says")
    start = info.header_offset + _LOCAL_HEADER
    start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    end = (offset + count) * dtype.itemsize
    if end > info.file_size or start + info.file_size > file.size:
        raise UserError(f"tensor {name} reaches beyond the end of its bytes")
    return Mapped(file, start + offset * dtype.itemsize, size, dtype)


def write_file(
    path: pathlib.Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    arrays: Iterable[np.ndarray],
) -> None:
    """Write a dict of tensors as `torch.save` does, one array at a time.

    Args:
      path: the file.
      tensors: shape and dtype by name.
      arrays: the tensors themselves, in the order of `tensors`.

    Raises:
      UserError: a tensor has a dtype that is not in `DTYPES`.
    """
    description = _pickled(tensors)
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", description)
        archive.writestr("archive/byteorder", "little")
        for key, ((shape, dtype), array) in enumerate(zip(tensors.values(), arrays, strict=True)):
            assert array.shape == shape and array.dtype == dtype
            info = zipfile.ZipInfo(f"archive/data/{key}")
            start = file.tell() + _LOCAL_HEADER + len(info.filename) + _ZIP64_EXTRA + 4
            padding = -start % _ALIGNMENT
            info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
            with archive.open(info, "w", force_zip64=True) as member:
                member.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        archive.writestr("archive/version", "3\n")


def _pickled(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """The pickle of a dict of tensors, spelt out: torch's names need no torch then."""

    def plain(value) -> bytes:
        return pickle.dumps(value, 2)[2:-1]  # without the protocol and the full stop

    def named(module: str, name: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    out = [pickle.PROTO + b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    for key, (name, (shape, dtype)) in enumerate(tensors.items()):
        if dtype not in kinds:
            raise UserError(
                f"tensor {name} is {dtype}; {', '.join(d.name for d in kinds)} are written"
            )
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        out += [
            plain(name), named("torch._utils", "_rebuild_tensor_v2"), pickle.MARK,
            pickle.MARK, plain("storage"), named("torch", kinds[dtype]), plain(str(key)),
            plain("cpu"), plain(math.prod(shape)), pickle.TUPLE, pickle.BINPERSID,
            plain(0), plain(shape), plain(strides), plain(False),
            named("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE,
            pickle.TUPLE, pickle.REDUCE,
        ]  # fmt: skip
    return b"".join([*out, pickle.SETITEMS, pickle.STOP])
