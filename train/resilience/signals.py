"""SIGTERM and Ctrl-C: the run saves after its current step and ends with a status that says it can
be resumed. A second signal ends it at once. Several processes agree on the step, whoever was told.
"""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Interrupted(KeyboardInterrupt):
    """The run was told to end; it has saved, and its message says after which step."""


class Signals:
    """Notes the signals that ask the run to end, while the `with` block lasts."""

    def __init__(self):
        self._asked = False
        self._before: dict[int, object] = {}

    def __enter__(self):
        # Python lets only the main thread have handlers; elsewhere signals do what they did.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if jax.process_count() > 1:
                # That of SIGTERM is JAX's own, which tells the other processes.
                numbers.remove(signal.SIGTERM)
            self._before = {n: signal.signal(n, self._note) for n in numbers}
        return self

    def __exit__(self, kind, error, traceback):
        self._restore()

    def _restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number, frame):
        self._restore()
        self._asked = True
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def end_after(self, step: int) -> bool:
        """Whether this step is the last for now; all processes ask at each step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
