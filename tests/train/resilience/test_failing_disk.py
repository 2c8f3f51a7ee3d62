"""A disk that fails under a run: a status of its own, tried again, and nothing is set aside."""

import os
import pathlib
import subprocess
import sys

import pytest

from puna.configs import errors
from puna.train.resilience import launch

REFERENCE = pathlib.Path(__file__).parents[2] / "reference"

# What fails, and from when on.
FAILURES = {
    "none": "",
    "save": """
save = checkpoint.Checkpoints.save
def failing(self, state, step, position, provenance):
    if step == 4:
        failing_disk.fail("write")
    save(self, state, step, position, provenance)
checkpoint.Checkpoints.save = failing
""",
    "restore": """
restore = checkpoint.Checkpoints.restore
def failing(self, abstract):
    failing_disk.fail("read")
    return restore(self, abstract)
checkpoint.Checkpoints.restore = failing
""",
    "meta": """
read_bytes = pathlib.Path.read_bytes
def failing(self):
    if self.name == "metadata" and self.parent.name == "meta":
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))
    return read_bytes(self)
pathlib.Path.read_bytes = failing
""",
    "data": """
from puna.train import loop
real, running = os.pread, []
def failing(file, *args):
    if running and os.readlink(f"/proc/self/fd/{file}").endswith(".txt"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return real(file, *args)
os.pread = failing
dispatched = loop.metrics.RunLog.dispatched
def count(self, step, values):
    if step == 7:
        running.append(step)
    dispatched(self, step, values)
loop.metrics.RunLog.dispatched = count
""",
}
DRIVER = """
import errno, os, pathlib, sys
sys.path.append({reference!r})
import failing_disk
from puna import __main__ as command
from puna.train import checkpoint
{failure}
sys.argv[0] = "puna"
command.main()
"""


def seccomp_works():
    code = f"import sys; sys.path.append({str(REFERENCE)!r}); import failing_disk\n"
    code += "failing_disk.fail('write'); import os\n"
    code += "try:\n  os.fsync(1)\nexcept OSError as e:\n  sys.exit(e.errno)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 5


@pytest.mark.slow
def test_a_disk_that_fails(corpus, tmp_path):
    if not seccomp_works():
        pytest.skip("the kernel lets no process refuse its own system calls here")
    workdir = tmp_path / "run"

    def train(failure, *more):
        code = DRIVER.format(reference=str(REFERENCE), failure=FAILURES[failure])
        flags = [
            *("train", "--config=tiny", f"--workdir={workdir}", "--config.data.seq_len=32"),
            *(f"--config.data.train={corpus}/train/*.txt", "--config.data.validation="),
            *("--config.data.tokenizer=bytes", "--config.model.vocab_size=264"),
            *("--config.model.embed_dim=16", "--config.model.mlp_dim=24"),
            *("--config.model.num_layers=1", "--config.train.steps=100"),
            *("--config.train.batch_size=8", "--config.train.save_every=2"),
            *(
                "--config.train.keep=3",
                "--config.optimizer.schedule=constant",
                "--config.optimizer.warmup_steps=2",
                *more,
            ),
        ]
        environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", code, *flags]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stderr

    def steps():
        return sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.name[0] != ".")

    status, err = train("save")
    assert status == errors.MACHINE, err
    assert "cannot save a checkpoint: Input/output error" in err and err.count("\n") == 1
    assert "the machine or the network failed" in err
    status, err = train("none", "--config.train.steps=4")
    assert status == 0, err
    assert steps() == ["2", "4"]
    for failure, said in (("restore", "Input/output error"), ("meta", "tale file handle")):
        status, err = train(failure)
        assert status == errors.MACHINE, err
        assert said in err and "damaged" not in err and err.count("\n") == 1
        assert steps() == ["2", "4"]
    status, err = train("data")
    assert status == errors.MACHINE, err
    assert ".txt: Input/output error" in err and err.count("\n") == 1


@pytest.mark.parametrize("status,starts", [(errors.MACHINE, 3), (errors.MISTAKE, 1), (1, 3)])
def test_a_failure_of_the_machine_is_tried_again(monkeypatch, status, starts):
    seen = []

    def once(*arguments):
        seen.append(arguments)
        return status

    monkeypatch.setattr(launch, "_launch_once", once)
    assert launch.launch(["train"], 1, restarts=2) == status
    assert len(seen) == starts
