"""Object storage: a folder in a bucket, `gs://BUCKET/RUN`, with the methods of a path.

Through `etils.epath` and fsspec, as Orbax reaches it. There are no folders in a bucket, only names
with slashes: a folder exists while something is in it, and renaming one copies it and deletes the
old one. A file is put whole: a reader finds the old one or the new one.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import cast

from . import paths
from .errors import MachineError, UserError

# What TensorStore says, which has no exceptions of its own.
_REFUSED = re.compile(r"PERMISSION_DENIED|UNAUTHENTICATED|^Forbidden")
_FAILED = re.compile(r"UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|INTERNAL")
# Packages whose errors are of the server or the way to it.
_CLIENTS = ("gcsfs", "aiohttp", "google", "requests", "urllib3")


def anywhere(path, name: str) -> pathlib.Path:
    """The path that a user means: of this machine, or one of etils.epath in object storage.

    Args:
      path: text or a path object.
      name: of the flag, key or argument, for messages.

    Raises:
      UserError: it is no path, in no storage that is supported, or a package is missing for it.
    """
    if not isinstance(path, str | os.PathLike) or not paths.in_bucket(path):
        return paths.local(path, name)
    return at(path, name)


def at(path: str | os.PathLike, name: str = "path") -> pathlib.Path:
    """`anywhere` of what is a path already: `~` is a name like any other.

    Raises:
      UserError: as `anywhere`, for a URL.
    """
    if not paths.in_bucket(path):
        return pathlib.Path(path)
    url = "gs://" + re.sub("^gs:/+", "", os.fspath(path)).rstrip("/")
    if not re.fullmatch(r"gs://[\w.-]+(/[^/\0]+)*", url):
        raise UserError(f"{name}={url} must be like gs://BUCKET/FOLDER")
    try:
        import fsspec.config
        import gcsfs  # noqa: F401 (fsspec would import it later)
        from etils import epath
    except ImportError as error:
        raise UserError(
            f"{name}={url}: gs:// needs the package {error.name}: pip install 'puna[remote]'"
        ) from None
    # Another process, and TensorStore in this one, write behind the back of a cached listing.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    # With TensorFlow installed epath would take its file system, which nothing here is tested with.
    os.environ.setdefault("EPATH_USE_TF", "false")
    return cast(pathlib.Path, epath.Path(url))


def fault(error: BaseException | None) -> type[Exception] | None:
    """Whose fault an error of object storage is: UserError is a permission, MachineError the rest.

    Returns:
      None where nothing failed: something is missing, or the error is another one.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text, kind = str(error), type(error)
        if isinstance(error, FileNotFoundError) or "NOT_FOUND" in text:
            return None
        denied = isinstance(error, PermissionError) or getattr(error, "code", 0) in (401, 403)
        if denied or "Credential" in kind.__name__ or _REFUSED.search(text):
            return UserError
        client = kind.__module__.partition(".")[0] in _CLIENTS
        if client or isinstance(error, OSError) or _FAILED.search(text):
            return MachineError
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def explained(path: str | os.PathLike) -> Iterator[None]:
    """Turn what a client of a server raises, each its own, into one line; a disk's stay.

    Raises:
      UserError: what a URL names is not there, or may not be used.
      MachineError: the server cannot be asked.
    """
    try:
        yield
    except (UserError, MachineError):
        raise
    except Exception as error:
        if not paths.is_url(path):
            raise
        url = os.fspath(path)
        if isinstance(error, FileNotFoundError) or "NOT_FOUND" in str(error):
            raise UserError(f"{url}: no such file or bucket") from None
        if isinstance(error, PermissionError):
            raise UserError(f"{url}: no permission ({error})") from None
        if fault(error) is UserError:
            raise UserError(f"{url}: {error}") from error
        raise MachineError(f"{url}: storage failed ({type(error).__name__}: {error})") from error
