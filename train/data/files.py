"""Text and JSONL files, plain or gzipped, as a random-access sequence of documents.

A file ending in .jsonl or .json-lines (or the same with .gz) holds one JSON object a line, whose
text is under one key; any other file is one document. Plain files are read piece by piece through
an index of line offsets (8 bytes a document) that is built when they are opened. A gzip file cannot
be read in the middle, so it is kept in memory, unzipped, once per reading process.
"""

import array
import bisect
import contextlib
import glob
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from ...configs.errors import UserError

JSONL_SUFFIXES = (".jsonl", ".json-lines")
MAX_DOCUMENT_BYTES = 128 << 20  # a tokenizer needs tens of times this in memory
MAX_GZIP_BYTES = 1 << 30  # unzipped, for one file
# Documents up to this many bytes in all are decoded when a corpus is opened, so that a mistake in
# the data shows before training starts; later ones are decoded only when they are read.
CHECKED_BYTES = 64 << 20

_JSON_TYPES = {
    bool: "boolean",
    dict: "object",
    float: "number",
    int: "number",
    list: "array",
    str: "string",
    type(None): "null",
}


class RecordError(ValueError):
    """A record that cannot be a document; the message says why, not where."""


def decode_record(raw: bytes, text_key: str | None) -> str:
    """Turn one record into the text of a document.

    Args:
        raw: the bytes of a whole text file or of one JSONL line.
        text_key: the key of the text in a JSONL line; None for a text file.

    Raises:
        RecordError: the record is binary, not UTF-8, or not a JSON object with a text.
    """
    if b"\0" in raw:
        raise RecordError("holds a NUL byte: it is binary, not text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(
            f"is not UTF-8 text (byte 0x{raw[error.start]:02x} at offset {error.start})"
        ) from None
    if text_key is None:
        return text
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"is not JSON ({error.msg} at column {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"is not JSON that can be read ({error})") from None
    if not isinstance(record, dict):
        raise RecordError(f"is a JSON {_JSON_TYPES[type(record)]}, not an object like {{...}}")
    if text_key not in record:
        keys = ", ".join(map(repr, itertools.islice(record, 8))) or "none"
        raise RecordError(f"has no key {text_key!r} (its keys: {keys}); set data.text_key")
    value = record[text_key]
    if not isinstance(value, str):
        raise RecordError(f"has no string under {text_key!r} but a JSON {_JSON_TYPES[type(value)]}")
    try:
        value.encode()
    except UnicodeEncodeError:  # "\ud800" alone is legal JSON and no text
        raise RecordError(f"has half a surrogate pair under {text_key!r}") from None
    return value


def find_files(pattern: str) -> list[str]:
    """Return the files that a path or a glob (`**` goes into folders) names, sorted.

    Raises:
        UserError: there is no such file, or the path is a folder.
    """
    path = os.path.expanduser(pattern)
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


class FileDocuments(Sequence[str]):
    """The documents of some files, in the order of the files and of their lines.

    Args:
        paths: the files.
        text_key: the key of the text in the objects of JSONL files.

    Raises:
        UserError: a file cannot be read, or a record (see CHECKED_BYTES) is no document; reading a
            document later raises the same.
    """

    def __init__(self, paths: Sequence[str], text_key: str):
        self._paths = tuple(paths)
        self._text_key = text_key
        self._unzipped: dict[str, bytes] = {}
        # Per file the offset where each document starts, and behind them where the last one ends.
        self._offsets = [self._index(path) for path in self._paths]
        self._ends = list(itertools.accumulate(len(offsets) - 1 for offsets in self._offsets))
        unchecked = CHECKED_BYTES
        for index in range(len(self)):
            _, start, stop = self._locate(index)
            unchecked -= stop - start
            if unchecked < 0:
                break
            self[index]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> str:
        path, start, stop = self._locate(index)
        text_key = self._text_key if _is_jsonl(path) else None
        try:
            if stop - start > MAX_DOCUMENT_BYTES:
                raise RecordError(
                    f"is a document of {(stop - start) >> 20} MiB, more than "
                    f"{MAX_DOCUMENT_BYTES >> 20}: split it, e.g. into lines of a .jsonl file"
                )
            return decode_record(self._read(path, start, stop), text_key)
        except RecordError as error:
            # The number of the line is counted from the start of the file, only for this message.
            line = self._read(path, 0, start).count(b"\n") + 1
            where = f"{path} line {line}" if text_key else path
            raise UserError(f"{where} {error}") from None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_unzipped": {}}  # a worker process unzips for itself

    def _locate(self, index: int) -> tuple[str, int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect.bisect_right(self._ends, index)
        offsets = self._offsets[file]
        document = index - self._ends[file] + len(offsets) - 1
        return self._paths[file], offsets[document], offsets[document + 1]

    def _index(self, path: str) -> array.array:
        with _explain(path):
            if _is_jsonl(path):
                with self._open(path) as lines:
                    return _line_offsets(lines)
            size = len(self._unzip(path)) if _is_gzip(path) else os.path.getsize(path)
            return array.array("q", [0, size] if size else [0])

    def _read(self, path: str, start: int, stop: int) -> bytes:
        with _explain(path), self._open(path) as file:
            file.seek(start)
            return file.read(stop - start)

    def _open(self, path: str) -> BinaryIO:
        return io.BytesIO(self._unzip(path)) if _is_gzip(path) else open(path, "rb")

    def _unzip(self, path: str) -> bytes:
        if path not in self._unzipped:
            with gzip.open(path) as file:
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


def _line_offsets(lines: BinaryIO) -> array.array:
    offsets, offset = array.array("q"), 0
    for line in lines:
        if not line.isspace():
            offsets.append(offset)
        offset += len(line)
    offsets.append(offset)
    return offsets


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
