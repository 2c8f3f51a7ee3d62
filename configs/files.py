"""Writing small files whole: a reader, or a crash, finds the old one or the new one, never half."""

import contextlib
import json
import math
import os
import pathlib
import secrets
import time
from collections.abc import Mapping

from . import storage
from .paths import is_url

_STALE_SECONDS = 3600  # no small file takes that long to write


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Replace a file at once, and for good: the new content is on the disk on return.

    It gets the permissions of the file that it replaces, else those of any new file.

    Raises:
      OSError: it cannot be written; the old file is then as it was, and no part is left.
      UserError, MachineError: the same of a file in object storage.
    """
    if is_url(path):
        with storage.explained(path):
            storage.at(path).write_bytes(data)
        return
    path = pathlib.Path(os.path.realpath(path))  # a link stays one
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb") as file:
            with contextlib.suppress(OSError):
                os.fchmod(file.fileno(), os.stat(path).st_mode & 0o777)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # writing and syncing know no names
        raise
    _settle(path)


def _settle(path: pathlib.Path) -> None:
    """Make the new name last, and remove what killed writers of this file left."""
    with contextlib.suppress(OSError):  # not every file system syncs folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        for name in os.listdir(path.parent):
            if name.startswith(f".{path.name}.") and name.endswith(".part"):
                part = path.with_name(name)
                if time.time() - part.stat().st_mtime > _STALE_SECONDS:
                    part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replace a text file at once."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value) -> None:
    """Replace a JSON file at once."""
    write_text(path, to_json(value, indent=2) + "\n")


def to_json(value, indent: int | None = None) -> str:
    """Return valid JSON; numbers that JSON lacks, infinities and NaN, are null.

    One line, without an indent, is ASCII: many a reader ends lines at U+2028 too.
    """
    value = _finite(value)
    if indent is not None:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
        with contextlib.suppress(UnicodeEncodeError):  # a lone surrogate, which UTF-8 lacks
            text.encode()
            return text
    return json.dumps(value, indent=indent, allow_nan=False)


def _finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
