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

from ...configs.errors import INTERRUPTED, MISTAKE, SAVED

# How long the others may take to end by themselves once one has failed.
_GRACE_SECONDS = 10
# Exit statuses after which starting again would end the same way, or is not wanted.
_FINAL = (MISTAKE, SAVED, INTERRUPTED)


def launch(
    arguments: Sequence[str], num_processes: int, devices: int = 0, restarts: int = 0
) -> int:
    """Run `puna ARGUMENTS` in several processes, again after a failure.

    Args:
      arguments: command and flags, the same for all.
      num_processes: how many.
      devices: of each: simulated devices on CPU, else so many of the GPUs; 0 = JAX's own choice
        on CPU and one GPU each.
      restarts: how often to start all of them again; `puna train` resumes from its checkpoint. A
        user's mistake and a run that was told to end are not tried again.

    Returns:
      The exit status: 0, or that of the process that failed first.
    """
    for again in range(restarts + 1):
        status = _launch_once(arguments, num_processes, devices)
        if status in (0, *_FINAL) or again == restarts:
            break
        print(f"puna: starting again, {again + 1} of {restarts}", file=sys.stderr, flush=True)
    return status


def _launch_once(arguments, num_processes, devices) -> int:
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
    status, deadline, running = 0, None, children
    while running:
        time.sleep(0.05)
        running = [c for c in children if c.poll() is None]
        failed = [(c.returncode > 0, i, c.returncode) for i, c in enumerate(children)
                  if c.returncode]  # fmt: skip
        if failed and deadline is None:
            # A signal is the cause of the others' end where both are seen at a time.
            (_, i, status), deadline = min(failed), time.monotonic() + _GRACE_SECONDS
            if status not in _FINAL:
                how = f"signal {-status}" if status < 0 else f"status {status}"
                print(f"puna: process {i} ended with {how}", file=sys.stderr, flush=True)
        if deadline is not None and time.monotonic() > deadline:
            for child in children:
                child.kill()
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
