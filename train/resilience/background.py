"""What threads, finalisers and libraries report on their own: in a file of the run while it lasts.

What fails in a thread that saves or reads ahead comes back to the run as an error of one line.
Python and Orbax would print the same as tracebacks too, and TensorStore's threads answer event
loops that a failed save has left behind.
"""

import contextlib
import logging
import pathlib
import sys
import threading
from collections.abc import Iterator

FILE = "background.log"
_LIBRARIES = ("absl", "asyncio")  # Orbax logs through absl's


@contextlib.contextmanager
def background_log(path: pathlib.Path | None) -> Iterator[None]:
    """Write to a file what would be printed of threads, finalisers and by Orbax; then no longer.

    Args:
      path: made when there is something to write; None drops it.
    """
    handler = logging.NullHandler() if path is None else _File(path, delay=True, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    log = logging.Logger("background")
    log.addHandler(handler)

    def of_thread(args):
        name = args.thread.name if args.thread else "a thread"
        log.error("in %s", name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback))

    def of_finaliser(args):
        what = args.err_msg or "exception ignored in"
        info = (args.exc_type, args.exc_value, args.exc_traceback)
        log.error("%s %r", what, args.object, exc_info=info)

    libraries = [logging.getLogger(name) for name in _LIBRARIES]
    hooks = threading.excepthook, sys.unraisablehook
    before = [(library.handlers, library.propagate) for library in libraries]
    threading.excepthook, sys.unraisablehook = of_thread, of_finaliser
    for library in libraries:
        library.handlers, library.propagate = [handler], False
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = hooks
        for library, (handlers, propagate) in zip(libraries, before, strict=True):
            library.handlers, library.propagate = handlers, propagate
        handler.close()


class _File(logging.FileHandler):
    """Of a disk that may be what fails: that is said elsewhere."""

    def emit(self, record):
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record):
        pass

    def close(self):
        with contextlib.suppress(OSError):
            super().close()
