"""Whether a program runs to its end: in `sandbox.py`, with limits of time, memory, files.

A program and its tests share an interpreter, so one that sets out to be found right can be: it
cannot leave its process, see files or the network, or use more than its limits. Two limits follow
from the isolation: no process and no thread can be started, and only the standard library is there.
"""

import functools
import json
import os
import secrets
import subprocess
import sys
from typing import NamedTuple

from ...configs.errors import UserError
from . import sandbox

SECONDS, MEMORY = 10.0, 512 << 20
_START_SECONDS = 60.0  # of an interpreter on a busy machine
# What must fail, and does so nowhere but in the sandbox.
_PROBE = """
import ctypes, mmap, os, socket, threading
def refused(do, *arguments):
    try:
        do(*arguments)
    except (OSError, RuntimeError):
        return
    raise AssertionError(f"{do.__name__} is not refused")
assert not os.environ and os.getpid() == 1 and os.getcwd() == "/scratch"
assert not {"boot", "etc", "proc", "sys", "var"} & set(os.listdir("/")), os.listdir("/")
refused(os.fork)
refused(socket.socket)
refused(os.execv, "/bin/sh", ["sh"])
refused(threading.Thread(target=int).start)
refused(open, os.__file__, "a")
refused(os.chmod, os.__file__, 0)
assert ctypes.CDLL(None).unshare(0x10000000) == -1, "unshare is not refused"
refused(mmap.mmap, -1, 2**30)  # of which nothing is touched where it is not refused
open("a", "w").write("x")
"""


class Verdict(NamedTuple):
    """Whether a program ran to its end; else why not, such as "AssertionError" or a limit.

    `printed` is the beginning of what it wrote to standard output and error, if it came to an end.
    """

    passed: bool
    why: str
    printed: str = ""


def run(program: str, seconds: float = SECONDS, memory: int = MEMORY) -> Verdict:
    """Run a program in isolation.

    Args:
      program: Python's source; it passes if it runs to its end without an exception.
      seconds: of wall time. memory: bytes of address space, the interpreter included.

    Raises:
      UserError: this machine does not isolate programs; nothing has been run.
    """
    check_isolation()
    return _run(program, seconds, memory)


def printed(code: str) -> str:
    """What a program prints, and why it did not run to its end where it did not.

    Raises:
      UserError: it is not text, or this machine does not isolate programs.
    """
    if not isinstance(code, str):
        raise UserError("code must be text")
    found = run(code)
    lines = [found.printed.rstrip(), "" if found.passed else f"error: {found.why}"]
    return "\n".join(filter(None, lines)) or "[it printed nothing]"


@functools.cache
def check_isolation() -> None:
    """Run a program that tries what it may not.

    Raises:
      UserError: isolation is refused here, or leaks.
    """
    found = _run(_PROBE, _START_SECONDS, MEMORY)
    if not found.passed:
        raise UserError(
            f"this machine isolates no programs ({found.why}), and a model's programs are not run "
            "without: Linux with user namespaces and seccomp is needed; in a container allow "
            "them, for instance by --security-opt seccomp=unconfined --security-opt "
            "apparmor=unconfined"
        )


def _run(program: str, seconds: float, memory: int) -> Verdict:
    token = secrets.token_hex(16)
    request = {"program": program, "seconds": seconds, "memory": memory, "token": token}
    # An interpreter that is not where its system looks for libraries needs to be told.
    told = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", sandbox.__file__], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=told, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"{sys.executable} cannot be started to run a program: {error}") from None
    try:
        out, _ = process.communicate(
            json.dumps(request).encode() + b"\n", timeout=seconds + _START_SECONDS
        )
    except subprocess.TimeoutExpired:
        out = b""
    finally:
        process.kill()
        process.wait()
    found = json.loads(out) if out.strip() else {"ended": "stopped", "why": "it gave no answer"}
    if found["ended"] == "refused":
        raise UserError(
            f"this machine isolates no programs ({found['why']}), and a model's programs are not "
            "run without: Linux with user namespaces and seccomp is needed"
        )
    return Verdict(found["ended"] == "passed", found["why"], found.get("printed", ""))
