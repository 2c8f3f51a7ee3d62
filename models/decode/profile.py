"""What a user has told about themselves: a text file that `puna chat` puts into the context.

It is read and written here alone, and goes nowhere but into the prompts of a model on this machine.
"""

import os
import pathlib

from ...configs import files, paths
from ...configs.errors import UserError

# Bytes; all of it is read again with every message.
_MOST = 16 << 10


class Profile:
    """The file, which need not be there yet; another program may change it between two messages."""

    def __init__(self, path: str):
        """Open it.

        Raises:
          UserError: it cannot be read, see `text`.
        """
        self.path: pathlib.Path = paths.local(path, "profile")
        self.text()

    def text(self) -> str:
        """What it says now, "" where it is not there.

        Raises:
          UserError: it is no text file of at most 16 KiB.
        """
        try:
            with self.path.open("rb") as file:
                data = file.read(_MOST + 1)
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise UserError(f"profile={self.path} cannot be read: {error.strerror}") from None
        if len(data) > _MOST:
            raise UserError(f"profile={self.path} must be at most {_MOST} bytes: shorten it")
        try:
            return data.decode().strip()
        except UnicodeDecodeError:
            raise UserError(f"profile={self.path} must be text in UTF-8") from None

    def add(self, line: str) -> None:
        """Add a line.

        Raises:
          UserError: there is no room, or it cannot be written.
        """
        text = f"{self.text()}\n{line}".strip() + "\n"
        if len(text.encode()) > _MOST:
            raise UserError(f"profile={self.path} must be at most {_MOST} bytes: shorten it")
        self._write(text)

    def clear(self) -> None:
        """Leave an empty file.

        Raises:
          UserError: it cannot be written.
        """
        self._write("")

    def _write(self, text):
        try:
            files.write_text(self.path, text)
            os.chmod(self.path, 0o600)  # others on the machine need not know
        except OSError as error:
            raise UserError(f"profile={self.path} cannot be written: {error.strerror}") from None
