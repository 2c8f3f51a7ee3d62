"""Data files elsewhere: `gs://`, `s3://`, `hf://`, `https://` and what else fsspec knows.

A file is copied to the cache when it is first read (see `store`) and read there ever after, as long
as the server tells the same size and version of it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from ...configs.errors import UserError
from ...configs.storage import explained
from .formats import compression

# By which servers tell that a file is another one now.
_VERSIONS = (
    *("ETag", "etag", "generation", "md5Hash", "content_md5", "crc32c", "blob_id", "sha256"),
    *("mtime", "updated", "LastModified", "last_modified", "created"),
)


def is_remote(path: str) -> bool:
    """Whether a path names something that fsspec opens."""
    return "://" in path


def find(pattern: str) -> list[str]:
    """The files that a URL or a glob of one names, sorted; paths if they are on this machine.

    Raises:
      UserError: there is none, its scheme is not known, or a package is missing that reads it.
      MachineError: the server cannot be asked.
    """
    with explained(pattern):
        system, path = _system(pattern)
        # In http://host/a?b=c the question mark is no pattern.
        if "*" in path or (not path.startswith("http") and any(c in path for c in "?[")):
            found = [name for name, info in system.glob(path, detail=True).items()
                     if info["type"] == "file"]  # fmt: skip
        elif system.info(path)["type"] == "directory":
            raise UserError(f"{pattern} is a folder: name its files, e.g. {pattern}/**/*.jsonl")
        else:
            found = [path]
    if not found:
        raise UserError(f"{pattern}: no such file")
    if "file" in _protocols(system):
        return sorted(found)
    return sorted(system.unstrip_protocol(name) for name in found)


def state(url: str) -> tuple[int, str]:
    """The size of a file in bytes, and what tells this version of it from another.

    Raises:
      UserError, MachineError: it is not there, or cannot be asked for.
    """
    with explained(url):
        system, path = _system(url)
        info = system.info(path)
        versions = {name: str(info[name]) for name in _VERSIONS if info.get(name) is not None}
        return int(info["size"] or 0), str(versions)


@contextlib.contextmanager
def opened(url: str) -> Iterator[BinaryIO]:
    """A file, as a stream: not every server gives parts of one.

    Raises:
      UserError, MachineError: it is not there, or cannot be read.
    """
    with explained(url):
        system, path = _system(url)
        with system.open(path, "rb") as file:
            yield compression.stream(iter(lambda: file.read(1 << 20), b""))


def _system(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise UserError(f"{url}: URLs need fsspec: pip install 'puna[remote]'") from None
    try:
        scheme, rest = url.split("://", 1)
        return fsspec.core.url_to_fs(f"{scheme.lower()}://{rest}")
    except ImportError as error:  # names the package of this scheme
        raise UserError(f"{url}: {error} (puna[remote] has those of gs:// and s3://)") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None


def _protocols(system) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)
