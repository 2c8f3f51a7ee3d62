"""Compressed files: gzip, Zstandard, bzip2 and xz, told by their first bytes, read as a stream."""

import bz2
import functools
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from ....configs.errors import UserError

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    **{bytes([0x50 + n, 0x2A, 0x4D, 0x18]): "Zstandard" for n in range(16)},  # a frame of notes
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
}
_SUFFIXES = (".gz", ".zst", ".zstd", ".bz2", ".xz")
# Compressed bytes that are unpacked at once: a thousandfold of it is in memory at the worst usual.
_PIECE_BYTES = 1 << 14


def kind(head: bytes) -> str | None:
    """What a file is compressed with, told from its first bytes; None if it is not."""
    for magic, name in _MAGIC.items():
        if head.startswith(magic) and (name != "bzip2" or head[4:10] in _BZIP2_BLOCKS):
            return name
    return None


# "BZh9" alone could begin a text: a block's mark follows, or that of the end.
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")


def bare_name(path: str) -> str:
    """A file's name in lower case, without the suffixes of compression."""
    name = os.path.basename(path).lower()
    while name.endswith(_SUFFIXES):
        name = name.rpartition(".")[0]
    return name


def unpacked(file: BinaryIO, kind: str, path: str) -> BinaryIO:
    """What a compressed file holds, as a stream that does not seek.

    Raises:
      UserError: `path` is damaged or ends too early, when that is met; a library is missing.
    """
    return stream(_unpack(file, _decompressor(kind, path), kind, path))


def stream(pieces: Iterable[bytes]) -> BinaryIO:
    """Pieces of bytes as a file that does not seek."""
    return io.BufferedReader(_Pieces(iter(pieces)), 1 << 20)


class _Pieces(io.RawIOBase):
    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._left = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _decompressor(kind: str, path: str) -> Callable[[], Any]:
    """Makes an object with `decompress`, `eof` and `unused_data`, for one member of a file."""
    if kind == "gzip":
        return functools.partial(zlib.decompressobj, 31)
    if kind == "bzip2":
        return bz2.BZ2Decompressor
    if kind == "xz":
        return lzma.LZMADecompressor
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f"{path} is compressed with Zstandard, which needs the package zstandard: "
            "pip install 'puna[parquet]'"
        ) from None
    # Up to the largest window that `zstd --long=31` writes.
    return lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _unpack(file: BinaryIO, decompressor, kind: str, path: str) -> Iterator[bytes]:
    """The bytes of all members, one after another, as such files are joined by `cat`."""
    member, rest = decompressor(), b""
    while True:
        piece = rest or file.read(_PIECE_BYTES)
        if not piece:
            raise UserError(f"{path} ends too early: the {kind} file is truncated")
        try:
            data = member.decompress(piece)
        except Exception as error:  # zlib's, lzma's and zstandard's own; OSError and EOFError
            raise UserError(f"{path} is not a sound {kind} file ({error})") from None
        rest = b""
        if data:
            yield data
        if member.eof:
            rest = member.unused_data
            while not (rest := rest.lstrip(b"\0")):  # padding
                if not (rest := file.read(_PIECE_BYTES)):
                    return
            member = decompressor()
