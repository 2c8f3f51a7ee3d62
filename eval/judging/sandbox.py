"""The program that runs another one in isolation: see `judge.py`. It has the standard library only.

A line of JSON on standard input says what to run; a line on standard output says how it ended and
what the program printed at first. The program runs in this interpreter, as the only process of new
user, mount, PID, network, IPC and UTS namespaces: its root is a small file system in memory with
the standard library, read-only, and an empty folder. It has no capability, no environment, no
network device. A seccomp filter keeps it from making processes and threads, sockets, namespaces,
mounts, and memory that no limit counts. Where the kernel refuses any of this, nothing is run.
"""

import ctypes
import io
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
import types

_NEW = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
_BIND, _REC, _PRIVATE, _DETACH = 0x1000, 0x4000, 1 << 18, 2
_READ_ONLY, _NOSUID, _NODEV = 1, 2, 4
_NO_NEW_PRIVS, _SET_SECCOMP, _PDEATHSIG, _CAPBSET_DROP = 38, 22, 1, 24
_INSIDE_ID = 65534
_DISK_BYTES, _FILE_BYTES, _FILES = 64 << 20, 16 << 20, 32
_ROOT = "/proc"  # is a folder everywhere, and nothing in it is needed
_ANSWER_BYTES, _PRINTED_BYTES = 1 << 16, 4096
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

# System calls that are refused: their numbers on x86-64 and on AArch64, -1 where there is none.
_DENIED = {
    "fork": (57, -1), "vfork": (58, -1), "clone": (56, 220), "execve": (59, 221),
    "execveat": (322, 281), "socket": (41, 198), "connect": (42, 203), "bind": (49, 200),
    "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242), "sendmsg": (46, 211),
    "sendmmsg": (307, 269), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "mount_setattr": (442, 442), "move_mount": (429, 429), "open_tree": (428, 428),
    "fsopen": (430, 430), "fsmount": (432, 432), "fsconfig": (431, 431), "fspick": (433, 433),
    "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "userfaultfd": (323, 282), "bpf": (321, 280), "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "io_setup": (206, 0), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "prctl": (157, 167), "seccomp": (317, 277), "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264), "fanotify_init": (300, 262), "inotify_init": (253, -1),
    "inotify_init1": (294, 26), "personality": (135, 92), "modify_ldt": (154, -1),
    "iopl": (172, -1), "ioperm": (173, -1), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "settimeofday": (164, 170), "adjtimex": (159, 171), "acct": (163, 89), "syslog": (103, 116),
    "quotactl": (179, 60), "sethostname": (170, 161), "setdomainname": (171, 162),
    "capset": (126, 91),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CLONE3, _MOUNT_SETATTR = 435, 442  # of both

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments) -> None:
    """Call a function of the C library that gives -1 where it fails."""
    if getattr(_libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _text(text: str):
    return ctypes.c_char_p(text.encode())


def _isolate() -> None:
    """New namespaces, in which this user has no rights outside them."""
    uid, gid = os.getuid(), os.getgid()
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("unshare", _NEW)
    for name, line in (
        ("setgroups", "deny"), ("uid_map", f"{_INSIDE_ID} {uid} 1"),
        ("gid_map", f"{_INSIDE_ID} {gid} 1"),
    ):  # fmt: skip
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def _new_root() -> None:
    """Make a small file system the root, and forget the old one."""
    _call("mount", None, _text("/"), None, _REC | _PRIVATE, None)
    options = _text(f"size={_DISK_BYTES},nr_inodes=4096,mode=0755")
    _call("mount", _text("tmpfs"), _text(_ROOT), _text("tmpfs"), _NOSUID | _NODEV, options)
    home = os.path.dirname(os.path.dirname(os.path.realpath(os.__file__)))
    done: list[str] = []
    for path in (*_LIBRARIES, f"{sys.base_prefix}/lib", home):
        if os.path.islink(path):
            os.makedirs(_ROOT + os.path.dirname(path), exist_ok=True)
            if not os.path.lexists(_ROOT + path):
                os.symlink(os.readlink(path), _ROOT + path)
        elif os.path.isdir(path) and not any(f"{path}/".startswith(d + "/") for d in done):
            os.makedirs(_ROOT + path, exist_ok=True)
            _call("mount", _text(path), _text(_ROOT + path), None, _BIND | _REC, None)
            _read_only(_ROOT + path)
            done.append(path)
    os.makedirs(_ROOT + "/dev")
    for path in _DEVICES:
        open(_ROOT + path, "w").close()
        _call("mount", _text(path), _text(_ROOT + path), None, _BIND, None)
    os.makedirs(_ROOT + "/scratch")
    os.chdir(_ROOT)
    _syscall((155, 41), _text("."), _text("."))  # pivot_root
    _call("umount2", _text("."), _DETACH)
    os.chdir("/scratch")


def _read_only(path: str) -> None:
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY | _NOSUID | _NODEV, 0, 0, 0)
    recursive, here = 0x8000, -100
    _syscall(
        (_MOUNT_SETATTR, _MOUNT_SETATTR), here, _text(path), recursive, ctypes.byref(attributes),
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )  # fmt: skip


