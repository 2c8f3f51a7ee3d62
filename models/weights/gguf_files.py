"""Reading llama.cpp's GGUF container: typed metadata, tensor descriptions, the tensors themselves.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian. The header is read here
because a hostile one makes the reader of the `gguf` package run out of memory; that package turns
quantised blocks back into numbers. A model in several files (llama-gguf-split) is known by their
names; the first has the metadata.
"""

import math
import pathlib
import re
import struct

import numpy as np

from ...configs.errors import UserError
from .tensors import BFLOAT16, File, Mapped

MAGIC = b"GGUF"
# Metadata types of fixed size, by their number; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
# Tensor types, by their number.
_PLAIN = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 30: BFLOAT16}
_QUANTISED = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS",
}  # fmt: skip


class Quantised:
    """A tensor of quantised blocks, which lie along its last axis; slices come back as float32."""

    dtype = np.dtype(np.float32)

    def __init__(self, file: File, offset: int, shape: tuple[int, ...], kind: str):
        import gguf

        self.file, self.offset, self.shape = file, offset, shape
        self.kind = gguf.GGMLQuantizationType[kind]
        self.block, self.block_bytes = gguf.GGML_QUANT_SIZES[self.kind]

    @property
    def size(self) -> int:
        return math.prod(self.shape) // self.block * self.block_bytes

    def __getitem__(self, index):
        from gguf import quants

        *rows, columns = index
        start, stop, _ = columns.indices(self.shape[-1])
        first, last = start // self.block, -(-stop // self.block)
        stored = (*self.shape[:-1], self.shape[-1] // self.block * self.block_bytes)
        data = self.file.array(self.offset, stored, np.uint8)
        data = data[(*rows, slice(first * self.block_bytes, last * self.block_bytes))].copy()
        self.file.release()
        found = quants.dequantize(data, self.kind)
        return found[..., start - first * self.block : stop - first * self.block]


class _Cursor:
    """Reads the header from its start, never beyond the file's end."""

    def __init__(self, file: File):
        self.file, self.at = file, 0

    def take(self, size: int) -> bytes:
        if size > self.file.size - self.at:
            raise UserError(
                f"{self.file.path}: is a damaged GGUF file: its header reaches beyond its end"
            )
        self.at += size
        return self.file.map[self.at - size : self.at]

    def number(self, code: str):
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        # Not strict: vocabularies hold pieces of characters.
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int, nested: bool = False):
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or nested:
            raise UserError(
                f"{self.file.path}: is a damaged GGUF file: metadata of unknown type {kind}"
            )
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[kind])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if count > self.file.size - self.at:
            raise UserError(
                f"{self.file.path}: is a damaged GGUF file: an array of {count} entries"
            )
        return [self.value(kind, nested=True) for _ in range(count)]


