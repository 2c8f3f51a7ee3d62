"""Where the wall time of a run goes, across restarts: every second has one entry in goodput.json.

A run is a series of sessions, each from its start to its end or its last sign of life. What a
session did after its last checkpoint is done again by the next one, so that time, and the time
until the next one started, is `lost_to_failure`.
"""

import contextlib
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator

from ...configs.files import write_json
from ...models.parallel import processes

FILE = "goodput.json"
_MARKS = 64
KINDS = (
    *("start_up", "compile", "input_wait", "step", "replica_check", "save", "evaluation"),
    "lost_to_failure",
)


class Ledger:
    """Charges the time between calls to what the run is doing; that is `step` unless told.

    Args:
      workdir: the run's folder; what earlier sessions wrote there is continued.
      now: seconds since the epoch.
      started: when this session began, if that was before now.
    """

    def __init__(self, workdir: pathlib.Path, now: Callable[[], float] = time.time,
                 started: float | None = None):  # fmt: skip
        self._path, self._now = workdir / FILE, now
        self._kind = "start_up"
        self._since = now() if started is None else started
        before = _read(self._path)
        self._seconds = dict.fromkeys(KINDS, 0.0) | before.get("seconds", {})
        self._sessions = before.get("sessions", 0) + 1
        self._first = before.get("first_start", self._since)
        # Step -> seconds of steps until its checkpoint.
        self._marks = before.get("marks", {})
        if before and not before["finished"]:
            self._since = max(self._since, before["last_sign"])
            self._seconds["lost_to_failure"] += self._since - before["last_sign"]
        self.write()  # a session that is killed while it starts has been one too

    def going_on_from(self, step: int) -> None:
        """The steps after this checkpoint, if there were any, are done again: they are lost."""
        again = max(0.0, self._seconds["step"] - self._marks.get(step, 0.0))
        self._seconds["step"] -= again
        self._seconds["lost_to_failure"] += again

    @contextlib.contextmanager
    def doing(self, kind: str) -> Iterator[None]:
        """Charge the time inside to `kind`, one of KINDS."""
        assert kind in KINDS, kind
        outer = self._kind
        self._turn(kind)
        try:
            yield
        finally:
            self._turn(outer)

    def spent(self, *kinds: str) -> float:
        """Seconds of these kinds so far, up to now."""
        self._turn(self._kind)
        return sum(self._seconds[kind] for kind in kinds)

    def running(self) -> None:
        """From here on the run is making steps."""
        self._turn("step")

    def saving(self, step: int) -> None:
        """The checkpoint of this step is on its way; whether it arrives a restart will tell."""
        self._marks[step] = self._seconds["step"]
        # A restart goes back to one of the newest.
        self._marks = dict(sorted(self._marks.items())[-_MARKS:])

    def write(self, finished: bool = False) -> dict:
        """Bring the file up to date.

        Args:
          finished: the session ends here with everything saved; what follows is not lost.

        Returns:
          What the file holds; `goodput` is the share of the wall time spent in steps that counted.
        """
        self._turn(self._kind)
        wall = sum(self._seconds.values())
        report = {
            "goodput": self._seconds["step"] / wall if wall else 0.0,
            "wall_seconds": wall,
            "seconds": dict(self._seconds),
            "sessions": self._sessions,
            "first_start": self._first,
            "last_sign": self._since,
            "marks": self._marks,
            "finished": finished,
        }
        if processes.is_first():
            write_json(self._path, report)
        return report

    def _turn(self, kind: str) -> None:
        now = max(self._now(), self._since)  # a clock that is set back takes nothing away
        spent, self._since = now - self._since, now
        self._seconds[self._kind] += spent
        self._kind = kind


def process_start() -> float | None:
    """When this process began, in seconds since the epoch; None where the system does not say."""
    try:
        after_boot = float(
            pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        ) / os.sysconf("SC_CLK_TCK")
        boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return boot + after_boot
    except (OSError, ValueError, AttributeError, IndexError):
        return None


def _read(path: pathlib.Path) -> dict:
    """An earlier report; {} where there is none or it is malformed."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        # Older versions wrote "input wait" and the like.
        seconds = {re.sub("[ -]", "_", k): float(v) for k, v in report["seconds"].items()}
        return {
            "seconds": {kind: seconds.get(kind, 0.0) for kind in KINDS},
            "marks": {int(k): float(v) for k, v in report["marks"].items()},
            "last_sign": float(report["last_sign"]),
            "first_start": float(report["first_start"]),
            "sessions": int(report["sessions"]),
            "finished": bool(report["finished"]),
        }
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}
