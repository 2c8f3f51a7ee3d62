"""The processes of a run meet before JAX joins them, and watch each other while it runs.

Each process tells the first who and what it is, and hears "go" or why not. The connections stay:
one that closes, or is silent for too long, names the lost process, and all end with that message.

JAX's coordination service cannot do this (seen with jax 0.10): where a process is missing or dies
it ends all others with SIGABRT from C++, which no Python code can catch to save or to say more; its
message names no host, and nothing can be compared before all have connected.
"""

import contextlib
import errno
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable

from ...configs.errors import LOST, MachineError, UserError

# Of a message.
_MOST_BYTES = 65536
# After a process has ended with a message, others may be about to say the same themselves; after
# the roll call has failed, others may be about to come and must hear of it.
_PATIENCE_SECONDS = 3.0


class Peers:
    """The connections to the other processes: of the first to all, of all others to the first."""

    def __init__(self, lines: dict[int, socket.socket], hosts: dict[int, str]):
        self._lines, self._hosts = lines, hosts
        self._heard: dict[int, float] = {}
        self._done: set[int] = set()
        self._said: dict[int, bytes] = dict.fromkeys(lines, b"")

    def watch(self, heartbeat: float, end: Callable[[str], None] | None = None) -> None:
        """Start to watch them, in a thread.

        Args:
          heartbeat: seconds of silence after which a process counts as lost.
          end: called with the reason once one is; by default it is printed and this process ends.
        """
        target = threading.Thread(target=self._watch, args=(heartbeat, end or _end), daemon=True)
        target.start()

    def leave(self, message: str = "") -> None:
        """Tell the others that this process ends as it should, or with an error's message."""
        self._tell({"bye": message})

    def close(self) -> None:
        for line in self._lines.values():
            line.close()

    def _tell(self, value) -> None:
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                _send(line, value)

    def _watch(self, heartbeat, end):
        self._heard = dict.fromkeys(self._lines, time.monotonic())
        while open_lines := {n: x for n, x in self._lines.items() if n not in self._done}:
            self._tell({"beat": 1})
            try:
                ready = _readable(open_lines, heartbeat / 5)
            except OSError:  # closed by this process itself
                return
            for number in ready:
                self._listen(number, open_lines[number], end)
            now = time.monotonic()
            for number in open_lines:
                silent = now - self._heard[number]
                if number not in self._done and silent > heartbeat:
                    self._gone(number, f"has been silent for {silent:.0f} s", end)

    def _listen(self, number, line, end):
        try:
            data = line.recv(4096)
        except OSError:
            data = b""
        if not data:
            self._gone(number, "was lost", end)
            return
        self._heard[number] = time.monotonic()
        *messages, self._said[number] = (self._said[number] + data).split(b"\n")
        for message in messages:
            try:
                said = json.loads(message)
            except ValueError:
                continue
            if "gone" in said:
                end(said["gone"])
            elif said.get("bye"):
                self._done.add(number)
                reason = f"{self._name(number)} ended: {said['bye']}"
                self._tell({"gone": reason})
                time.sleep(_PATIENCE_SECONDS)
                end(reason)
            elif "bye" in said:
                self._done.add(number)

    def _gone(self, number, how, end):
        self._done.add(number)
        reason = f"{self._name(number)} {how}; the run resumes from its last checkpoint when all "
        reason += "processes are started again"
        self._tell({"gone": reason})
        end(reason)

    def _name(self, number):
        return f"process {number} on {self._hosts[number]}"


def _readable(lines: dict[int, socket.socket], timeout: float) -> list[int]:
    """The numbers of the lines that have something to read, or are closed at the other end.

    Raises:
      OSError: a line is closed at this end.
    """
    with selectors.DefaultSelector() as selector:  # `select.select` ends at descriptor 1023
        for number, line in lines.items():
            if line.fileno() < 0:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            selector.register(line, selectors.EVENT_READ, number)
        return [key.data for key, _ in selector.select(timeout)]


