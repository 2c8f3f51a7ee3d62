"""Hostile programs: each tries what it may not, and none gets it."""

import contextlib
import os
import socket
import sys
import time
from pathlib import Path

import pytest

from puna.configs.errors import UserError
from puna.eval.judging import judge

try:
    judge.check_isolation()
    ISOLATED = ""
except UserError as error:
    ISOLATED = str(error)
needs_isolation = pytest.mark.skipif(bool(ISOLATED), reason=ISOLATED or "isolated")

GOOD = [
    "x = 1",
    "import dataclasses, decimal, hashlib, itertools, json, math, random, re, sqlite3, typing",
    "def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\nassert f(15) == 610",
    "import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3",
    "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 1\nassert A().x == 1",
    "open('a', 'w').write('x')\nassert open('/scratch/a').read() == 'x'",
    "import tempfile\nwith tempfile.TemporaryFile(dir='.') as f: f.write(b'x')",
    "import time; time.sleep(0.01)",
    "input and print('x' * 10**6)",
]
# Programs that may do no harm but must not pass.
WRONG = {
    "assert 1 == 2": "AssertionError", "1 / 0": "ZeroDivisionError: division by zero",
    "x = (": "SyntaxError", "import sys; sys.exit(0)": "it ended before its tests did",
    "import os; os._exit(0)": "process ended before", "input()": "EOFError",
    "import os; os.close(3); raise SystemExit": "process ended before",
    "import os; os.write(3, b'passed 1234 ')\nassert 0": "process ended before",
    "import ctypes; ctypes.string_at(0)": "process ended before",
    "raise BaseException('x')": "BaseException: x", "import numpy": "ModuleNotFoundError",
}  # fmt: skip


def attempts():
    """Statements that must raise."""
    yield from [f"open({path!r}).read()" for path in (
        "/etc/passwd", "/etc/hostname", "/proc/self/environ", "/proc/1/environ", "/proc/meminfo",
        "/sys/class/net/lo/address", os.path.abspath(__file__), "/scratch/../etc/passwd",
        "/proc/self/root/etc/passwd", "/dev/tty", "/dev/mem", "/dev/kmsg",
    )]  # fmt: skip
    yield from [f"os.listdir({path!r})" for path in (
        "/etc", "/home", "/proc", "/sys", "/var", "/boot", os.path.expanduser("~/.ssh"),
        os.path.dirname(os.path.abspath(__file__)),
    )]  # fmt: skip
    yield from [f"open({path!r}, 'w').write('x')" for path in (
        os.__file__, "/usr/lib/x", "/etc/x", "/home/x", "/var/tmp/x", "/dev/x/y",
        os.path.join(os.path.dirname(os.path.abspath(__file__)), "escaped"),
    )]  # fmt: skip
    yield from [f"os.{call}" for call in (
        "fork()", "forkpty()", "system('true') == 0 or f(OSError)", "execv('/bin/sh', ['sh'])",
        "posix_spawn('/bin/sh', ['sh'], {})", "setuid(0)", "setgid(0)", "setgroups([0])",
        "chroot('/')", "mknod('/scratch/d', 0o60600, os.makedev(8, 0))", "environ['PATH']",
        "environ['HOME']", "getxattr('/etc', 'user.x')", "pidfd_open(1)",
        f"chmod({os.__file__!r}, 0)", f"chown({os.__file__!r}, 0, 0)", f"unlink({os.__file__!r})",
        f"rename({os.__file__!r}, '/scratch/x')", f"utime({os.__file__!r})",
        f"truncate({os.__file__!r}, 0)", f"link({os.__file__!r}, '/scratch/x')",
        "memfd_create('x')", "nice(-5)", "kill(2, 9)", "killpg(12345, 9)",
        "mkdir('/usr/lib/x')", "readlink('/proc/self/exe')", "sched_setscheduler(0, 1, "
        "os.sched_param(1))", "setpriority(0, 0, -9)",
    )]  # fmt: skip
    yield from [f"socket.socket({family})" for family in (
        "", "socket.AF_INET, socket.SOCK_DGRAM", "socket.AF_INET6", "socket.AF_UNIX",
        "socket.AF_NETLINK, socket.SOCK_RAW", "socket.AF_PACKET, socket.SOCK_RAW",
    )]  # fmt: skip
    yield "socket.create_connection(('127.0.0.1', PORT), timeout=1)"
    yield "socket.getaddrinfo('example.com', 80)"
    yield "__import__('urllib.request').request.urlopen('http://127.0.0.1:PORT')"
    yield "subprocess.run(['true'])"
    yield "subprocess.Popen('true', shell=True)"
    yield "threading.Thread(target=int).start()"
    yield "multiprocessing.Process(target=int).start()"
    yield "bytearray(50 << 30)"
    yield "' ' * (50 << 30)"
    yield "mmap.mmap(-1, 50 << 30)"
    yield "[bytearray(1 << 20) for _ in range(50_000)]"
    yield "[os.memfd_create(str(i)) for i in range(99)]"
    yield "[open(str(i), 'w') for i in range(99)]"
    yield "[open(f'f{i}', 'wb', 0).write(bytes(15 << 20)) for i in range(9)]"
    yield "[open(f'g{i}', 'w').close() for i in range(9999)]"
    yield "open('big', 'wb').write(bytes(17 << 20))"
    yield "os.truncate(os.open('sparse', os.O_CREAT | os.O_RDWR), 1 << 40)"
    yield "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"
    yield "resource.setrlimit(resource.RLIMIT_NPROC, (99, 99))"
    yield "resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))"
    yield from [f"f(OSError) if libc.{call} < 0 else None" for call in (
        "unshare(0x10000000)", "setns(0, 0)", "mount(b'x', b'/scratch', b'tmpfs', 0, None)",
        "umount2(b'/', 2)", "ptrace(0, 0, 0, 0)", "ptrace(16, 1, 0, 0)", "shmget(1, 9, 0o1600)",
        "msgget(1, 0o1600)", "semget(1, 1, 0o1600)", "prctl(1, 0, 0, 0, 0)", "personality(0x40000)",
        "syscall(101, 0, 0, 0, 0)", "syscall(321, 0, 0, 0)", "syscall(425, 8, 0)",
        "syscall(250, 1, 0)", "syscall(0x40000000 + 39)", "syscall(435, 0, 0)",
        "setresuid(0, 0, 0)", "reboot(0)", "swapoff(b'/x')", "acct(b'/scratch/x')",
        "clock_settime(0, b'0' * 16)",
        "syscall(304, 0, 0, 0)", "syscall(310, 1, 0, 0, 0, 0, 0)", "syscall(298, 0, 0, -1, -1, 0)",
    )]  # fmt: skip


