"""The one thread that runs the engine: jobs wait in line, get a slot, and are told each token."""

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ....configs.errors import UserError
from ..grammar import Constraint
from ..sampling import Sampling
from ..slots import Engine, Full, Token

_TOO_COMPLEX = UserError("the format that is asked for is too complex to be followed")


class Busy(Exception):
    """As many jobs wait as may."""


@dataclasses.dataclass(eq=False)
class Job:
    """One text to write.

    deliver: called in the worker's thread with each `Token`, or with the exception that ended the
      job or the worker. The rest as in `Engine.insert`.
    """

    prompt_ids: Sequence[int]
    sampling: Sampling
    max_tokens: int
    deliver: Callable[[Token | BaseException], None]
    stop: Sequence[str] = ()
    number: int = 0
    top: int = 0
    constraint: Constraint | None = None
    adapter: str = ""
    tiles: Sequence | np.ndarray | None = None
    clips: Sequence[np.ndarray] = ()
    cancelled: bool = False


class Worker(threading.Thread):
    """Runs an engine until `stop`; all methods may be called from any thread.

    Attributes:
      error: what has ended it, None while it works.
    """

    def __init__(self, engine: Engine, max_waiting: int = 64, mesh=None,
                 on_failure: Callable[[], None] = lambda: None):  # fmt: skip
        """Prepare; `start` begins. In a `with` block it runs until the end of that.

        Args:
          max_waiting: jobs that may wait for a slot.
          mesh: that of the engine, set in this thread.
          on_failure: called if the engine fails.
        """
        super().__init__(name="puna-engine", daemon=True)
        self.engine, self.max_waiting, self.on_failure = engine, max_waiting, on_failure
        self.error: BaseException | None = None
        self._mesh, self._stopping = mesh, False
        self._waiting: collections.deque[Job] = collections.deque()
        self._held: dict[int, Job] = {}
        self._changed = threading.Condition()

    def __enter__(self) -> "Worker":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()
        self.join()

    @property
    def most_jobs(self) -> int:
        """How many can be submitted at once when nothing else is there."""
        return self.engine.num_slots + self.max_waiting

    @property
    def counts(self) -> tuple[int, int]:
        """Jobs that have a slot, and jobs that wait for one."""
        return len(self._held), len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put jobs in line, all or none.

        Raises:
          Busy: there is no room for all of them.
          RuntimeError: the worker has ended.
        """
        with self._changed:
            if self._stopping or self.error is not None:
                raise RuntimeError("the engine has stopped") from self.error
            if sum(self.counts) + len(jobs) > self.most_jobs:
                raise Busy
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs that nobody wants any more; they are told nothing from here on."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
                with contextlib.suppress(ValueError):
                    self._waiting.remove(job)
            self._changed.notify()

    def stop(self) -> None:
        """End after the current step; jobs that are left are told."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def run(self) -> None:
        """The thread's work."""
        try:
            with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
                while self._next():
                    for slot, token in self.engine.step():
                        job = self._held[slot]
                        if token.finish_reason:
                            del self._held[slot]
                        self._tell(job, _TOO_COMPLEX if token.finish_reason == "error" else token)
        except BaseException as error:
            self._end(error)
            self.on_failure()
        else:
            self._end(RuntimeError("the server is stopping"), failed=False)

    def _next(self) -> bool:
        """Wait for work, then free and fill slots; False when it is time to end."""
        with self._changed:
            while not (self._stopping or self._waiting or self._held):
                self._changed.wait()
            if self._stopping:
                return False
            for slot, job in list(self._held.items()):
                if job.cancelled:
                    self.engine.evict(slot)
                    del self._held[slot]
            while self._waiting and self.engine.free:
                job = self._waiting.popleft()
                try:
                    slot = self.engine.insert(
                        job.prompt_ids, job.sampling, job.max_tokens, job.stop, job.number,
                        job.top, job.constraint, job.adapter, job.tiles, job.clips,
                    )  # fmt: skip
                    self._held[slot] = job
                except Full:  # of tokens; who comes later does not overtake
                    self._waiting.appendleft(job)
                    break
                except UserError as error:
                    self._tell(job, error)
            return True

    def _end(self, error, failed=True):
        with self._changed:
            self.error = error if failed else None
            self._stopping = True
            left = [*self._held.values(), *self._waiting]
            self._held.clear()
            self._waiting.clear()
        for job in left:
            self._tell(job, error)

    def _tell(self, job, news):
        if not job.cancelled:
            try:
                job.deliver(news)
            except RuntimeError:  # the event loop that wanted it is closed
                job.cancelled = True
