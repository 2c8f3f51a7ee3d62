"""A disk that fails: from a moment on the kernel answers system calls of this process with EIO.

By seccomp (man 2 seccomp), which needs neither privileges nor a compiler, and which no library in
the process can tell from a broken disk. There is no way back: for processes of their own.
"""

import ctypes
import errno
import platform
import struct

_NUMBERS = {
    "x86_64": {"seccomp": 317, "write": (74, 75), "read": (17, 295, 327)},
    "aarch64": {"seccomp": 277, "write": (82, 83), "read": (67, 69, 286)},
}
_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # instructions of classic BPF
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NO_NEW_PRIVILEGES, _SET_FILTER, _ALL_THREADS = 38, 1, 1


def fail(what: str, number: int = errno.EIO) -> None:
    """Let a kind of system call fail in all threads, as TensorStore uses them.

    Args:
      what: "write" for fsync and fdatasync, "read" for pread and its like.
      number: the errno that they give.

    Raises:
      OSError: this system has no seccomp, or does not let us have it.
    """
    known = _NUMBERS.get(platform.machine())
    if platform.system() != "Linux" or known is None:
        raise OSError(errno.ENOSYS, "no seccomp")
    calls = known[what]
    program = [(_LOAD, 0, 0, 0)]  # the number of the call
    program += [(_IF_EQUAL, len(calls) - i, 0, call) for i, call in enumerate(calls)]
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | number)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    fprog = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.syscall(
        known["seccomp"], _SET_FILTER, _ALL_THREADS, fprog
    ):
        raise OSError(ctypes.get_errno(), "no seccomp")