def _end(reason: str) -> None:
    print(f"puna: {reason}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Threads and JAX's own way out would wait for the one that was lost.
    os._exit(LOST)


def roll_call(
    coordinator: str, num_processes: int, process_id: int, about: dict, timeout: float
) -> Peers:
    """Wait until all processes are there and alike.

    Returns:
      The connections between them.

    Raises:
      MachineError: which are missing; in every process that is there.
      UserError: how one differs, likewise.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT")
    deadline = time.monotonic() + timeout
    if process_id == 0:
        return _call(int(port), num_processes, about, deadline, timeout)
    address = (host.strip("[]"), int(port))
    return _answer(address, num_processes, process_id, about, deadline, timeout)


def _call(port, num_processes, about, deadline, timeout):
    there = {0: about}
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_server(port))
        except OSError as e:
            raise UserError(f"--coordinator: port {port} cannot be used: {e.strerror}") from e
        lines, verdict, kind = [], None, UserError
        while len(there) < num_processes:
            server.settimeout(max(0.0, deadline - time.monotonic()) or 0.001)
            try:
                line, _ = server.accept()
            except TimeoutError:
                if verdict is not None:
                    break
                missing = sorted(set(range(num_processes)) - there.keys())
                kind = MachineError
                verdict = (
                    f"{_list(missing)} of {num_processes} did not come within {timeout:g} s "
                    f"(process 0 waits on {about['host']}:{port})"
                )
                break
            stack.enter_context(line)
            try:
                line.settimeout(10)
                said = _receive(line)
                number, size = int(said["process"]), int(said["of"])
                other = {"host": "?"} | said["about"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not one of ours
            lines.append((number, line))
            if size != num_processes or not 0 < number < num_processes:
                found = f"process {number} of {size} came to a run of {num_processes}"
            elif number in there:
                found = (
                    f"process {number} came twice: from {there[number]['host']} and {other['host']}"
                )
            else:
                there[number] = other
                found = _difference(about, number, other)
            if found and verdict is None:
                verdict = found
                deadline = min(deadline, time.monotonic() + _PATIENCE_SECONDS)
        for _, line in lines:
            with contextlib.suppress(OSError):
                _send(line, {"go": verdict is None, "why": verdict, "host": about["host"],
                             "missing": kind is MachineError})  # fmt: skip
        if verdict:
            raise kind(verdict)
        server.close()  # JAX's service takes the port
        stack.pop_all()
    hosts = {a["host"] for a in there.values()}
    known = ", ".join(f"{k} {v}" for k, v in about.items() if k != "host")
    print(f"{num_processes} processes on {len(hosts)} hosts: {known}", flush=True)
    for _, line in lines:
        line.settimeout(None)
    return Peers(dict(lines), {i: a["host"] for i, a in there.items()})


def _server(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _answer(address, num_processes, process_id, about, deadline, timeout):
    said = {"process": process_id, "of": num_processes, "about": about}
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise MachineError(
                f"process 0 did not answer at {address[0]}:{address[1]} within {timeout:g} s"
            )
        with contextlib.ExitStack() as stack:
            try:
                line = stack.enter_context(socket.create_connection(address, min(left, 5)))
                _send(line, said)
                # The first process knows the deadline of all; a little more for its word to come.
                line.settimeout(left + 10)
                answer = _receive(line)
            except (OSError, ValueError):
                time.sleep(0.2)
                continue
            if not answer["go"]:
                raise (MachineError if answer.get("missing") else UserError)(answer["why"])
            line.settimeout(None)
            stack.pop_all()
            return Peers({0: line}, {0: answer["host"]})


def _send(line: socket.socket, value) -> None:
    line.sendall(json.dumps(value).encode() + b"\n")


def _receive(line: socket.socket):
    """One message, and nothing of the next, which may be here already."""
    data = b""
    while not data.endswith(b"\n"):
        there = line.recv(4096, socket.MSG_PEEK)
        if not there or len(data) > _MOST_BYTES:
            raise ValueError("no message")
        data += line.recv(there.find(b"\n") + 1 or len(there))
    return json.loads(data)


def _difference(mine: dict, number: int, other: dict) -> str | None:
    for key, value in mine.items():
        if key != "host" and other.get(key) != value:
            return (
                f"process {number} on {other.get('host')} differs from process 0 on "
                f"{mine['host']}: {key} {other.get(key)} and {value}"
            )
    return None


def _list(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {shown}"