def is_gguf(path: pathlib.Path) -> bool:
    """Whether a file says it is GGUF."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def first_part(path: pathlib.Path) -> pathlib.Path:
    """The first file of the model that a file is a part of: itself where it is whole."""
    match = _PART.fullmatch(path.name)
    return path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf") if match else path


def models(folder: pathlib.Path) -> list[pathlib.Path]:
    """The models of a folder, sorted, each by its first file."""
    return sorted({first_part(path) for path in folder.glob("*.gguf")})


def open_model(path: pathlib.Path) -> tuple[dict, dict[str, Mapped | Quantised]]:
    """Open a whole model: its metadata, and its tensors by name, unread.

    Args:
      path: its file, or any of its parts.

    Raises:
      UserError: damaged, a part is missing or of another model.
    """
    first = first_part(path)
    file, metadata, described = read_header(first)
    tensors = open_tensors(first, file, described)
    count = metadata.get("split.count", 1) or 1
    if count == 1:
        return metadata, tensors
    match = _PART.fullmatch(first.name)
    if type(count) is not int or not match or int(match[3]) != count:
        raise UserError(
            f"{first}: split.count={str(count)[:20]} must stand in its name, as in "
            "NAME-00001-of-00003.gguf: the names that llama-gguf-split gives"
        )
    for i in range(1, count):
        part = first.with_name(f"{match[1]}-{i + 1:05}-of-{match[3]}.gguf")
        if not part.is_file():
            raise UserError(f"{part}: is missing: part {i + 1} of {count} of {first.name}")
        file, own, described = read_header(part)
        if (own.get("split.no"), own.get("split.count")) != (i, count):
            raise UserError(f"{part}: must be part {i + 1} of {count} (split.no={i}, "
                            f"split.count={count})")  # fmt: skip
        found = open_tensors(part, file, described)
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{part}: tensor {twice[0]} appears in another part as well")
        tensors |= found
    wanted = metadata.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise UserError(f"{first}: its parts hold {len(tensors)} tensors, not {wanted}")
    return metadata, tensors


def read_header(path: pathlib.Path) -> tuple[File, dict, list]:
    """Return the file, its metadata by key, and its tensors as (name, shape, type, offset).

    Raises:
      UserError: not GGUF, or damaged.
    """
    file = File(path)
    cursor = _Cursor(file)
    if cursor.take(4) != MAGIC:
        raise UserError(f"{path}: is not a GGUF file")
    version = cursor.number("I")
    if version not in (2, 3):
        raise UserError(f"{path}: is GGUF version {version}; 2 and 3 (little-endian) are read")
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    # The smallest entries have 13 and 28 bytes: what cannot be there is not looked for.
    if tensor_count * 28 + key_count * 13 > file.size:
        raise UserError(
            f"{path}: is a damaged GGUF file: {tensor_count} tensors, {key_count} keys cannot fit"
        )
    metadata: dict = {}
    for _ in range(key_count):
        key = cursor.text()
        if key in metadata:
            raise UserError(f"{path}: key {key[:60]} appears twice")
        metadata[key] = cursor.value(cursor.number("I"))
    described = []
    for _ in range(tensor_count):
        name, dims = cursor.text(), cursor.number("I")
        if dims > 4:
            raise UserError(f"{path}: tensor {name[:60]} has {dims} dims")
        # The fastest axis comes first there.
        shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
        described.append((name, shape, cursor.number("I"), cursor.number("Q")))
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or align < 1 or align & (align - 1):
        raise UserError(f"{path}: general.alignment={align!r} must be a power of two")
    start = -(-cursor.at // align) * align
    file.release()
    return (
        file,
        metadata,
        [(n, shape, kind, start + offset) for n, shape, kind, offset in described],
    )


def open_tensors(path: pathlib.Path, file: File, described: list) -> dict[str, Mapped | Quantised]:
    """The tensors by name, unread.

    Raises:
      UserError: a type that is not read, a tensor twice or beyond the end of the file.
    """
    tensors: dict[str, Mapped | Quantised] = {}
    for name, shape, kind, offset in described:
        if name in tensors:
            raise UserError(f"{path}: tensor {name} appears twice")
        if kind in _PLAIN:
            tensor = Mapped(file, offset, shape, _PLAIN[kind])
            size = math.prod(shape) * tensor.dtype.itemsize
        elif kind in _QUANTISED:
            tensor = _quantised(path, file, name, shape, kind, offset)
            size = tensor.size
        else:
            read = ", ".join(["F32", "F16", "BF16", *_QUANTISED.values()])
            raise UserError(f"{path}: tensor {name} has {_name(kind)}; read are {read}")
        if offset + size > file.size:
            raise UserError(f"{path}: is cut short: tensor {name} reaches beyond its end")
        tensors[name] = tensor
    return tensors


def _quantised(path, file, name, shape, kind, offset) -> Quantised:
    try:
        tensor = Quantised(file, offset, shape, _QUANTISED[kind])
    except ImportError:
        raise UserError(
            f"{path}: quantised tensors need the package gguf: pip install 'puna[gguf]'"
        ) from None
    if not shape or shape[-1] % tensor.block:
        raise UserError(
            f"{path}: tensor {name} has shape {shape}, which is not made of blocks of "
            f"{tensor.block}"
        )
    return tensor


def _name(kind: int) -> str:
    try:
        import gguf

        return f"type {gguf.GGMLQuantizationType(kind).name}"
    except (ImportError, ValueError):
        return f"type {kind}"
