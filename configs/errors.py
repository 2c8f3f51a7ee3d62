"""How a command ends: errors that one line explains, whose fault each is, and exit statuses."""

import errno
import os
import re
import socket

# Exit statuses of a command: a mistake of the user, a failure of the machine or the network
# (EX_IOERR of sysexits.h), told to end and saved (EX_TEMPFAIL), another process of the run lost,
# Ctrl-C. After all but the first the same command can succeed.
MISTAKE = 2
MACHINE = 74
SAVED = 75
LOST = 76
INTERRUPTED = 130

_LONGEST = 1000  # characters of a message; what is longer quotes a value without end

# What the system says about a name, a permission, a limit or a full disk, which a user can mend
# and a second try cannot. All else (EIO, ESTALE, ETIMEDOUT, ECONNRESET, ...) is the machine's.
_USERS = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EXDEV, errno.ENOTTY, errno.ESPIPE),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY, errno.ENXIO, errno.ENODEV),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.EMLINK, errno.ERANGE),
    *(errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EADDRINUSE, errno.EADDRNOTAVAIL),
    *(errno.ENOEXEC, errno.E2BIG, errno.EAFNOSUPPORT, socket.EAI_NONAME),
}
# Python's own may come without a number.
_NETWORK = (TimeoutError, ConnectionError, socket.gaierror)


class UserError(Exception):
    """A mistake of the user: one line naming the key or file, the value, the rule and the fix."""

    def __str__(self) -> str:
        return one_line(super().__str__())

    def __reduce__(self):
        # From a reader process: pickling alone would lose what the system said.
        return _with_cause, (type(self), self.args, system_error(self))


class ConfigError(UserError):
    """A configuration that cannot be: names the key, its value and the rule."""


class MachineError(Exception):
    """A failure of the machine or the network, in one line; the same command can succeed later."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str) -> str:
    """A message as one line, whatever is in the names it quotes, and safe on any terminal."""
    line = " ".join(text.split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def system_error(error: BaseException | None) -> OSError | None:
    """What the operating system said, if that is what an error comes from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and (error.errno is not None or isinstance(error, _NETWORK)):
            return error
        # TensorStore has no exceptions of its own.
        if found := re.search(r"os_error_code='(\d+)'", " ".join(map(str, error.args))):
            number = int(found[1])
            return OSError(number, os.strerror(number))
        error = error.__cause__ or error.__context__
    return None


def status(error: BaseException) -> int:
    """The exit status for an error: MISTAKE, MACHINE, or 1 where the program itself is at fault."""
    said = system_error(error)
    if isinstance(error, MachineError) or (said is not None and said.errno not in _USERS):
        return MACHINE
    return MISTAKE if isinstance(error, UserError | OSError) else 1


def _with_cause(kind, args, cause):
    error = kind(*args)
    error.__cause__ = cause
    return error