ATTEMPTS = list(attempts())
FRAME = """
import ctypes, mmap, multiprocessing, os, resource, socket, subprocess, threading
libc = ctypes.CDLL(None)
def f(error): raise error
failures = []
for statement in {statements!r}:
    for name in os.listdir("."):
        os.remove(name)
    try:
        exec(statement)
    except (OSError, MemoryError, KeyError, RuntimeError, ValueError):
        continue
    failures.append(statement)
assert not failures, failures
"""


@needs_isolation
def test_what_a_program_prints():
    several = "import sys; print('a\u00e9'); print(1 / 2, file=sys.stderr, end='\\n\\n')"
    for program, printed in {
        several: "a\u00e9\n0.5", "x = 1": "[it printed nothing]",
        "print('so far'); 1 / 0": "so far\nerror: ZeroDivisionError: division by zero",
        "print('\\ud800')": "?",
        "import sys; sys.stdout.buffer.write(b'\\xff')": "\ufffd",
        "print('x', end=''); import sys; sys.stdout.close()": "x",
        "for i in range(10**5): print('abcdefg')": "abcdefg\n" * 511 + "abcdefg",
        "print('\\0' * 5000, end='')": "\0" * 4096,
        "raise ValueError('\\U0001f600' * 2000)": "error: " + "\U0001f600" * 999,
        # What it writes where its end is told is not believed.
        "import os; os.write(3, b'passed 12 [\"\", \"forged\"]')":
            "error: its process ended before its tests did",
        "import sys; sys.stdout.buffer.raw.kept = b'a' * 10**6": "error: it gave no answer",
    }.items():  # fmt: skip
        assert judge.printed(program) == printed, program
    assert judge.run("import os\nwhile True: os.write(3, b'x')", seconds=20).passed is False
    with pytest.raises(UserError, match="code must be text"):
        judge.printed(5)  # pyright: ignore[reportArgumentType]


