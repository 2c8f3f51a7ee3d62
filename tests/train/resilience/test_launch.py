"""The launcher with children that are a few lines of Python: what each is given, and what ends it.

`test_processes.py` launches puna itself.
"""

import json
import os
import pathlib
import signal
import sys
import threading
import time

import pytest

from puna.train.resilience import launch

# Stands where the interpreter of `python -m puna train ...` does.
CHILD = """#!{python} -S
import json, os, pathlib, signal, sys, time

folder = pathlib.Path({folder!r})
number = int(sys.argv[-1].removeprefix("--process_id="))
attempt = len(list(folder.glob(f"{{number}}-*")))
record = {{"arguments": sys.argv[1:], "environment": dict(os.environ)}}
path = folder / f"{{number}}-{{attempt}}"
path.with_suffix(".part").write_text(json.dumps(record))
os.rename(path.with_suffix(".part"), path)
print("warned", number, file=sys.stderr)
{body}
"""


@pytest.fixture
def children(monkeypatch, tmp_path):
    """Make `body`, which knows `number` and `attempt`, what the launcher starts."""

    def become(body):
        script = tmp_path / "python"
        script.write_text(CHILD.format(python=sys.executable, folder=str(tmp_path), body=body))
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
        monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.3)

    def started():
        return {p.name: json.loads(p.read_text()) for p in sorted(tmp_path.glob("[0-9]-?"))}

    become.started = started
    return become


@pytest.mark.parametrize(("devices", "simulated"), [(0, None), (3, "3")])
def test_each_child_has_the_command_its_place_and_its_devices(children, devices, simulated):
    children("")
    assert launch.launch(["train", "--config=tiny"], 3, devices) == 0
    started = children.started()
    assert list(started) == ["0-0", "1-0", "2-0"]
    coordinators = set()
    for number, child in enumerate(started.values()):
        *command, coordinator, processes, place = child["arguments"]
        assert command == ["-m", "puna", "train", "--config=tiny"]
        assert (processes, place) == ("--num_processes=3", f"--process_id={number}")
        assert child["environment"].get("JAX_NUM_CPU_DEVICES") == simulated
        coordinators.add(coordinator)
    assert len(coordinators) == 1 and coordinators.pop().startswith("--coordinator=127.0.0.1:")


@pytest.mark.parametrize(("devices", "each"), [(0, ["0", "1"]), (2, ["0,1", "2,3"])])
def test_on_gpus_each_child_has_its_own(monkeypatch, devices, each):
    exists = pathlib.Path.exists
    monkeypatch.setattr(pathlib.Path, "exists", lambda p: str(p) == "/dev/nvidia0" or exists(p))
    monkeypatch.delenv("JAX_PLATFORMS")
    found = [launch._environment(i, devices)["JAX_LOCAL_DEVICE_IDS"] for i in range(2)]
    assert found == each
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "JAX_LOCAL_DEVICE_IDS" not in launch._environment(0, devices)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("time.sleep(60 * (number != 1)); sys.exit(3)", 3),  # the others are killed
        ("number == 2 and os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL),
    ],
)
def test_the_first_failure_is_the_status(children, capfd, body, status):
    children(body)
    before = time.monotonic()
    assert launch.launch(["train"], 3) == status
    assert time.monotonic() - before < 50
    assert "puna: process " in capfd.readouterr().err


class Ended:
    """A child of which only the exit status is known, negative for a signal."""

    def __init__(self, returncode):
        self.returncode = returncode

    def poll(self):
        return self.returncode


@pytest.mark.parametrize(
    ("statuses", "status"), [((0, 0), 0), ((0, 3), 3), ((5, 3), 5), ((5, 3, -15, 4), 128 + 15)]
)
def test_of_failures_seen_together_a_signal_is_the_cause(statuses, status):
    assert launch._wait([Ended(code) for code in statuses]) == status


@pytest.mark.parametrize(
    ("failures", "status", "restarts", "expected", "attempts"),
    [
        (2, 1, 5, 0, 3),  # until it succeeds
        (9, 74, 2, 74, 3),  # as often as asked for
        (9, 1, 0, 1, 1),
        (9, 2, 5, 2, 1),  # a user's mistake stays one
        (9, 75, 5, 75, 1),  # told to end, and saved
    ],
)
def test_restarts(children, capfd, failures, status, restarts, expected, attempts):
    children(f"sys.exit({status} * (number == 0 and attempt < {failures}))")
    assert launch.launch(["train"], 2, restarts=restarts) == expected
    assert sum(name.startswith("0-") for name in children.started()) == attempts
    assert capfd.readouterr().err.count("puna: starting again") == attempts - 1


def test_only_the_first_child_is_shown_and_warnings_of_others_have_their_number(children, capfd):
    children('print("hello", number)')
    assert launch.launch(["train"], 2) == 0
    out, err = capfd.readouterr()
    assert out == "hello 0\n"
    assert sorted(err.splitlines()) == ["[process 1] warned 1", "warned 0"]


def test_a_signal_reaches_every_child_and_the_handler_is_put_back(children):
    children("signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
             "open(folder / f'ready{number}', 'w').close()\n"
             "time.sleep(60); sys.exit(9)")  # fmt: skip
    folder = pathlib.Path(sys.executable).parent
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append("own"))

    def tell():
        while len(list(folder.glob("ready*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    try:
        teller.start()
        assert launch.launch(["train"], 2) == 75
        teller.join()
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == ["own"]
