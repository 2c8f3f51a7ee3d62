"""`puna launch`: the processes of one run on this machine, started and watched together.

For several GPUs or, on CPU, simulated devices; on clusters Slurm and its like start processes.
"""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

# How long the others may take to end by themselves once one has failed.
_GRACE_SECONDS = 10


def launch(arguments: Sequence[str], num_processes: int, devices: int = 0) -> int:
    """Run `puna ARGUMENTS` in several processes.

    Args:
      arguments: command and flags, the same for all.
      num_processes: how many.
      devices: of each: simulated devices on CPU, else so many of the GPUs; 0 = JAX's own choice
        on CPU and one GPU each.

    Returns:
      The exit status: 0, or that of the process that failed first.
    """
    port = _free_port()
    children = []
    for i in range(num_processes):
        command = [
            *(sys.executable, "-m", "puna", *arguments),
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={num_processes}",
            f"--process_id={i}",
        ]
        # What all of them say alike is shown once; what goes wrong in the others, with their name.
        quiet = {} if i == 0 else {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        children.append(subprocess.Popen(command, env=_environment(i, devices), **quiet))
    relays = [threading.Thread(target=_relay, args=(i, c)) for i, c in enumerate(children) if i]
    for relay in relays:
        relay.start()
    with _passing_on_signals(children):
        status = _wait(children)
    for relay in relays:
        relay.join()
    return status


def _wait(children: list[subprocess.Popen]) -> int:
    """Until all have ended; after a failure the others are ended."""
    status, deadline = 0, None
    while any(c.poll() is None for c in children):
        failed = [c.returncode for c in children if c.returncode]
        if failed and deadline is None:
            status, deadline = failed[0], time.monotonic() + _GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for child in children:
                if child.poll() is None:
                    child.kill()
        time.sleep(0.05)
    status = status or next((c.returncode for c in children if c.returncode), 0)
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _passing_on_signals(children):
    """A signal to the launcher is one to every process; each decides what to do."""

    def pass_on(number, frame):
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, pass_on) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _relay(i: int, child: subprocess.Popen) -> None:
    assert child.stderr is not None
    for line in child.stderr:
        sys.stderr.write(f"[process {i}] " + line.decode(errors="replace"))
        sys.stderr.flush()


def _environment(i: int, devices: int) -> dict[str, str]:
    environment = dict(os.environ)
    if pathlib.Path("/dev/nvidia0").exists() and environment.get("JAX_PLATFORMS") != "cpu":
        mine = range(i * max(1, devices), (i + 1) * max(1, devices))
        environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, mine))
    elif devices:
        environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    return environment


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