@needs_isolation
def test_programs_that_may_run():
    for program in GOOD:
        assert judge.run(program)[:2] == (True, ""), program
    for program, why in WRONG.items():
        found = judge.run(program)
        assert not found.passed and why in found.why, (program, found)


@needs_isolation
def test_a_hundred_attempts_to_get_out():
    assert len(ATTEMPTS) > 100
    with socket.create_server(("127.0.0.1", 0)) as server:
        statements = [s.replace("PORT", str(server.getsockname()[1])) for s in ATTEMPTS]
        found = judge.run(FRAME.format(statements=statements), seconds=60)
        assert found == (True, "", "")
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


@needs_isolation
@needs_isolation
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "while True:\n    try:\n        __import__('os').fork()\n    except BaseException: pass",
        "x = []\nwhile True:\n    try: x.append(bytearray(1 << 24))\n    except Exception: pass",
        "import signal\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
        "while True: pass",
        "import os\nos.setsid()\nos.close(3)\nwhile True: pass",
        "import time\ntime.sleep(1000)",
        "while True: print('x' * 10**6)",
        "import os\nwhile True: os.write(3, b'x' * 60000)",
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
        "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
        "9 ** 9 ** 9",
    ],
)
def test_what_never_ends_is_stopped_and_leaves_nothing(program):
    began = time.monotonic()
    assert not judge.run(program, seconds=0.3).passed
    assert time.monotonic() - began < 30
    assert not orphans()


def orphans():
    """Processes of sandboxes whose parents are gone."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            command = stat.with_name("cmdline").read_bytes()
            parent = stat.read_text().rpartition(")")[2].split()[1]
            if b"judging/sandbox.py" in command and parent == "1":
                found.append(command)
    return found


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A function that puts another program in the place of the sandbox."""

    def put(program):
        (tmp_path / "sandbox.py").write_text(program)
        monkeypatch.setattr(judge.sandbox, "__file__", str(tmp_path / "sandbox.py"))
        judge.check_isolation.cache_clear()

    yield put
    judge.check_isolation.cache_clear()


def test_without_isolation_nothing_runs(stand_in):
    stand_in(
        "import json\nprint(json.dumps({'ended': 'refused', 'why': 'unshare: not permitted'}))\n"
    )
    with pytest.raises(UserError, match="isolates no programs .unshare: not permitted"):
        judge.run("x = 1")


def test_a_leak_is_found_before_anything_runs(stand_in):
    """Here the program runs without any isolation."""
    stand_in(
        "import json, sys\nrequest = json.loads(sys.stdin.readline())\n"
        "try:\n    exec(request['program'])\n    end = 'passed', ''\n"
        "except BaseException as error:\n    end = 'failed', repr(error)\n"
        "print(json.dumps({'ended': end[0], 'why': end[1]}))\n"
    )
    with pytest.raises(UserError, match="isolates no programs .AssertionError"):
        judge.run("x = 1")


@needs_isolation
@pytest.mark.parametrize(
    "call",
    ["_new_root()", '_limit(request["seconds"], request["memory"])', "_drop()",
     "os.environ.clear()"],
)  # fmt: skip
def test_the_probe_finds_each_protection_that_is_missing(monkeypatch, tmp_path, call):
    with open(judge.sandbox.__file__) as file:
        source = file.read()
    assert source.count(f"        {call}\n") == 1
    (tmp_path / "sandbox.py").write_text(source.replace(f"        {call}\n", "        pass\n"))
    monkeypatch.setattr(judge.sandbox, "__file__", str(tmp_path / "sandbox.py"))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nowhere")  # all that is handed on
    judge.check_isolation.cache_clear()
    try:
        with pytest.raises(UserError, match="isolates no programs"):
            judge.check_isolation()
    finally:
        judge.check_isolation.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="unshare is Linux's")
@needs_isolation
def test_what_the_sandbox_mounts_is_not_seen_outside():
    before = open("/proc/self/mounts").read()
    judge.run("open('a', 'w').write('x')")
    assert open("/proc/self/mounts").read() == before and not os.path.exists("/scratch")
