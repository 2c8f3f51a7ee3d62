"""One run at a time in a folder: a lock that a killed run does not leave behind.

The file `run.lock` says who holds it: the host, the process, when that process started, and a beat
that a thread of it renews. Network disks differ in what flock means, so this asks of them only that
one of several can create a file. A lock is stale where its process has ended, if that ran on this
machine; else where its beat stands still while a newcomer watches it. A stale one is removed under
a lock of its own, named after its content: without that, a newcomer that was slow could remove the
new lock of a faster one. In object storage (`BucketLock`) every object has a generation, and what
writes or removes it can ask for the one that was read.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import pathlib
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import tensorstore

from ...configs import paths, storage
from ...configs.errors import MachineError, UserError
from ...models.parallel import processes

FILE = "run.lock"
BEAT_SECONDS = 10.0
# A newcomer from another machine waits so long for a beat.
PATIENCE_SECONDS = 60.0


@contextlib.contextmanager
def only_run(folder: pathlib.Path) -> Iterator["Lock | None"]:
    """Hold the lock of a folder; all processes of a run call this together, and are one run.

    Yields:
      The lock, in the first process.

    Raises:
      UserError: another run is in it; it says which.
    """
    with contextlib.ExitStack() as stack:
        lock, refused = None, None
        if processes.is_first():
            kind = BucketLock if paths.is_url(folder) else Lock
            try:
                lock = stack.enter_context(kind(folder / FILE))
            except UserError as error:
                refused = str(error)
        processes.wait("lock")
        if refused := processes.gather(refused)[0]:
            raise UserError(refused)
        yield lock


class Lock:
    """A lock, held inside a `with` block.

    Args:
      path: the file; its folder exists.
      beat, patience: see the constants.

    Raises:
      UserError: on entering, another run holds it; it says which.
    """

    def __init__(
        self,
        path: pathlib.Path,
        beat: float = BEAT_SECONDS,
        patience: float = PATIENCE_SECONDS,
    ):
        self._path, self._beat, self._patience = path, beat, patience
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "place": _place(),
            "started": _started(os.getpid()),
            "token": secrets.token_hex(8),
        }
        self._file = -1
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self):
        while not self._create():
            content = self._read()
            if content is None:
                continue
            holder = _holder(content)
            alive = _alive(holder)
            if alive is None:
                alive = self._moves(content)
            if not alive:
                self._remove(content)
            elif holder:
                raise UserError(
                    f"{self._path.parent} is in use by {_name(holder)}; end that run, or take "
                    "another folder"
                )
        self._beating.start()
        return self

    def check(self) -> None:
        """Make sure, before something is written, that the lock is still held.

        Raises:
          UserError: it is another run's, which took this one for dead.
        """
        while (content := self._read()) is None:
            self._create()  # someone has tidied up
        if not self._is_mine(content):
            raise UserError(
                f"{self._path.parent} is now in use by {_name(_holder(content))}, which took this "
                "run for dead; this one ends and saves nothing more"
            )

    def __exit__(self, kind, error, traceback):
        self._ended.set()
        self._beating.join()
        self._release()

    def _release(self) -> None:
        """Give the lock back, if it is still ours."""
        with contextlib.suppress(OSError):
            if self._is_mine(self._read()):
                self._path.unlink()
        os.close(self._file)

    def _create(self) -> bool:
        """Take the lock if nobody has it."""
        try:
            file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        if self._file < 0:
            self._file = file
        else:  # under the same number, which the thread may be writing to
            os.dup2(file, self._file)
            os.close(file)
        self._write(0)
        return True

    def _is_mine(self, content: bytes | None) -> bool:
        return _holder(content or b"").get("token") == self._me["token"]

    def _content(self, beat: int) -> bytes:
        return json.dumps(self._me | {"beat": f"{beat:012}"}).encode()

    def _write(self, beat: int) -> None:
        # In place: a lock that another run has renamed away does not come back.
        os.pwrite(self._file, self._content(beat), 0)
        os.fsync(self._file)

    def _renew(self) -> None:
        beat = 0
        while not self._ended.wait(self._beat):
            beat += 1
            # What is away may come back.
            with contextlib.suppress(OSError, UserError, MachineError):
                self._write(beat)

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ESTALE:  # of a network disk: replaced while we read
                return None
            raise

    def _moves(self, content: bytes) -> bool:
        """Whether the lock changes while we watch it."""
        began, told = time.monotonic(), False
        while (waited := time.monotonic() - began) < self._patience:
            if waited > 1 and not told:
                told = True
                print(
                    f"puna: {self._path} is held by {_name(_holder(content))}; seeing whether that "
                    f"is alive takes up to {self._patience:g} s", file=sys.stderr, flush=True,
                )  # fmt: skip
            time.sleep(0.05)
            if self._read() != content:
                return True
        return False

    def _remove(self, stale: bytes) -> None:
        """Remove a stale lock; of several newcomers one does."""
        # With its name, or an empty lock on an empty lock would be itself.
        digest = hashlib.sha256(self._path.name.encode() + stale).hexdigest()[:16]
        try:
            with Lock(self._path.with_name(f".{FILE}.{digest}"), self._beat, self._patience):
                if self._read() == stale:
                    self._path.unlink()
        except UserError:
            time.sleep(0.05)  # another is at it


class BucketLock(Lock):
    """The same in object storage: what has changed since it was read is not written or removed.

    Raises:
      UserError, MachineError: on entering and in `check` also where the storage cannot be used.
    """

    def __init__(
        self,
        path: pathlib.Path,
        beat: float = BEAT_SECONDS,
        patience: float = PATIENCE_SECONDS,
    ):
        super().__init__(path, beat, patience)
        self._generation = b""  # of the object as this process has written it

    @functools.cached_property
    def _store(self) -> tensorstore.KvStore:
        return tensorstore.KvStore.open(f"{self._path.parent}/").result()

    def _ask(self) -> tensorstore.KvStore.ReadResult:
        with storage.explained(self._path):
            return self._store.read(self._path.name).result()

    def _put(self, content: bytes | None, generation: bytes) -> bytes:
        """Replace or remove the object if it is of a generation; returns the new one, or none."""
        with storage.explained(self._path):
            stamp = self._store.write(self._path.name, content, if_equal=generation).result()
        return stamp.generation

    def _create(self) -> bool:
        found = self._ask()  # even of what is not there it says a generation
        if found.state == "value":
            return False
        self._generation = self._put(self._content(0), found.stamp.generation)
        return bool(self._generation)

    def _write(self, beat: int) -> None:
        if generation := self._put(self._content(beat), self._generation):
            self._generation = generation
        elif self._is_mine((found := self._ask()).value):  # written, and the answer was lost
            self._generation = found.stamp.generation

    def _read(self) -> bytes | None:
        found = self._ask()
        return found.value if found.state == "value" else None

    def _remove(self, stale: bytes) -> None:
        found = self._ask()
        if found.state == "value" and found.value == stale:
            self._put(None, found.stamp.generation)

    def _release(self) -> None:
        with contextlib.suppress(UserError, MachineError):
            found = self._ask()
            if self._is_mine(found.value):
                self._put(None, found.stamp.generation)


def _holder(content: bytes) -> dict:
    """What a lock says; {} where it was cut short."""
    try:
        found = json.loads(content)
        return found if isinstance(found, dict) else {}
    except ValueError:
        return {}


def _name(holder: dict) -> str:
    if "token" not in holder:
        return "a process that did not say its name"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"


def _alive(holder: dict) -> bool | None:
    """Whether the process that holds a lock lives; None where that cannot be seen from here."""
    if holder.get("place") != _place():
        return None
    started = _started(holder["pid"])
    return None if started is None else started == holder["started"]


def _place() -> str:
    """Where process numbers mean the same: a host, its start, and its namespace of processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
        parts += [os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process started, on whatever clock; "" if there is none, None if we cannot know.

    Process numbers are used again, a number with a start is not.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass  # another user's, whose start we may see or not
    try:
        if pathlib.Path("/proc/self/stat").exists():
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            state, started = fields[0], fields[19]
        else:
            command = ["ps", "-o", "state=,lstart=", "-p", str(pid)]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            state, _, started = text.strip().partition(" ")
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
    # A killed process stays as a zombie until its parent has asked for its status.
    return "" if state[0] in "ZX" else started