def _syscall(numbers: tuple[int, int], *arguments) -> None:
    _call("syscall", ctypes.c_long(numbers[_MACHINES[os.uname().machine][0]]), *arguments)


def _limit(seconds: float, memory: int) -> None:
    cpu = int(seconds) + 2
    for name, most in (
        ("RLIMIT_AS", memory), ("RLIMIT_DATA", memory), ("RLIMIT_CPU", cpu), ("RLIMIT_CORE", 0),
        ("RLIMIT_FSIZE", _FILE_BYTES), ("RLIMIT_NOFILE", _FILES), ("RLIMIT_NPROC", 1),
        ("RLIMIT_MEMLOCK", 0), ("RLIMIT_MSGQUEUE", 0), ("RLIMIT_SIGPENDING", 64),
    ):  # fmt: skip
        resource.setrlimit(getattr(resource, name), (most, most))


def _drop() -> None:
    """Give up every capability, and the system calls that the program may not make."""
    for capability in range(64):
        if _libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # the kernel knows no more
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _syscall((126, 91), ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))  # capset
    at, arch = _MACHINES[os.uname().machine]
    allow, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
    load, equal, above, give = 0x20, 0x15, 0x35, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, kill), (load, 0, 0, 0)]
    if at == 0:  # the numbers of the x32 ABI, which name the same calls again
        code += [(above, 0, 1, 0x40000000), (give, 0, 0, refuse)]
    # glibc then takes clone, whose refusal it understands.
    code += [(equal, 0, 1, _CLONE3), (give, 0, 0, unknown)]
    for numbers in _DENIED.values():
        if numbers[at] >= 0:
            code += [(equal, 0, 1, numbers[at]), (give, 0, 0, refuse)]
    code.append((give, 0, 0, allow))

    class Instruction(ctypes.Structure):
        _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8),
                    ("k", ctypes.c_uint32)]  # fmt: skip

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint16), ("code", ctypes.POINTER(Instruction))]

    instructions = (Instruction * len(code))(*(Instruction(*line) for line in code))
    program = Filter(len(code), instructions)
    _call("prctl", _SET_SECCOMP, 2, ctypes.byref(program), 0, 0)


class _Printed(io.RawIOBase):
    """Keeps the beginning of what is written to it, whatever the length."""

    kept = b""

    def writable(self):
        return True

    def fileno(self):
        return 1

    def write(self, data):
        self.kept += bytes(data[: _PRINTED_BYTES - len(self.kept)])
        return len(data)


def _run(request: dict, out: int) -> None:
    """Be the program; never returns."""
    try:
        _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _new_root()
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.dup2(out, 3)
        os.closerange(4, 1 << 16)
        os.environ.clear()
        _limit(request["seconds"], request["memory"])
        _drop()
    except BaseException as error:
        os.write(out, f"refused {type(error).__name__}: {error}".encode())
        os._exit(1)
    raw = _Printed()
    printed = io.TextIOWrapper(
        io.BufferedWriter(raw), "utf-8", errors="replace", write_through=True
    )
    sys.stdout = sys.stderr = printed
    ended, why = "failed", ""
    try:
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(request["program"], "answer.py", "exec"), vars(module))
        ended = "passed"
    except MemoryError:
        why = "MemoryError"
    except SystemExit:
        why = "it ended before its tests did"
    except BaseException as error:
        why = "".join(traceback.format_exception_only(error))[-1000:].strip()
    try:
        printed.flush()
    except Exception:  # it was closed
        pass
    said = json.dumps([why, raw.kept.decode(errors="replace")])
    os.write(3, f"{ended} {request['token']} {said}".encode())
    os._exit(0)


def main() -> None:
    """Run one program; "ended" is then passed, failed, stopped or refused, "why" the reason."""
    request = json.loads(sys.stdin.buffer.readline())
    try:
        if sys.platform != "linux" or os.uname().machine not in _MACHINES:
            raise OSError(f"no isolation is known on {sys.platform} {os.uname().machine}")
        _isolate()
    except OSError as error:
        print(json.dumps({"ended": "refused", "why": str(error)}))
        return
    reader, out = os.pipe()
    pid = os.fork()
    if not pid:
        _run(request, out)
    os.close(out)
    said, late, end = b"", False, time.monotonic() + request["seconds"]
    while len(said) <= _ANSWER_BYTES:
        left = end - time.monotonic()
        late = left <= 0 or not select.select([reader], [], [], left)[0]
        piece = b"" if late else os.read(reader, _ANSWER_BYTES)
        if not piece:
            break
        said += piece
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    head, _, rest = said.decode(errors="replace").partition(" ")
    token, _, told = rest.partition(" ")
    if head == "refused":
        found = {"ended": "refused", "why": rest}
    elif head in ("passed", "failed") and token == request["token"]:
        why, printed = map(str, json.loads(told))
        found = {"ended": head, "why": why, "printed": printed}
    elif late:
        found = {"ended": "stopped", "why": f"took more than {request['seconds']:g} seconds"}
    else:
        found = {"ended": "stopped", "why": "its process ended before its tests did"}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
