"""Text and JSONL files, plain or gzipped, as a random-access sequence of records.

A file ending in .jsonl or .json-lines (or the same with .gz) holds one JSON object a line; any
other file is one text. Plain files are read piece by piece through
an index of line offsets (8 bytes a document) that is built when they are opened, and refused once
they change: no place in them would hold any longer. A gzip file cannot be read in the middle, so it
is kept in memory, unzipped, once per reading process.
"""

import array
import bisect
import contextlib
import dataclasses
import functools
import glob
import gzip
import io
import itertools
import json
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from ...configs.errors import UserError
from .examples import Record, RecordError, json_type
from .quarantine import SHOWN_CHARACTERS, BadRecord

JSONL_SUFFIXES = (".jsonl", ".json-lines")
MAX_GZIP_BYTES = 1 << 30  # unzipped, for one file
_BLOCK_BYTES = 1 << 20  # of a line that are in memory at once while a file is indexed


def decode_record(raw: bytes, is_json: bool) -> Record:
    """Read one record: the bytes of a whole text file, or of one JSONL line if `is_json`.

    Raises:
        RecordError: the record is binary, not UTF-8, or not a JSON object.
    """
    if b"\0" in raw:
        raise RecordError("holds a NUL byte: it is binary, not text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(
            f"is not UTF-8 text (byte 0x{raw[error.start]:02x} at offset {error.start})"
        ) from None
    if not is_json:
        return text
    try:
        record = json.loads(text.rstrip())  # blank lines behind it may hold more than JSON's space
    except json.JSONDecodeError as error:
        raise RecordError(f"is not JSON ({error.msg} at column {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"is not JSON that can be read ({error})") from None
    if not isinstance(record, dict):
        raise RecordError(f"is a JSON {json_type(record)}, not an object like {{...}}")
    return record


def find_files(pattern: str) -> list[str]:
    """Return the files that a path or a glob (`**` goes into folders) names, sorted.

    Raises:
        UserError: there is no such file, or the path is a folder.
    """
    try:
        if b"\0" in os.fsencode(pattern):
            raise ValueError
        path = os.path.expanduser(pattern)
    except ValueError:
        raise UserError(f"{pattern!r} holds characters that no file's name has") from None
    if os.path.isdir(path):
        raise UserError(f"{pattern} is a folder: name its files, e.g. {path.rstrip('/')}/**/*.txt")
    if os.path.exists(path):
        return [path]
    if not glob.has_magic(path):
        raise UserError(f"{pattern}: no such file (data sets of TFDS are written tfds:NAME)")
    paths = sorted(filter(os.path.isfile, glob.iglob(path, recursive=True)))
    if not paths:
        raise UserError(f"{pattern}: no file matches this pattern")
    return paths


@dataclasses.dataclass(frozen=True)
class _Index:
    """Where the documents of a file are, and of which state of the file that is true."""

    offsets: array.array  # where each starts, and behind them where the last one ends
    blanks: array.array  # of each line that is none, how many documents stand before it
    state: tuple[int, int]  # bytes, and nanoseconds of the last change


class FileRecords(Sequence[Record]):
    """The records of some files, in the order of the files and of their lines.

    Args:
        paths: the files.
        max_bytes: what a record may have; a longer one is not read into memory.

    Raises:
        UserError: a file cannot be read, or when a record of it is read, has changed.
        BadRecord: a record is malformed, when it is read.
    """

    def __init__(self, paths: Sequence[str], max_bytes: int):
        self._paths = tuple(paths)
        self._max_bytes = max_bytes
        self._unzipped: dict[str, bytes] = {}
        self._files = [self._index(path) for path in self._paths]
        # How many documents there are up to the end of each file.
        self._ends = list(itertools.accumulate(len(file.offsets) - 1 for file in self._files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        path, file, document = self._find(index)
        size = file.offsets[document + 1] - file.offsets[document]
        raw = self._read(path, file, document, self._max_bytes)
        try:
            if size > self._max_bytes:
                raise RecordError(
                    f"is a document of {size:,} bytes, more than data.max_document_bytes="
                    f"{self._max_bytes}: split it, e.g. into lines of a .jsonl file"
                )
            return decode_record(raw, _is_jsonl(path))
        except RecordError as error:
            raise self.bad(index, str(error)) from None

    def folder(self, index: int) -> str:
        """The folder of the file that holds a record."""
        return os.path.dirname(self._find(index)[0])

    def bad(self, index: int, reason: str) -> BadRecord:
        """The error that a record is no document, which says where it is."""
        path, file, document = self._find(index)
        line = document + 1 + bisect.bisect_right(file.blanks, document)
        where = f"{path} line {line}" if _is_jsonl(path) else path
        # A character has up to 4 bytes.
        beginning = self._read(path, file, document, 4 * SHOWN_CHARACTERS)
        return BadRecord(where, reason, path, line, file.offsets[document], beginning)

    def _find(self, index: int) -> tuple[str, _Index, int]:
        """The file of a record, and its number there."""
        number = bisect.bisect_right(self._ends, index)
        path, file = self._paths[number], self._files[number]
        return path, file, index - self._ends[number] + len(file.offsets) - 1

    def _read(self, path: str, file: _Index, document: int, most: int) -> bytes:
        start, stop = file.offsets[document], file.offsets[document + 1]
        with _explain(path), self._open(path, file.state) as opened:
            opened.seek(start)
            return opened.read(min(stop - start, most))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_unzipped": {}}  # a worker process unzips for itself

    def _index(self, path: str) -> _Index:
        with _explain(path):
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its writer
                raise UserError(f"{path} is no file that can be read at random: copy it to one")
            state = status.st_size, status.st_mtime_ns
            with self._open(path, state) as opened:
                if _is_jsonl(path):
                    return _Index(*_find_documents(opened), state)
                size = opened.seek(0, os.SEEK_END)
        return _Index(array.array("q", [0, size] if size else [0]), array.array("q"), state)

    def _open(self, path: str, state: tuple[int, int]) -> BinaryIO:
        return io.BytesIO(self._unzip(path, state)) if _is_gzip(path) else _open_same(path, state)

    def _unzip(self, path: str, state: tuple[int, int]) -> bytes:
        if path not in self._unzipped:
            with _open_same(path, state) as zipped, gzip.open(zipped) as file:
                data = file.read(MAX_GZIP_BYTES + 1)
            if len(data) > MAX_GZIP_BYTES:
                raise UserError(
                    f"{path} holds more than {MAX_GZIP_BYTES >> 30} GiB unzipped, which would stay "
                    "in memory: unzip it with gunzip"
                )
            self._unzipped[path] = data
        return self._unzipped[path]


def _is_gzip(path: str) -> bool:
    return path.lower().endswith(".gz")


def _is_jsonl(path: str) -> bool:
    return path.lower().removesuffix(".gz").endswith(JSONL_SUFFIXES)


def _open_same(path: str, state: tuple[int, int]) -> BinaryIO:
    """Open a file that is still as it was when it was indexed."""
    file = open(path, "rb")
    status = os.fstat(file.fileno())
    if (status.st_size, status.st_mtime_ns) != state:
        file.close()
        raise UserError(
            f"{path} has changed since it was opened: data must stay as it is while it is read; "
            "start again, and write new data to new files"
        )
    return file


def _find_documents(lines: BinaryIO) -> tuple[array.array, array.array]:
    """Return the offsets and the blank lines of an index."""
    offsets, blanks = array.array("q"), array.array("q")
    start = offset = 0
    blank = True
    # In pieces, since a line may be longer than the memory.
    for piece in iter(functools.partial(lines.readline, _BLOCK_BYTES), b""):
        if blank and not piece.isspace():
            offsets.append(start)
            blank = False
        offset += len(piece)
        if piece.endswith(b"\n"):
            if blank:
                blanks.append(len(offsets))
            start, blank = offset, True
    offsets.append(offset)
    return offsets, blanks


@contextlib.contextmanager
def _explain(path: str) -> Iterator[None]:
    """Turn what can go wrong while a file is read into one line that names it."""
    try:
        yield
    except EOFError:
        raise UserError(f"{path} ends too early: the gzip file is truncated") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a sound gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
