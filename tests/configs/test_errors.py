"""Whose fault an error is, however it comes: from the system, from TensorStore, from a process."""

import errno
import pickle
import socket

import pytest
import tensorstore

from puna.configs.errors import MACHINE, MISTAKE, ConfigError, MachineError, UserError, status
from puna.train.data.quarantine import BadRecord


@pytest.mark.parametrize(
    "name,fault",
    [
        *((n, MISTAKE) for n in ("ENOENT", "EACCES", "ENOTDIR", "EISDIR", "ENAMETOOLONG")),
        *((n, MISTAKE) for n in ("ENOSPC", "EDQUOT", "EROFS", "EEXIST", "ELOOP", "EFBIG")),
        *((n, MISTAKE) for n in ("EADDRINUSE", "EMFILE", "ENOTEMPTY")),
        *((n, MACHINE) for n in ("EIO", "ETIMEDOUT", "ECONNRESET", "ESTALE", "EPIPE", "ENETDOWN")),
        *((n, MACHINE) for n in ("EHOSTUNREACH", "ENETUNREACH", "ECONNREFUSED", "ENOMEM")),
        *((n, MACHINE) for n in ("EREMOTEIO", "ENOTCONN", "ECONNABORTED")),
    ],
)
def test_what_the_system_says(name, fault):
    error = OSError(getattr(errno, name), "said")
    assert status(error) == fault
    # As code everywhere tells it on: with the cause, with the cause hidden, from two levels down.
    for cause in (error, None):
        try:
            try:
                raise error
            except OSError as caught:
                try:
                    raise RuntimeError("library") from caught
                except RuntimeError:
                    raise ConfigError("data.train=x cannot be read") from cause
        except UserError as told:
            assert status(told) == fault
            there = pickle.loads(pickle.dumps(told))
            assert status(there) == fault and str(there) == str(told)
            assert type(there) is ConfigError
    said = f"UNKNOWN: Error reading: it [tensorstore_spec='{{}}'] [os_error_code='{error.errno}']"
    assert status(UserError(said)) == fault
    assert status(ValueError(said)) == (fault if fault == MACHINE else 1)


def test_errors_without_a_number():
    assert status(TimeoutError("timed out")) == MACHINE
    assert status(ConnectionResetError()) == MACHINE
    assert status(socket.gaierror(socket.EAI_AGAIN, "again")) == MACHINE
    assert status(socket.gaierror(socket.EAI_NONAME, "no such host")) == MISTAKE
    assert status(MachineError("gone")) == MACHINE
    assert status(UserError("no")) == status(OSError("not a gzip file")) == MISTAKE
    assert status(ValueError("a bug")) == status(KeyError("x")) == 1
    bad = pickle.loads(pickle.dumps(BadRecord("a.txt", "is binary", "a.txt", 1)))
    assert status(bad) == MISTAKE and bad.record == 1


def test_tensorstore_gives_the_number_of_the_system(tmp_path):
    (tmp_path / "file").write_text("")
    spec = {"driver": "file", "path": f"{tmp_path}/file/below/"}
    with pytest.raises(ValueError) as caught:
        tensorstore.KvStore.open(spec).result().write("x", b"y").result()
    assert status(UserError(str(caught.value))) == MISTAKE
    assert "os_error_code='20'" in str(caught.value)
