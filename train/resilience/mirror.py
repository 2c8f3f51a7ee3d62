"""The small files of a run in object storage: written in a local folder and put there whole.

Nothing in a bucket can be appended to, and metrics, event files and lists of bad steps grow. So
they grow here and replace what is there when a checkpoint is saved, after an evaluation, in the end
and every PUSH_SECONDS; a run that resumes, on whatever machine, fetches them first. Checkpoints do
not come by here: Orbax and TensorStore read and write them where they are.
"""

import contextlib
import os
import pathlib
import tempfile
import time

import jax

from ...configs import paths, storage
from ...configs.errors import MachineError, UserError
from ...configs.files import write_bytes
from ...models.parallel import processes
from ...models.weights import run
from .background import FILE as BACKGROUND
from .lock import FILE as LOCK

PUSH_SECONDS = 60.0
_ELSEWHERE = (run.CHECKPOINTS, run.FROZEN, LOCK)


class Mirror:
    """Where a run writes its small files, inside a `with` block.

    Of several processes each has a folder of its own, and the first puts what all have in common.

    Args:
      home: the run's folder. One of this machine is written to directly, and all else here does
        nothing.

    Raises:
      UserError, MachineError: on entering and in every method, the storage cannot be used.
    """

    def __init__(self, home: pathlib.Path):
        self.home = self.folder = home
        self.remote = paths.is_url(home)
        self._known: dict[str, tuple[int, int]] = {}  # as `_here` had it when both were the same
        self._pushed = time.monotonic()
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        if self.remote:
            made = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="puna-"))
            self.folder = pathlib.Path(made) / self.home.name  # which the plot shows
            self.folder.mkdir()
            self.pull()
        return self

    def __exit__(self, kind, error, traceback):
        with self._stack:
            if error is None:
                self.push()
                return
            with contextlib.suppress(UserError, MachineError):  # what ended the run is told
                self.push()

    def pull(self) -> None:
        """Fetch what is there."""
        if self.remote:
            with storage.explained(self.home):
                _copy(self.home, self.folder, _ELSEWHERE)
            self._known = self._here()

    def push(self, every: float = 0.0) -> None:
        """Put what has changed here, and remove there what was removed here.

        Args:
          every: seconds; nothing is done if the last time was not so long ago.
        """
        if not self.remote or time.monotonic() - self._pushed < every:
            return
        here = self._here()
        with storage.explained(self.home):
            for name, state in here.items():
                if self._known.get(name) != state:
                    write_bytes(self.home / name, (self.folder / name).read_bytes())
            for name in self._known.keys() - here.keys():
                (self.home / name).unlink(missing_ok=True)
        self._known, self._pushed = here, time.monotonic()

    def _here(self) -> dict[str, tuple[int, int]]:
        """Size and time of each file that this process puts, by its name in the run's folder."""
        found = {}
        for parent, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = pathlib.Path(parent, name)
                if not name.startswith(".") and self._is_mine(name):
                    state = path.stat()
                    place = path.relative_to(self.folder).as_posix()
                    found[place] = (state.st_size, state.st_mtime_ns)
        return found

    def _is_mine(self, name: str) -> bool:
        if name.endswith(f".{BACKGROUND}"):  # of one process, which its number begins
            return name == f"{jax.process_index()}.{BACKGROUND}"
        return processes.is_first()


def _copy(there: pathlib.Path, here: pathlib.Path, but: tuple[str, ...] = ()) -> None:
    try:
        children = [path for path in there.iterdir() if path.name and path.name not in but]
    except FileNotFoundError:  # nothing has this prefix
        return
    for path in children:
        if path.is_dir():
            (here / path.name).mkdir(exist_ok=True)
            _copy(path, here / path.name)
        elif path != there:  # the mark that some clients leave of a folder
            write_bytes(here / path.name, path.read_bytes())
