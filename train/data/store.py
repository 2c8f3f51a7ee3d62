"""What is found out about data files once and kept on disk: where records are, what was unpacked.

An entry is a folder in `$XDG_CACHE_HOME/puna/data` (`~/.cache/puna/data`), named after what it was
made from: the file's path, size, time of change and a fingerprint of its bytes. It holds
`offsets` (int64, where each record starts and where the last one ends), `blanks` (int64, of each
blank line, how many records stand before it), `data` where the file itself cannot be read at
random, and `entry.json` with the sizes and checksums of those. It is made in a folder of its own
and renamed when it is whole, so processes that make one at the same time do no harm; one that is
damaged is made again. The cache may be deleted at any time. Entries that no run opened for a month
are removed when another is made.
"""

import array
import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol

from ...configs.errors import UserError
from ...configs.files import write_json

VERSION = 2  # of what an entry holds: raise it where a file would now be read differently
_KEPT_SECONDS = 30 * 24 * 3600.0
_FLUSHED = 1 << 16  # numbers that are in memory before they are written
_PIECE_BYTES = 1 << 20  # of a line or a file that are in memory at one time
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 12


class Numbers(Protocol):
    """What takes the places of records, as an array does."""

    def append(self, number: int, /) -> None: ...

    def __len__(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Entry:
    """A whole entry of the cache.

    about: what its maker returned, as JSON has it. records: how many there are.
    """

    folder: pathlib.Path
    about: dict[str, Any]
    records: int

    def span(self, record: int) -> tuple[int, int]:
        """Where a record starts and stops, in bytes."""
        with open(self.folder / "offsets", "rb", buffering=0) as file:
            start, stop = array.array("q", os.pread(file.fileno(), 16, 8 * record))
        return start, stop

    def blanks(self) -> array.array:
        """Of each blank line, how many records stand before it."""
        return array.array("q", (self.folder / "blanks").read_bytes())


class Maker:
    """What an entry is made with: its files, written in a folder that no other process sees."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.offsets, self.blanks = (_NumberFile(folder / name) for name in ("offsets", "blanks"))

    def finish(self, key: dict, about: dict) -> None:
        """Write what the entry is, the last of its files."""
        meta = {
            "key": key,
            "about": about,
            "records": max(len(self.offsets) - 1, 0),
            "crc": [self.offsets.close(), self.blanks.close()],
            "data": _data_state(self.folder),
        }
        write_json(self.folder / "entry.json", meta)
        # After a power cut, the checksums tell what of the rest did not reach the disk.
        if meta["data"]:
            with open(self.folder / "data", "rb") as file:
                os.fsync(file.fileno())


def cache_folder() -> pathlib.Path:
    """Where entries are."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(cache) / "puna" / "data"


def find_or_make(key: dict, make: Callable[[Maker], dict]) -> Entry:
    """The entry of a file, made if there is none that is sound.

    Args:
      key: JSON values, equal for equal contents of one file.
      make: writes offsets, blanks and data, and returns what `Entry.about` is to hold.

    Raises:
      UserError: the cache cannot be written; what `make` raises.
    """
    key = {**key, "version": VERSION}
    name = hashlib.blake2b(json.dumps(key).encode(), digest_size=20).hexdigest()
    root = cache_folder()
    if entry := _open(root / name, key):
        return entry
    with _written(root):
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
    with _alone(root / f"{name}.lock"):
        if entry := _open(root / name, key):  # another process has made it meanwhile
            return entry
        with _written(root):
            new = pathlib.Path(tempfile.mkdtemp(prefix=f"{name}.", dir=root))
        try:
            with _written(root):
                maker = Maker(new)
            about = make(maker)
            with _written(root):
                maker.finish(key, about)
                # Where locks do not work, another process may have put the same there.
                if not _open(root / name, key):
                    _put(new, root / name)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    entry = _open(root / name, key)
    if entry is None:
        raise UserError(f"{root / name} is damaged as soon as it is written: check this disk")
    return entry


@contextlib.contextmanager
def written(path: str) -> Iterator[None]:
    """Turn what the disk of the cache says into one line; `path` is what is unpacked there."""
    with _written(cache_folder(), f"what is unpacked of {path}"):
        yield


def find_lines(lines: BinaryIO, offsets: Numbers, blanks: Numbers) -> None:
    """Find where the lines that are not blank start, and where the last one ends.

    Args:
      lines: of a file from its start.
      offsets, blanks: take the numbers that an entry has under these names.
    """
    start = offset = 0
    blank = True
    # In pieces, since a line may be longer than the memory.
    for piece in iter(functools.partial(lines.readline, _PIECE_BYTES), b""):
        if blank and not piece.isspace():
            offsets.append(start)
            blank = False
        offset += len(piece)
        if piece.endswith(b"\n"):
            if blank:
                blanks.append(len(offsets))
            start, blank = offset, True
    offsets.append(offset)


def fingerprint(file: BinaryIO, size: int) -> str:
    """A hash of samples of a file, its first and last bytes among them."""
    digest = hashlib.blake2b(digest_size=16)
    for i in range(_SAMPLES):
        file.seek(max(size - _SAMPLE_BYTES, 0) * i // (_SAMPLES - 1))
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class _NumberFile:
    """int64 numbers, written as they come, and their checksum."""

    def __init__(self, path: pathlib.Path):
        self._file = open(path, "wb", buffering=0)
        self._pending = array.array("q")
        self._written = self._crc = 0

    def __len__(self) -> int:
        return self._written + len(self._pending)

    def append(self, number: int, /) -> None:
        self._pending.append(number)
        if len(self._pending) >= _FLUSHED:
            self._flush()

    def _flush(self) -> None:
        with written("data files"):
            self._file.write(self._pending.tobytes())
        self._crc = zlib.crc32(self._pending, self._crc)
        self._written += len(self._pending)
        del self._pending[:]

    def close(self) -> int:
        """The checksum of all numbers."""
        self._flush()
        self._file.close()
        return self._crc


def _open(folder: pathlib.Path, key: dict) -> Entry | None:
    """The entry in a folder, if there is a sound one."""
    try:
        meta = json.loads((folder / "entry.json").read_bytes())
        sums = [_crc(folder / name) for name in ("offsets", "blanks")]
        if meta["key"] != key or sums != meta["crc"] or _data_state(folder) != meta["data"]:
            return None
        os.utime(folder)  # it is in use
        return Entry(folder, meta["about"], meta["records"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _crc(path: pathlib.Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE_BYTES):
            crc = zlib.crc32(piece, crc)
    return crc


def _data_state(folder: pathlib.Path) -> list | None:
    """The size and fingerprint of an entry's data; None if the file itself is read."""
    try:
        with open(folder / "data", "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return [size, fingerprint(file, size)]
    except FileNotFoundError:
        return None


def _put(new: pathlib.Path, place: pathlib.Path) -> None:
    """Rename a whole entry to its place; one that is damaged makes room."""
    if place.exists():
        old = tempfile.mkdtemp(prefix=f"{place.name}.", dir=place.parent)
        os.rename(place, os.path.join(old, "damaged"))
        shutil.rmtree(old, ignore_errors=True)
    try:
        os.rename(new, place)
    except OSError as error:  # it came there just now
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """Hold a lock: of processes that need one entry, one makes it and the others wait."""
    with _written(path.parent):
        file = open(path, "ab")
    with file:
        # Without locks, as on some network disks, each makes it, and one is kept.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _written(root: pathlib.Path, what: str = "what is known of data files") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{root}: {error.strerror or error}; it holds {what}: set XDG_CACHE_HOME to a folder "
            "that can be written, on a disk with room"
        ) from error


def _sweep(root: pathlib.Path) -> None:
    """Remove what has not been opened for long: entries, locks, and what a killed process left."""
    oldest = time.time() - _KEPT_SECONDS
    for path in root.iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
