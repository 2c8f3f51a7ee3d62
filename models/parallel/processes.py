"""Several processes as one program: joining, agreement, and what only the first does."""

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

from ...configs.errors import UserError
from . import cluster
from .roll_call import Peers, roll_call

_peers: Peers | None = None
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
        place = cluster.find()
        if place is None or place.num_processes <= 1:
            return
        coordinator, num_processes, process_id = place
    if process_id >= num_processes:
        raise UserError(f"--process_id={process_id} must be below --num_processes={num_processes}")
    global _peers
    _peers = roll_call(coordinator, num_processes, process_id, _about(facts), timeout)
    _peers.watch(heartbeat)
    # Read by CPU devices only.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator, num_processes, process_id, initialization_timeout=timeout,
        heartbeat_timeout_seconds=2 * heartbeat,  # it would end us before our word is out
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


def _about(facts) -> dict:
    """What this process is; all but the host must be equal everywhere."""
    text = json.dumps(facts, sort_keys=True).encode()
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _VERSIONS},
        "configuration": hashlib.sha256(text).hexdigest()[:12],
    }


def leave(message: str = "") -> None:
    """Tell the others that this process ends: as it should, or with an error's message."""
    if _peers is not None:
        _peers.leave(message)


def lost_contact() -> None:
    """Where an error may come from another process's end: let the word on that come first."""
    if _peers is not None:
        time.sleep(2)


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


def merge(value: dict) -> dict:
    """The entries that each process has, of all of them."""
    return {key: entry for part in gather(value) for key, entry in part.items()}


def on_host(x) -> np.ndarray:
    """A global array as a host array in every process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
