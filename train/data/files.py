"""Data files as a random-access sequence of records, whatever their format and wherever they are.

What a file holds is told from its bytes (see `formats`). A text file, and JSON lines that are not
compressed, are read where they are, piece by piece; any other file is rewritten once as JSON lines,
or as one text, in a cache on disk that also keeps where each record starts (see `store`). So a
process holds a few numbers a file and one record at a time, and a later start reads no more than
samples of each file. A file that changes is refused from then on: no place in it would hold.
"""

import array
import bisect
import contextlib
import dataclasses
import functools
import glob
import itertools
import json
import os
import pathlib
import stat
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from ...configs.errors import UserError
from . import formats, remote, store
from .examples import Record, RecordError, json_type
from .formats import compression
from .quarantine import SHOWN_CHARACTERS, BadRecord

_TOLD_BYTES = 256 << 20  # a file of this size or more is told of before it is indexed or unpacked


def decode_record(raw: bytes, format: formats.Format) -> Record:
    """Read one record: the bytes of a whole text file, or of one line of JSON.

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
    if format == formats.TEXT:
        return text
    try:
        record = json.loads(text.rstrip())  # blank lines behind it may hold more than JSON's space
    except json.JSONDecodeError as error:
        raise RecordError(f"is not JSON ({error.msg} at column {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"is not JSON that can be read ({error})") from None
    if not isinstance(record, dict):
        raise RecordError(format.not_object.format(json_type(record)))
    return record


def find_files(pattern: str) -> list[str]:
    """Return the files that a path, a URL or a glob (`**` goes into folders) names, sorted.

    Raises:
        UserError: there is no such file, or the path is a folder.
        MachineError: a server cannot be asked.
    """
    if remote.is_remote(pattern):
        return remote.find(pattern)
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


_no_numbers = functools.partial(array.array, "q")


@dataclasses.dataclass(frozen=True)
class _File:
    """One data file, and of which state of it that is true.

    state: bytes, and nanoseconds of the last change, or what a server tells of its version.
    fingerprint: of its bytes, if what is known of it is in the cache, and it is on this machine.
    offsets, blanks: see `store.Entry`, which has them if this has not.
    """

    path: str
    state: tuple[int, int | str]
    format: formats.Format = formats.TEXT
    records: int = 0
    fingerprint: str = ""
    entry: store.Entry | None = None
    offsets: array.array = dataclasses.field(default_factory=_no_numbers)
    blanks: array.array = dataclasses.field(default_factory=_no_numbers)


class FileRecords(Sequence[Record]):
    """The records of some files, in the order of the files and of their records.

    Args:
        paths: the files; paths and URLs.
        max_bytes: what a record may have; a longer one is not read into memory.

    Raises:
        UserError: a file cannot be read, or when a record of it is read, has changed.
        BadRecord: a record is malformed, when it is read.
    """

    def __init__(self, paths: Sequence[str], max_bytes: int):
        self._max_bytes = max_bytes
        self._files = [_open(path) for path in paths]
        # How many records there are up to the end of each file.
        self._ends = list(itertools.accumulate(file.records for file in self._files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file, record = self._find(index)
        start, stop, raw = _read(file, record, self._max_bytes)
        try:
            if stop - start > self._max_bytes:
                raise RecordError(
                    f"is a document of {stop - start:,} bytes, more than data.max_document_bytes="
                    f"{self._max_bytes}: split it, e.g. into lines of a .jsonl file"
                )
            return decode_record(raw, file.format)
        except RecordError as error:
            raise self.bad(index, str(error)) from None

    def folder(self, index: int) -> str:
        """The folder of the file that holds a record."""
        return os.path.dirname(self._find(index)[0].path)

    def bad(self, index: int, reason: str) -> BadRecord:
        """The error for a record that is not a document; it says where the record is."""
        file, record = self._find(index)
        blanks = file.entry.blanks() if file.entry else file.blanks
        number = record + 1 + bisect.bisect_right(blanks, record)
        where = f"{file.path} {file.format.record} {number}" if file.format.record else file.path
        # A character has up to 4 bytes.
        start, _, beginning = _read(file, record, 4 * SHOWN_CHARACTERS)
        offset = None if file.format.lines else start
        return BadRecord(where, reason, file.path, number, offset, beginning)

    def _find(self, index: int) -> tuple[_File, int]:
        """The file of a record, and its number there."""
        number = bisect.bisect_right(self._ends, index)
        file = self._files[number]
        return file, index - self._ends[number] + file.records


def _open(path: str) -> _File:
    """Find out what a file holds and where; from the cache, if it is known there."""
    if remote.is_remote(path):
        return _in_cache(_File(path, remote.state(path)))
    with _explain(path):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its writer
            raise UserError(
                f"{path} is not a regular file, which random access needs: copy it to one"
            )
        size, state = status.st_size, (status.st_size, status.st_mtime_ns)
        with _open_same(path, state) as opened:
            head = opened.read(formats.HEAD_BYTES)
            if not compression.kind(head):
                format = formats.detect(head, path)
                if format == formats.TEXT:
                    offsets = array.array("q", [0, size] if size else [0])
                    return _File(path, state, format, len(offsets) - 1, offsets=offsets)
                if format == formats.JSON_LINES and size <= len(head):
                    offsets, blanks = array.array("q"), array.array("q")
                    opened.seek(0)
                    store.find_lines(opened, offsets, blanks)
                    return _File(
                        path, state, format, len(offsets) - 1, offsets=offsets, blanks=blanks
                    )
            fingerprint = store.fingerprint(opened, size)
    return _in_cache(_File(path, state, fingerprint=fingerprint))


def _in_cache(file: _File) -> _File:
    """The same with what the cache knows of it; that is found out now if it is nothing."""
    path = file.path if remote.is_remote(file.path) else os.path.abspath(file.path)
    key = {"path": path, "state": list(file.state), "fingerprint": file.fingerprint}
    entry = store.find_or_make(key, functools.partial(_make_entry, file))
    format = next(f for f in formats.READ if f.name == entry.about["format"])
    return dataclasses.replace(file, format=format, records=entry.records, entry=entry)


def _make_entry(file: _File, maker: store.Maker) -> dict:
    if file.state[0] >= _TOLD_BYTES:
        print(
            f"puna: reading all of {file.path} ({file.state[0] / 1e9:.1f} GB) this once; what is "
            f"found is kept in {store.cache_folder()}",
            file=sys.stderr,
        )
    if remote.is_remote(file.path):
        with remote.opened(file.path) as opened:
            return _unpack(file.path, opened, maker, in_place=False)
    with _explain(file.path), _open_same(file.path, file.state) as opened:
        return _unpack(file.path, opened, maker, in_place=True)


def _unpack(path: str, opened: BinaryIO, maker: store.Maker, in_place: bool) -> dict:
    """Make an entry.

    Args:
        path: of the file, for messages.
        opened: the file.
        maker: of the entry.
        in_place: the file itself is read at random later if it is JSON lines as it stands.
    """
    while kind := compression.kind(head := opened.read(formats.HEAD_BYTES)):
        in_place = False
        opened = compression.unpacked(_again(head, opened), kind, path)
    format = formats.detect(head, path)
    opened = _again(head, opened)
    data = maker.folder / "data"
    if format.lines:
        if format.seeks and not opened.seekable():
            opened = _copy(path, opened, maker.folder / "unpacked")
        _write_lines(path, format, opened, maker)
        (maker.folder / "unpacked").unlink(missing_ok=True)
    elif format == formats.JSON_LINES:
        lines = opened if in_place else _copy(path, opened, data)
        store.find_lines(lines, maker.offsets, maker.blanks)
    else:
        size = _copy(path, opened, data).seek(0, os.SEEK_END)
        for offset in (0, size) if size else (0,):
            maker.offsets.append(offset)
    return {"format": format.name, "copied": data.exists()}


def _write_lines(path: str, format: formats.Format, opened: BinaryIO, maker: store.Maker) -> None:
    """Rewrite a file as JSON lines."""
    assert format.lines
    place = 0
    with store.written(path):
        data = open(maker.folder / "data", "wb", buffering=1 << 20)
    with data:
        try:
            for line in format.lines(opened):
                maker.offsets.append(place)
                with store.written(path):
                    place += data.write(line + b"\n")
            maker.offsets.append(place)
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"{path} is not a sound {format.name} file ({error})") from None
        with store.written(path):
            data.flush()


def _again(head: bytes, file: BinaryIO) -> BinaryIO:
    """A file from its start, of which the head is read."""
    if file.seekable():
        file.seek(0)
        return file
    return compression.stream(itertools.chain([head], iter(lambda: file.read(1 << 20), b"")))


def _copy(path: str, file: BinaryIO, place: pathlib.Path) -> BinaryIO:
    """Copy a stream into the cache, and open the copy."""
    with store.written(path):
        copy = open(place, "w+b", buffering=0)
    while piece := file.read(1 << 20):
        with store.written(path):
            copy.write(piece)
    copy.seek(0)
    return open(place, "rb")


def _read(file: _File, record: int, most: int) -> tuple[int, int, bytes]:
    """Where a record starts and stops, and its first bytes, `most` at most."""
    if file.entry is None:
        start, stop = file.offsets[record], file.offsets[record + 1]
    else:
        try:
            start, stop = file.entry.span(record)
        except FileNotFoundError:  # the cache was emptied
            _in_cache(file)
            start, stop = file.entry.span(record)
    size = min(stop - start, most)
    if file.entry is None or not file.entry.about["copied"]:
        with _explain(file.path), _open_same(file.path, file.state) as opened:
            return start, stop, os.pread(opened.fileno(), size, start)
    if not remote.is_remote(file.path):
        with _explain(file.path):
            _check_same(file.path, os.stat(file.path), file.state)
    with open(file.entry.folder / "data", "rb", buffering=0) as data:
        return start, stop, os.pread(data.fileno(), size, start)


def _open_same(path: str, state: tuple[int, int | str]) -> BinaryIO:
    """Open a file that is still as it was when it was indexed."""
    file = open(path, "rb")
    try:
        _check_same(path, os.fstat(file.fileno()), state)
    except UserError:
        file.close()
        raise
    return file


def _check_same(path: str, status: os.stat_result, state: tuple[int, int | str]) -> None:
    if (status.st_size, status.st_mtime_ns) != state:
        raise UserError(
            f"{path} has changed since it was opened: data must stay as it is while it is read; "
            "start again, and write new data to new files"
        )


@contextlib.contextmanager
def _explain(path: str) -> Iterator[None]:
    """Turn what can go wrong while a file is read into one line that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
