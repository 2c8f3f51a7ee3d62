"""Several processes as one program: roll call, joining, agreement, and what only the first does.

JAX's own way to join ends a process without a word on who is missing, so the processes meet
before it: each tells the first who and what it is, and hears "go" or why not.
"""

import contextlib
import hashlib
import itertools
import json
import platform
import socket
import time
from importlib import metadata

import jax
import numpy as np

from ..configs.errors import UserError

# Of a message; nobody has more to say.
_MOST_BYTES = 65536
# Names a barrier must have once only; all processes count alike.
_waits = itertools.count()
_VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def join(coordinator: str = "", num_processes: int = 0, process_id: int = -1, facts=None,
         timeout: int = 300, heartbeat: int = 100) -> None:  # fmt: skip
    """Become one of the processes of a run; does nothing where there is just one.

    Args:
      coordinator: HOST:PORT of the first process. Where it is left out, Slurm, Open MPI, GKE and
        TPU machines tell all three.
      num_processes, process_id: how many there are, and which of them this is, counted from 0.
      facts: must be equal in all of them, such as the configuration; any JSON.
      timeout: seconds to wait for the others.
      heartbeat: seconds after which a process that is silent counts as dead.

    Raises:
      UserError: some are missing or different, and which.
    """
    if num_processes == 1:
        return
    given = (bool(coordinator), num_processes > 0, process_id >= 0)
    if not all(given):
        if any(given):
            raise UserError(
                "--coordinator, --num_processes and --process_id must be given together"
            )
        coordinator, num_processes, process_id = _cluster(timeout)
        if num_processes <= 1:
            return
    if process_id >= num_processes:
        raise UserError(f"--process_id={process_id} must be below --num_processes={num_processes}")
    roll_call(coordinator, num_processes, process_id, _about(facts), timeout)
    # Read by CPU devices only.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator, num_processes, process_id, initialization_timeout=timeout,
        heartbeat_timeout_seconds=heartbeat,
    )  # fmt: skip
    here = [sum(d.process_index == i for d in jax.devices()) for i in range(num_processes)]
    if len(set(here)) > 1:
        odd = next(i for i, n in enumerate(here) if n != here[0])
        raise UserError(
            f"process {odd} has {here[odd]} devices and process 0 has {here[0]}; "
            "all must have equally many"
        )
    if is_first():
        kind = jax.devices()[0].device_kind
        print(f"{num_processes} processes of {here[0]} devices each ({kind})", flush=True)


def _cluster(timeout: int) -> tuple[str, int, int]:
    """What the cluster says, as JAX reads it; ("", 1, 0) outside of any."""
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout)
    coordinator, num_processes, process_id, _ = found
    return coordinator or "", num_processes or 1, process_id or 0


def _about(facts) -> dict:
    """What this process is; all but the host must be equal everywhere."""
    text = json.dumps(facts, sort_keys=True).encode()
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _VERSIONS},
        "configuration": hashlib.sha256(text).hexdigest()[:12],
    }


def roll_call(coordinator: str, num_processes: int, process_id: int, about: dict, timeout: float):
    """Wait until all processes are there and alike.

    Raises:
      UserError: which are missing, or how one differs; in every process that is there.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT")
    deadline = time.monotonic() + timeout
    if process_id == 0:
        _call(int(port), num_processes, about, deadline, timeout)
    else:
        _answer((host.strip("[]"), int(port)), num_processes, process_id, about, deadline, timeout)


def _call(port, num_processes, about, deadline, timeout):
    there = {0: about}
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_server(port))
        except OSError as e:
            raise UserError(f"--coordinator: port {port} cannot be used: {e.strerror}") from e
        lines = {}
        verdict = None
        while len(there) < num_processes and verdict is None:
            server.settimeout(max(0.0, deadline - time.monotonic()) or 0.001)
            try:
                line, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(num_processes)) - there.keys())
                verdict = (
                    f"{_list(missing)} of {num_processes} did not come within {timeout:g} s "
                    f"(process 0 waits on {about['host']}:{port})"
                )
                break
            stack.enter_context(line)
            try:
                line.settimeout(10)
                said = _receive(line)
                number, size, other = said["process"], said["of"], dict(said["about"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not one of ours
            lines[number] = line
            if size != num_processes or not 0 < number < num_processes:
                verdict = f"process {number} of {size} came to a run of {num_processes}"
            elif number in there:
                verdict = (
                    f"process {number} came twice: from {there[number]['host']} and {other['host']}"
                )
            else:
                there[number] = other
                verdict = _difference(about, number, other)
        for line in lines.values():
            with contextlib.suppress(OSError):
                _send(line, {"go": verdict is None, "why": verdict})
    if verdict:
        raise UserError(verdict)
    hosts = {a["host"] for a in there.values()}
    known = ", ".join(f"{k} {v}" for k, v in about.items() if k != "host")
    print(f"{num_processes} processes on {len(hosts)} hosts: {known}", flush=True)


def _server(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _answer(address, num_processes, process_id, about, deadline, timeout):
    said = {"process": process_id, "of": num_processes, "about": about}
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise UserError(
                f"process 0 did not answer at {address[0]}:{address[1]} within {timeout:g} s"
            )
        try:
            with socket.create_connection(address, min(left, 5)) as line:
                _send(line, said)
                # The first process knows the deadline of all; a little more for its word to come.
                line.settimeout(left + 10)
                answer = _receive(line)
        except (OSError, ValueError):
            time.sleep(0.2)
            continue
        if answer["go"]:
            return
        raise UserError(answer["why"])


def _send(line: socket.socket, value) -> None:
    line.sendall(json.dumps(value).encode() + b"\n")


def _receive(line: socket.socket):
    data = b""
    while not data.endswith(b"\n"):
        part = line.recv(4096)
        if not part or len(data) > _MOST_BYTES:
            raise ValueError("no message")
        data += part
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


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_goes_first(what: str):
    """Let the first process do something alone; the others do it after it has."""
    if not is_first():
        wait(what)
    yield
    if is_first():
        wait(what)


def wait(what: str) -> None:
    """Go on when all processes are here, for an hour at most; `what` must be the same in all.

    Before programs that talk to each other, since CPU devices give each other seconds to show up
    and compiling may take one process a minute longer than another.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        barrier = multihost.get_barrier_sync_fn()
        assert barrier is not None
        barrier(key=f"puna/{what}/{next(_waits)}", timeout_ms=3_600_000)


def gather(value) -> list:
    """The JSON values of all processes, in their order, in all of them."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int64(len(data)))
    room = np.zeros(int(sizes.max()), np.uint8)
    room[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(room))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def on_host(x) -> np.ndarray:
    """A global array as a host array in every process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
