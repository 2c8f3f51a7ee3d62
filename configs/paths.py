"""Paths that a user gives: `~` is a home folder, and what is no path of this machine is refused."""

import os
import pathlib
import re

from .errors import UserError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/+")  # of two letters at least: C:/ is a disk
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_url(path: str | os.PathLike) -> bool:
    """Whether this names something in an object store or on a server (`gs://bucket/run`)."""
    return bool(_URL.match(os.fspath(path)))  # one slash is what pathlib leaves of two


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether this names something in the object storage that runs may lie in."""
    return os.fspath(path).startswith("gs:/")


def absolute(path: pathlib.Path) -> pathlib.Path:
    """`Path.absolute`, which for a path of a bucket would be one in the current folder."""
    return path if is_url(path) else path.absolute()


def local(path, name: str) -> pathlib.Path:
    """The path of this machine that a user means, `~` and `~user` expanded.

    Args:
      path: text or a path object.
      name: of the flag, key or argument, for messages.

    Raises:
      UserError: it is no path, the URL of something elsewhere, or of a user that is not there.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise UserError(f"{name}: a path is text, not {type(path).__name__}")
    text = os.fspath(path)
    if not text or "\0" in text:
        raise UserError(f"{name}={text!r} must name a file or folder")
    if is_url(text):
        scheme = text.partition(":")[0]
        raise UserError(
            f"{name}={text}: {scheme}:// is not supported here yet; give a path of this machine"
            f"{_fix(text)}"
        )
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UserError(
            f"{name}={text}: there is no home folder {text.partition('/')[0]}; write ./{text} for "
            "a path of this name"
        )
    return pathlib.Path(expanded)


def real(text: str) -> str:
    """A path that is the same however the file or folder is spelt; a pattern may be given too.

    `~` is expanded, links are followed, and what is relative is so to the current folder.
    """
    return text if is_url(text) else os.path.realpath(os.path.expanduser(text))


def missing(path: pathlib.Path) -> UserError:
    """The error that nothing is at a path, with what to do if it names a model of a hub."""
    text = str(path)
    fix = ""
    if _HUB_ID.fullmatch(text) and not path.parent.exists():
        fix = f"; is it a model of the Hugging Face Hub? {_download(text)}"
    return UserError(f"{path}: no such file or directory{fix}")


def _fix(url: str) -> str:
    found = re.match(r"(?:hf:/+|https?:/+(?:huggingface\.co|hf\.co)/)([\w.-]+/[\w.-]+)", url)
    return f". {_download(found[1])}" if found else ""


def _download(name: str) -> str:
    folder = name.partition("/")[2]
    return f"Download it first: `hf download {name} --local-dir {folder}`, then give {folder}"
